"""State of routers that moves after the optimizer step: one object, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.adaptation.watch import Sums, Watch
from dynmoe.layers.moe import MoELayer, moe_layers
from dynmoe.layers.routers import Router, StepTotals


class RouterUpdates:
    """Calls ``Router.update`` of every router with state once after each optimizer step.

    ::

        updates = RouterUpdates(model, optimizer, num_steps=1000)
        for x, y in loader:
            loss = ...
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates.step(loss)

    ``step`` is called after each optimizer step, on every rank. What the layers routed in training
    is summed over the micro-batches of the step and over the ranks of ``torch.distributed``, all
    layers in one message; evaluation and recomputation never count. A step that a ``GradScaler``
    skipped, or whose ``loss`` is not finite on some rank, moves no state.

    The state is in buffers of the model, and so in its ``state_dict``. ``num_steps`` is the planned
    length of the training, for schedules. ``Adaptation`` does the same for its model: there is one
    of the two for each layer. A model without such routers costs nothing.

    Raises:
        ConfigError: an optimizer that does not hold the layers' parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        num_steps: float = math.inf,
    ) -> None:
        self.num_steps = num_steps
        self.steps = 0
        """Optimizer steps taken; set it where a training goes on."""
        self.layers = layers_with_state(model)
        self._watch = Watch(self.layers, optimizer)
        self._watch.open(bool(self.layers))

    def step(self, loss: Tensor | float | None = None) -> None:
        """Count one optimizer step. ``loss`` is the step's, or the sum of its micro-batches'."""
        self.steps += 1
        if self.layers:
            self._watch.check()
            flat, good = self._watch.step_sums(loss)
            update_routers(
                self.layers, self._watch.by_layer(flat), good, self.steps, self.num_steps
            )
        self._watch.end_step()

    def close(self) -> None:
        """Stop watching the layers and optimizers. For the end of training."""
        self._watch.close()


def layers_with_state(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers whose router has state to move, by name; frozen ones are left out."""
    return {
        name: layer
        for name, layer in moe_layers(model).items()
        if layer.router.has_state and any(p.requires_grad for p in layer.parameters())
    }


@torch.no_grad()
def update_routers(
    layers: Mapping[str, MoELayer],
    sums: Mapping[str, Sums],
    good: Tensor,
    step: int,
    num_steps: float,
) -> None:
    """Move the state of all routers by what one step routed, if it was a ``good`` one."""
    by_class: dict[type[Router], dict[Router, StepTotals]] = {}
    for name, layer in layers.items():
        part = sums[name]
        totals = StepTotals(
            part.load_S, part.k_hist, part.observed, part.calls.sum(), step, num_steps
        )
        by_class.setdefault(type(layer.router), {})[layer.router] = totals
    for group in by_class.values():
        every = [*group.values()]
        counts = good & torch.stack([each.k_hist.sum() for each in every]).sum().bool()
        if counts.device.type == "cpu" and not counts:
            continue
        for router, own in group.items():
            _move(router, own, every, counts)


def _move(router: Router, own: StepTotals, every: Sequence[StepTotals], counts: Tensor) -> None:
    buffers: dict[str, Any] = router._buffers
    kept = {key: b for key, b in buffers.items() if b is not None}
    before = {key: b.clone() for key, b in kept.items()}
    router.update(own, every)
    for key, buffer in kept.items():
        # NOTE: asked on the device, for which the host does not wait. Values go into the tensor
        # that was there: averages, DDP and compiled code know that one.
        buffer.copy_(torch.where(counts, buffers[key], before[key]))
        buffers[key] = buffer

"""Sums of what MoE layers routed in one optimizer step, over micro-batches and ranks.

Layers report their calls, optimizers the steps that they have taken. Sums stay on the device.

Shape suffixes: S slots, D model width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.optim import Optimizer

from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer, Routed

log = logging.getLogger(__name__)

ADD_AUX = (
    "Record the forward and add it: `with record_routing(model) as tape: loss = ...`, then "
    "`loss + 0.01 * aux_loss(tape)` (both in dynmoe.layers)"
)


class Sums(NamedTuple):
    """Sums of one layer, by slot: others may change the experts meanwhile."""

    load_S: Tensor
    k_hist: Tensor
    unserved_D: Tensor
    observed: Tensor
    calls: Tensor
    """[1]"""


class Watch:
    """Watches MoE ``layers`` and the ``optimizers`` that train them.

    Activation checkpointing counts a forward once; evaluation, or a forward under ``no_grad``,
    never counts. A step that a ``GradScaler`` skipped, or whose ``loss`` is not finite on some
    rank, is no good one.
    """

    def __init__(self, layers: Mapping[str, MoELayer], optimizers: Any) -> None:
        self.layers = dict(layers)
        self.optimizers = optimizers_of(self.layers, optimizers)
        self.calls = 0
        """Of all layers; whoever reads it sets it back."""
        self._names = {layer: name for name, layer in self.layers.items()}
        self._pending: dict[str, Sums] = {}  # of the step under way
        self._recomputed: dict[str, Sums] = {}  # the same, within its backward pass
        self._stepped: bool | Tensor = False
        self._aux = _AuxCheck()
        self._hooks = [each.register_step_post_hook(self._saw_step) for each in self.optimizers]

    @property
    def is_sure_of_aux(self) -> bool:
        """Whether it is known if the auxiliary losses are trained; until then it has to watch."""
        return self._aux.is_known

    def open(self, wanted: bool) -> None:
        """Let the layers report, or not: the sums cost a pass over the tokens."""
        for layer in self.layers.values():
            layer.observer = self._saw_call if wanted else None

    def check(self) -> None:
        """Refuse a layer that reports to another one.

        Raises:
            ConfigError: naming it.
        """
        for name, layer in self.layers.items():
            if layer.observer not in (None, self._saw_call):
                raise ConfigError(
                    f"adaptation of {name}: another callback or Adaptation has taken over this "
                    "layer. Keep one for each layer, and close() the one before."
                )

    def close(self) -> None:
        """Stop watching."""
        for layer in self.layers.values():
            if layer.observer == self._saw_call:
                layer.observer = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def end_step(self) -> None:
        """Forget the step under way."""
        self._aux.conclude()
        self._pending, self._recomputed, self._stepped = {}, {}, False

    def step_sums(self, loss: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """The sums of the step under way over all ranks, in one tensor, and whether it is a good
        one (bool). Sums of a step that is not are 0. One message, however many layers."""
        found = {**self._recomputed, **self._pending}
        layers = self.layers.items()
        sums = self.flat({name: found.get(name) or none(layer) for name, layer in layers})
        good = sums.isfinite().all() & self._stepped
        if isinstance(loss, Tensor):
            good = good & loss.detach().isfinite().all().to(sums.device)
        elif loss is not None:
            good = good & math.isfinite(loss)
        sums = sums.where(good, 0)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            sums = torch.cat([sums, (~good).to(sums.dtype)[None]])
            distributed.all_reduce(sums)
            sums, bad_ranks = sums[:-1], sums[-1]
            good = bad_ranks == 0  # gradients are averaged: none has a good step
            sums = sums.where(good, 0)
        return sums, good

    def flat(self, sums: Mapping[str, Sums]) -> Tensor:
        """One tensor: a step costs a few kernels, whatever the number of layers."""
        device = next(iter(self.layers.values())).active_E.device
        # float64 holds counts exactly; Apple's GPUs do not have it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.cat([part.to(device, dtype) for name in self.layers for part in sums[name]])

    def by_layer(self, flat: Tensor) -> dict[str, Sums]:
        """The parts of ``flat``, in its dtype, which are views of it."""
        sizes = [_sizes(layer) for layer in self.layers.values()]
        parts = iter(flat.split([n for each in sizes for n in each]))
        return {
            name: Sums(*(next(parts) for _ in each))
            for name, each in zip(self.layers, sizes, strict=True)
        }

    def _saw_call(self, layer: MoELayer, call: Routed) -> None:
        name = self._names.get(layer)
        if name is None:
            raise ConfigError(
                "adaptation: nn.DataParallel trains copies of the layers, in which no expert can "
                "come or go. Use DistributedDataParallel, or one device."
            )
        # NOTE: activation checkpointing runs a forward again within backward. Its reentrant kind
        # runs the first without gradients: then the second is the one that counts.
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward:
            self._aux.saw(call.aux, layer)
        if not torch.is_grad_enabled():
            return
        self.calls += 1
        sums = self._recomputed if in_backward else self._pending
        before, now = sums.get(name), _of_call(call, layer)
        sums[name] = now if before is None else Sums(*map(torch.add, before, now))

    def _saw_step(self, optimizer: Optimizer, *_: Any) -> None:
        # NOTE: GradScaler does not call an optimizer whose gradients overflowed, but a fused one,
        # which gets `found_inf` and leaves the parameters as they are.
        overflowed = getattr(optimizer, "found_inf", None)
        self._stepped = True if overflowed is None else self._stepped | (overflowed.sum() == 0)


class _AuxCheck:
    """Whether a backward pass reaches the auxiliary losses, which are easily left out."""

    def __init__(self) -> None:
        self.is_known = False
        self._calls = 0
        self._with_graph = 0
        self._reached = False
        self._without_graph = 0

    def saw(self, aux: Tensor, layer: MoELayer) -> None:
        if self.is_known:
            return
        self._calls += 1
        if aux.requires_grad:
            self._with_graph += 1
            aux.register_hook(self._mark)
        elif not torch.is_grad_enabled():
            self._without_graph += any(p.requires_grad for p in layer.router.parameters())

    def _mark(self, grad: Tensor | None) -> None:
        self._reached |= grad is not None  # None: by the layer's output alone

    def conclude(self) -> None:
        """Warn after the first optimizer step in which layers ran."""
        if self.is_known or not self._calls:
            return
        self.is_known = True
        if self._reached or not is_first_rank():
            return
        if self._with_graph:
            log.warning(
                "The auxiliary loss of the MoE layers is not in the loss that is trained. %s.",
                ADD_AUX,
            )
        elif self._without_graph:
            log.warning(
                "The MoE layers run without gradients in training, so their auxiliary loss has "
                "none: activation checkpointing must be of the other kind, use_reentrant=False."
            )


def none(layer: MoELayer) -> Sums:
    """The sums of a layer that was not called."""
    zeros = layer.active_E.new_zeros
    load, hist, width, observed, calls = _sizes(layer)
    return Sums(
        load_S=zeros(load, dtype=torch.long),
        k_hist=zeros(hist, dtype=torch.long),
        unserved_D=zeros(width, dtype=torch.float),
        observed=zeros(observed, dtype=torch.float),
        calls=zeros(calls, dtype=torch.long),
    )


def _sizes(layer: MoELayer) -> tuple[int, ...]:
    return layer.max_experts, layer.max_experts + 1, layer.dim, layer.router.observes, 1


def _of_call(call: Routed, layer: MoELayer) -> Sums:
    stats, active_S = call.stats, layer.active_E
    load_S = torch.zeros_like(active_S, dtype=stats.load_E.dtype)
    observed = active_S.new_zeros(0, dtype=torch.float)
    return Sums(
        # NOTE: by the mask on the device: slots' numbers would have to be sent there.
        load_S=load_S.masked_scatter(active_S, stats.load_E),
        k_hist=F.pad(stats.k_hist, (0, layer.max_experts - len(stats.load_E))),
        unserved_D=stats.unserved_D,
        observed=observed if call.observed is None else call.observed,
        calls=active_S.new_ones(1, dtype=torch.long),
    )


def is_first_rank() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def optimizers_of(layers: Mapping[str, MoELayer], optimizers: Any) -> list[Optimizer]:
    """The optimizers of PyTorch among those given, one or several.

    Raises:
        ConfigError: they are none, or hold no parameter of one of the layers.
    """
    several = isinstance(optimizers, Iterable) and not isinstance(optimizers, Optimizer)
    found = [_torch_optimizer(each) for each in (optimizers if several else [optimizers])]
    held = {p for each in found for group in each.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if held.isdisjoint(layer.parameters()):
            raise ConfigError(
                f"adaptation: the optimizer holds no parameter of {name}. Make the optimizer after "
                "the MoE layers, of all parameters, those of empty slots included."
            )
    return found


def _torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of PyTorch within accelerate's and Lightning's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"adaptation: expected a torch.optim.Optimizer, found {type(optimizer).__name__}"
        )
    return optimizer

"""MASS's adaptive process on a model: experts whose gradient drifts are split, for any loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from dynmoe.adaptation.adapt import Event, adaptive_layers, follow, forget_moments, twins_of
from dynmoe.adaptation.decision import GrowthSchedule, one_of
from dynmoe.adaptation.drift import Drift, Split, cosine, split_gradient
from dynmoe.adaptation.watch import is_first_rank, optimizers_of
from dynmoe.errors import ConfigError
from dynmoe.layers import losses
from dynmoe.layers.moe import MoELayer, moe_layers

log = logging.getLogger(__name__)


@dataclass
class _Pool:
    """The state of one layer."""

    patience: int
    drifts: dict[int, Drift] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    """Slots of experts that were split and of their copies, oldest first."""
    stopped: bool = False


class DriftGrowth:
    """Growth by gradient drift (MASS, arXiv 2512.19765) on every adaptive MoE layer.

    ::

        growth = DriftGrowth(model, optimizer, GrowthSchedule(500, 30, 60, unit="step"))
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            growth.before_step()
            optimizer.step()
            optimizer.zero_grad()

    ``before_step`` is called before each optimizer step, before gradients are clipped, on every
    rank. In the first ``schedule.until`` steps it takes the norm of the gradient of each expert's
    first matrix. An expert is split if its norms rise (``p_value`` of their z test) and its
    gradient is orthogonal to its weights (absolute ``cosine``): a copy takes the lowest free slot,
    one in a layer and step, and both get parts of the gradient (``drift.split_gradient``). Other
    parameters of the copy have no gradient in this step, and its optimizer state starts anew. In
    the same steps ``redundancy_weight`` times the squared cosines of the router's rows, of all
    pairs that a split made, is a loss whose gradient is added.

    From the ``check_from``-th split of a layer on the newest copy has to prove itself first: if
    the loss of the step's batch is no worse without it, it is removed, which takes one of
    ``patience`` points. Without a point left, and where the pool is full, the layer stops.

    An expert without tokens has the norm 0, which counts; a layer without any gradient did not run.
    A step whose norms are not finite enters no window. Gradients are the same on all ranks of
    ``torch.distributed`` after the backward pass of DDP, and so are decisions. ``averages``: as in
    ``Adaptation``. ``on_event`` gets one dict per change of a layer, on rank 0.

    Raises:
        ConfigError: as ``Adaptation``; FSDP, several optimizers, experts whose first matrix is not
            trained or not found.
        ValueError: an argument out of its range, or a schedule in shares.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: GrowthSchedule,
        p_value: float = 0.01,
        cosine: float = 1e-3,
        patience: int = 3,
        check_from: int = 3,
        redundancy_weight: float = 0.01,
        split: Split = "projection_full",
        on_event: Callable[[Event], None] | None = None,
        averages: Iterable[nn.Module] = (),
    ) -> None:
        if schedule.unit != "step":
            raise ValueError("schedule: give it in steps, schedule.in_steps(num_steps)")
        check_growth(p_value, cosine, patience, check_from, redundancy_weight, split)
        self.schedule = schedule
        self.p_value = p_value
        self.cosine = cosine
        self.check_from = check_from
        self.redundancy_weight = redundancy_weight
        self.split: Split = split
        self.on_event = on_event
        self.steps = 0
        """Optimizer steps so far."""
        self.layers = splittable_layers(model)
        self.optimizers = optimizers_of(self.layers, optimizer)
        if len(self.optimizers) != 1:
            raise ConfigError(
                f"growth by drift: expected one optimizer, found {len(self.optimizers)}: gradients "
                "are read before its step"
            )
        self._twins = [twins_of(self.layers, average) for average in averages]
        # The modules of an FFN are looked through once: this takes longer than a norm.
        self._first = {
            name: [layer.experts.first_weights(slot) for slot in range(layer.max_experts)]
            for name, layer in self.layers.items()
        }
        self._pools = {
            name: _Pool(patience, stopped=_is_full(layer)) for name, layer in self.layers.items()
        }

    @property
    def is_over(self) -> bool:
        """Whether no expert is split any more."""
        return self.steps >= self.schedule.until or all(p.stopped for p in self._pools.values())

    @property
    def may_check(self) -> bool:
        """Whether the next step may ask for a loss."""
        waits = (p for p in self._pools.values() if not p.stopped)
        return not self.is_over and any(self._must_check(pool) for pool in waits)

    @torch.no_grad()
    def before_step(
        self, loss: Callable[[], Tensor] | None = None, scale: float = 1.0, counts: bool = True
    ) -> list[Event]:
        """Read the gradients of one optimizer step, split experts, and add the redundancy loss.

        ``loss`` computes the loss of the step's batch, a scalar, without a trace: it is called
        twice under ``no_grad``, with the newest expert and without, and draws the same random
        numbers. None: the newest expert is never questioned. ``scale``: gradients are this many
        times too large (a ``GradScaler`` whose optimizer unscales them). ``counts``: False where
        the optimizer is known to skip the step.
        """
        events: list[Event] = []
        if counts and self.steps < self.schedule.until:
            events = self._split_drifting(loss, scale)
            self._add_redundancy(scale)
        self.steps += 1
        return events

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, windows, pairs and patience; the same on every rank."""
        layers = {
            name: {
                "experts": {slot: drift.state_dict() for slot, drift in pool.drifts.items()},
                "pairs": [list(pair) for pair in pool.pairs],
                "patience": pool.patience,
                "stopped": pool.stopped,
            }
            for name, pool in self._pools.items()
        }
        return {"steps": self.steps, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the model's own state is loaded before.

        Raises:
            ConfigError: it is no such state, or one of other layers.
        """
        found = list(state.get("layers", ()))
        if "steps" not in state or found != list(self.layers):
            raise ConfigError(
                f"growth by drift: expected a state of DriftGrowth.state_dict() of layers "
                f"{list(self.layers)}, found {found or sorted(state) or 'nothing'}"
            )
        self.steps = state["steps"]
        for name, of in state["layers"].items():
            pool = self._pools[name]
            pool.patience, pool.stopped = of["patience"], of["stopped"]
            pool.pairs = [(source, slot) for source, slot in of["pairs"]]
            pool.drifts = {}
            for slot, kept in of["experts"].items():
                pool.drifts[slot] = self._drift()
                pool.drifts[slot].load_state_dict(kept)

    def _drift(self) -> Drift:
        return Drift(int(self.schedule.warmup), int(self.schedule.window))

    def _must_check(self, pool: _Pool) -> bool:
        return bool(pool.pairs) and len(pool.pairs) + 1 >= self.check_from

    def _split_drifting(self, loss: Callable[[], Tensor] | None, scale: float) -> list[Event]:
        ran = {
            name: layer
            for name, layer in self.layers.items()
            if not self._pools[name].stopped
            and any(self._gradients(name, slot) for slot in layer.live)
        }
        if not ran:
            return []
        norms = self._norms(ran) / scale
        if not norms.isfinite().all():
            return []
        events = []
        each = iter(norms.tolist())
        for name, layer in ran.items():
            pool = self._pools[name]
            for slot in layer.live:
                pool.drifts.setdefault(slot, self._drift()).add(next(each))
            if (event := self._split_one(name, loss)) is not None:
                events.append(event)
        if is_first_rank():
            for event in events:
                log.info(
                    "step %d, %s: removed %s, added %s (from %s), %d -> %d experts",
                    *(event[key] for key in ("step", "layer", "removed", "added")),
                    *(event[key] for key in ("source", "before", "after")),
                )
                if self.on_event is not None:
                    self.on_event(event)
        return events

    def _gradients(self, name: str, slot: int) -> list[Tensor]:
        return [weight.grad for weight in self._first[name][slot] if weight.grad is not None]

    def _norms(self, layers: Mapping[str, MoELayer]) -> Tensor:
        """The norm of each living expert's first gradient, on the host."""
        found = []
        for name, layer in layers.items():
            zero = layer.active_E.new_zeros((), dtype=torch.float32)
            for slot in layer.live:
                parts = [torch.linalg.vector_norm(g.float()) for g in self._gradients(name, slot)]
                found.append(torch.linalg.vector_norm(torch.stack(parts)) if parts else zero)
        norms = torch.stack(found)
        if _world_size() > 1:
            # Devices of different kinds sum in different orders, and a z test has an edge.
            distributed.broadcast(norms, 0)
        return norms.cpu()

    def _split_one(self, name: str, loss: Callable[[], Tensor] | None) -> Event | None:
        """Split the first living expert that drifts, if there is one."""
        layer, pool = self.layers[name], self._pools[name]
        for slot in layer.live:
            drift = pool.drifts[slot]
            if not drift.may_test or drift.p_value >= self.p_value:
                continue
            # Without a token in this step there is no gradient that two could share.
            if not (gradients := self._gradients(name, slot)):
                continue
            found = cosine(self._first[name][slot], gradients)
            if _world_size() > 1:
                distributed.broadcast(found, 0)
            if abs(found.item()) < self.cosine:
                return self._change(name, slot, drift.p_value, found.item(), loss)
        return None

    def _change(
        self, name: str, source: int, p: float, cosine: float, loss: Callable[[], Tensor] | None
    ) -> Event:
        layer, pool = self.layers[name], self._pools[name]
        before = len(layer.live)
        removed: list[int] = []
        gain = None
        if loss is not None and self._must_check(pool):
            gain = _gain(layer, newest := pool.pairs[-1][1], loss)
            if gain <= 0:
                layer.remove_expert(newest)
                del pool.drifts[newest], pool.pairs[-1]
                removed = [newest]
                pool.stopped = pool.patience == 0
                pool.patience = max(0, pool.patience - 1)
        # NOTE: the code also splits an expert that it has just removed, into the slot it was in.
        added = None if pool.stopped or source in removed else self._add(name, source)
        for twins in self._twins:
            follow(twins[name], layer, added)
        return {
            "step": self.steps,
            "layer": name,
            "removed": removed,
            "added": added,
            "before": before,
            "after": len(layer.live),
            "source": None if added is None else source,
            "p_value": p,
            "cosine": cosine,
            "gain": gain,
            "patience": pool.patience,
        }

    def _add(self, name: str, source: int) -> int:
        layer, pool = self.layers[name], self._pools[name]
        slot = min(set(range(layer.max_experts)) - set(layer.live))
        layer.split_expert(source, slot)
        forget_moments(self.optimizers, layer, slot)
        for parameter in layer.slot_parameters(slot):
            parameter.grad = None  # of the copy that was removed from this slot in this step
        router = layer.router.slot_parameters
        shared = [
            *zip(self._first[name][source], self._first[name][slot], strict=True),
            *zip(router(source), router(slot), strict=True),
        ]
        for old, new in shared:
            if old.grad is None:
                continue
            if old.numel() == 1:  # a threshold has no direction
                new.grad = old.grad.clone()
                continue
            along, new.grad = split_gradient(old.grad, old, self.split)
            old.grad.copy_(along)
        pool.pairs.append((source, slot))
        pool.drifts[source].count = 0  # its windows stay
        pool.stopped = _is_full(layer)
        return slot

    def _add_redundancy(self, scale: float) -> None:
        if not self.redundancy_weight:
            return
        for name, pool in self._pools.items():
            if not pool.pairs:
                continue
            rows = {s: _row(self.layers[name], s) for s in sorted({*sum(pool.pairs, ())})}
            with torch.enable_grad():
                of = {slot: row.detach().float().requires_grad_() for slot, row in rows.items()}
                first, second = (torch.stack([of[p[i]] for p in pool.pairs]) for i in (0, 1))
                loss = self.redundancy_weight * losses.redundancy(first, second)
                gradients = torch.autograd.grad(loss, [*of.values()])
            for row, gradient in zip(rows.values(), gradients, strict=True):
                more = (scale * gradient).to(row.dtype)
                row.grad = more if row.grad is None else row.grad.add_(more)


def check_growth(
    p_value: float,
    cosine: float,
    patience: int,
    check_from: int,
    redundancy_weight: float,
    split: Split,
) -> None:
    """Refuse values that no expert could be split by.

    Raises:
        ValueError: naming what was expected.
    """
    one_of("split", split, get_args(Split))
    for name, number, holds, expected in (
        ("p_value", p_value, 0 < p_value <= 1, "above 0, up to 1"),
        ("cosine", cosine, 0 < cosine <= 1, "above 0, up to 1"),
        ("patience", patience, patience >= 0 and patience == int(patience), "an integer from 0"),
        (
            "check_from",
            check_from,
            check_from >= 2 and check_from == int(check_from),
            "an integer from 2",
        ),
        ("redundancy_weight", redundancy_weight, redundancy_weight >= 0, "0 or more"),
    ):
        if not holds:
            raise ValueError(f"{name}: expected {expected}, found {number!r}")


def splittable_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers of a model whose experts may be split, by name.

    Raises:
        ConfigError: there is none, or their gradients cannot be read and divided.
    """
    pools = [layer.experts for layer in moe_layers(model).values()]
    shared = any(pool.sharded or pool.parallel is not None for pool in pools)
    if shared or FullyShardedDataParallel.fsdp_modules(model):
        raise ConfigError(
            "growth by drift: the gradients of all experts are compared, of which each rank has a "
            "share. Set trainer=ddp or moe.adaptation=null"
        )
    layers = adaptive_layers(model)
    for name, layer in layers.items():
        weights = layer.experts.first_weights(0)
        if not weights or not all(weight.requires_grad for weight in weights):
            raise ConfigError(
                f"growth by drift of {name}: expected experts with a first linear layer that is "
                f"trained, found {type(layer.experts.slots[0]).__name__}. Train the experts, or "
                "set moe.adaptation=null"
            )
        if not any(p.numel() == layer.dim for p in layer.router.slot_parameters(0)):
            raise ConfigError(
                f"growth by drift of {name}: {type(layer.router).__name__} has no row for each "
                "expert. Set moe.adaptation=null"
            )
    return layers


def _is_full(layer: MoELayer) -> bool:
    return len(layer.live) == layer.max_experts


def _row(layer: MoELayer, slot: int) -> nn.Parameter:
    return next(p for p in layer.router.slot_parameters(slot) if p.numel() == layer.dim)


def _gain(layer: MoELayer, slot: int, loss: Callable[[], Tensor]) -> float:
    """By how much the loss is higher without an expert, mean over ranks."""
    with_it = loss()
    layer.active_E[slot] = False
    without = loss()
    layer.active_E[slot] = True
    gain = (without - with_it).double()
    if _world_size() > 1:
        distributed.all_reduce(gain)
    return gain.item() / _world_size()


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1

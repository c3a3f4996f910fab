"""DynMoE's adaptive process on a model, for any training loop: one object with a step method."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dynmoe.adaptation.decision import Schedule, decide, one_of
from dynmoe.adaptation.updates import layers_with_state, update_routers
from dynmoe.adaptation.watch import Sums, Watch, is_first_rank, none
from dynmoe.errors import ConfigError
from dynmoe.layers.expert_parallel import balanced
from dynmoe.layers.ffn import find_layout
from dynmoe.layers.moe import MoELayer, NewExpert, moe_layers
from dynmoe.layers.tokens import RoutingStats

log = logging.getLogger(__name__)

Event = dict[str, Any]
"""One update of one layer, as in ``events.jsonl``: step, layer, removed, added, before, after,
unrouted (share of tokens that no expert served), tokens."""


class Adaptation:
    """DynMoE's adaptive process (arXiv 2405.14297, Algorithm 1) on every adaptive MoE layer.

    ::

        adaptation = Adaptation(model, optimizer, Schedule(start=0, length=100, period=100))
        for x, y in loader:
            with record_routing(model) as tape:
                loss = F.cross_entropy(model(x), y)
            (loss + 0.01 * aux_loss(tape)).backward()
            optimizer.step()
            optimizer.zero_grad()
            adaptation.step(loss)

    The layers themselves report every forward in training mode with gradients, once, activation
    checkpointing included; evaluation, or a forward under ``no_grad``, never counts. ``step`` is
    called after each optimizer step, on every rank: what a step recorded is summed over the ranks
    of ``torch.distributed``, so that all make the same change and ``state_dict`` is the same
    everywhere. A step that a ``GradScaler`` skipped, or whose ``loss`` is not finite on some rank,
    enters no window. Routers with state, those of a fixed pool included, are moved in ``step`` too,
    as ``RouterUpdates`` does; ``num_steps`` is the length of the training, for their schedules.

    ``model`` may be wrapped (DDP, FSDP, ``torch.compile``, peft); ``root`` is the module as FSDP
    wraps it where ``model`` is a part of that. ``averages`` are copies of the model that hold an
    average of its weights (``torch.optim.swa_utils.AveragedModel``): their experts come and go with
    the model's, and a new expert's average starts at its weights. ``reset_moments`` starts all
    parameters of a new expert's slot without optimizer state; the official code keeps the old.
    ``remove_below``: see ``decide``. ``on_event`` gets one dict per layer and update, on rank 0.

    Raises:
        ConfigError: no MoE layer, none whose experts may change, layers that share parameters or
            are sharded by FSDP2, an optimizer that does not hold them, or an average of another
            model.
        ValueError: an argument that is none of its choices, more ``min_experts`` than a layer has
            slots, ``init="pretrained"`` of layers without ``keep_origin``, or ``"copy_redrawn"`` of
            experts whose hidden units are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Schedule,
        min_experts: int = 1,
        init: NewExpert = "copy_most_used",
        reset_moments: bool = True,
        on_event: Callable[[Event], None] | None = None,
        averages: Iterable[nn.Module] = (),
        root: nn.Module | None = None,
        num_steps: float = math.inf,
        remove_below: float = 0.0,
    ) -> None:
        if schedule.unit == "epoch":
            raise ConfigError("schedule: give it in steps, schedule.in_steps(steps_per_epoch)")
        check_arguments(min_experts, init, reset_moments, remove_below)
        self.schedule = schedule
        self.min_experts = min_experts
        self.init: NewExpert = init
        self.reset_moments = reset_moments
        self.remove_below = remove_below
        self.on_event = on_event
        self.num_steps = num_steps
        self.steps = 0
        self.root = model if root is None else root
        self.layers = adaptive_layers(model)
        _check_layers(self.layers, min_experts, init)
        # The number of a layer among all of them seeds its new experts.
        self._numbers = {name: number for number, name in enumerate(moe_layers(model))}
        self._moved = layers_with_state(model)
        self._watch = Watch(self.layers | self._moved, optimizer)
        self.optimizers = self._watch.optimizers
        self._twins = [twins_of(self.layers, average) for average in averages]
        self._window: Tensor | None = None  # all layers' sums in one, see `Watch.flat`
        self._observe()

    def step(self, loss: Tensor | float | None = None) -> list[Event]:
        """Count one optimizer step; after the last one of a window change the experts.

        Call it once after each ``optimizer.step()``, with gradient accumulation too. ``loss`` is
        the step's, or the sum of its micro-batches' losses.
        """
        self._watch.check()
        records = self.schedule.records(self.steps)
        if records or self._moved:
            flat, good = self._watch.step_sums(loss)
            if self._moved:
                sums = self._watch.by_layer(flat)
                update_routers(self._moved, sums, good, self.steps + 1, self.num_steps)
            if records:
                self._window = flat if self._window is None else self._window + flat
        self._watch.end_step()
        events = []
        if self.schedule.updates_after(self.steps):
            events = self._update()
        self.steps += 1
        self._observe()
        return events

    def close(self) -> None:
        """Stop watching the layers and optimizers. For the end of training."""
        self._watch.close()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the window under way, by slot; the same on every rank."""
        window = {} if self._window is None else self._by_layer(self._window)
        return {
            "steps": self.steps,
            "window": {name: stats._asdict() for name, stats in window.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the model's own state is loaded before.

        Raises:
            ConfigError: it is no such state, or one of layers with other names or sizes.
        """
        if not {"steps", "window"} <= state.keys():
            raise ConfigError(
                "adaptation: expected a state of Adaptation.state_dict(), with steps and window, "
                f"found {sorted(state) or 'nothing'}"
            )
        window = state["window"]
        if window and list(window) != list(self.layers):
            raise ConfigError(
                f"adaptation: the state is of layers {list(window)}, the model has "
                f"{list(self.layers)}"
            )
        for name, sums in window.items():
            expected = _sizes(_stats(none(self.layers[name]))._asdict())
            if _sizes(sums) != expected:
                raise ConfigError(
                    f"adaptation of {name}: the state is of a layer of another size. Expected sums "
                    f"of {expected}, found {_sizes(sums)}: give the layer the max_experts and the "
                    "width that it had, or start anew without the state."
                )
        self.steps = state["steps"]
        self._window = self._flat(window) if window else None
        self._observe()

    def _observe(self) -> None:
        # The sums cost a pass over the tokens: outside of windows nobody asks for them.
        wanted = self.schedule.records(self.steps) or not self._watch.is_sure_of_aux
        self._watch.open(wanted or bool(self._moved))

    def _flat(self, window: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        # The window holds sums of all watched layers; those of RoutingStats alone are read.
        empty = {name: none(layer) for name, layer in self._watch.layers.items()}
        for name, sums in window.items():
            kept = RoutingStats(**sums)
            empty[name] = empty[name]._replace(
                load_S=kept.load_E, k_hist=kept.k_hist, unserved_D=kept.unserved_D
            )
        return self._watch.flat(empty)

    def _by_layer(self, flat: Tensor) -> dict[str, RoutingStats]:
        sums = self._watch.by_layer(flat)
        return {name: _stats(sums[name]) for name in self.layers}

    def _update(self) -> list[Event]:
        assert self._window is not None  # a window's last step is one of its steps
        totals, self._window = self._by_layer(self._window), None
        calls, self._watch.calls = self._watch.calls, 0
        if not any(stats.k_hist.any() for stats in totals.values()):
            where = f"in the {self.schedule.length:g} optimizer steps up to step {self.steps}"
            if not calls:
                raise ConfigError(
                    f"adaptation: no MoE layer ran in training mode, with gradients, {where}: "
                    f"{', '.join(self.layers)}. Call model.train(), and give the model that is "
                    "trained."
                )
            log.warning(
                "No step counts %s: the optimizer took none, or loss or routing were not finite. "
                "Call step() after optimizer.step(), of the optimizer that was given.",
                where,
            )
        events = [self._change(name, stats) for name, stats in totals.items()]
        if is_first_rank():
            for event in events:
                log.info(
                    "step %d, %s: removed %s, added %s, %d -> %d experts",
                    *(event[k] for k in ("step", "layer", "removed", "added", "before", "after")),
                )
                if self.on_event is not None:
                    self.on_event(event)
        return events

    def _change(self, name: str, total: RoutingStats) -> Event:
        layer = self.layers[name]
        load_S = total.load_E.tolist()
        load = {slot: load_S[slot] for slot in layer.live}
        k_hist = total.k_hist.tolist()
        before = len(layer.live)
        # NOTE: tokens whose sum is exactly 0 point nowhere: Algorithm 1 adds only if R_S != 0. Nor
        # does a sum whose length is not finite, or rounds to 0.
        direction_D = total.unserved_D
        length = torch.linalg.vector_norm(direction_D).item()
        points = math.isfinite(length) and length > 0
        unserved = k_hist[0] if points else 0
        change = decide(load, unserved, layer.max_experts, self.min_experts, self.remove_below)
        for slot in change.remove:
            layer.remove_expert(slot)
        if change.add is not None:
            # The seed is the same on all ranks, and in a run that is resumed.
            seed = self.steps * 1000 + self._numbers[name]
            with whole(layer, self.root):
                layer.add_expert(change.add, direction_D, self.init, load, seed)
            if self.reset_moments:
                forget_moments(self.optimizers, layer, change.add)
        if (parallel := layer.experts.parallel) is not None:
            owners = balanced(parallel.owners, layer.live, load, parallel.size)
            parallel.move(layer.experts, owners, self.optimizers)
        for twins in self._twins:
            follow(twins[name], layer, change.add)
        return {
            "step": self.steps,
            "layer": name,
            "removed": list(change.remove),
            "added": change.add,
            "before": before,
            "after": len(layer.live),
            "unrouted": k_hist[0] / max(1, sum(k_hist)),
            "tokens": sum(k_hist),
        }


def adaptive_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers of a model whose experts may come and go, by name.

    A layer without a trained parameter (a frozen teacher) is left out.

    Raises:
        ConfigError: there is none, or they cannot be changed.
    """
    owner = type(model).__name__
    layers = moe_layers(model)
    if not layers:
        raise ConfigError(
            f"adaptation: no MoE layer in {owner}. Put MoELayer in the place of FFNs before "
            "training; models in a plain list or dict are not found: nn.ModuleList, nn.ModuleDict."
        )
    found = {
        name: layer
        for name, layer in layers.items()
        if layer.adaptive and any(p.requires_grad for p in layer.parameters())
    }
    if not found:
        routers = sorted({type(layer.router).__name__ for layer in layers.values()})
        raise ConfigError(
            f"adaptation: the experts of no MoE layer in {owner} may change. Their routers are "
            f"{', '.join(routers)}: use an adaptive one (TopAnyRouter) with trained parameters, or "
            "leave the callback out."
        )
    owners: dict[nn.Parameter, str] = {}
    for name, layer in found.items():
        for parameter in layer.parameters():
            if owners.setdefault(parameter, name) != name:
                raise ConfigError(
                    f"adaptation: {owners[parameter]} and {name} share parameters: a new expert of "
                    "one would overwrite the other's. Share the whole layer, or copy the parts."
                )
            if isinstance(parameter, DTensor) and not layer.experts.sharded:
                raise ConfigError(
                    f"adaptation: {name} is sharded by fully_shard, which sums the gradients of "
                    "experts that only some ranks used wrongly. Train with MoEFSDP2Strategy of "
                    "dynmoe.adaptation, or leave MoE layers unsharded."
                )
    return found


def check_arguments(
    min_experts: int, init: NewExpert, reset_moments: bool, remove_below: float
) -> None:
    """Refuse values that no layer could be adapted with.

    Raises:
        ValueError: naming the choices.
    """
    one_of("init", init, get_args(NewExpert))
    one_of("reset_moments", reset_moments, (True, False))
    if isinstance(min_experts, bool) or not isinstance(min_experts, int) or min_experts < 1:
        raise ValueError(f"min_experts: expected an integer, 1 or more, found {min_experts!r}")
    if not 0 <= remove_below < 1:
        raise ValueError(
            "remove_below: expected a share of the mean load of experts, 0 or more and below 1, "
            f"found {remove_below!r}"
        )


def _check_layers(layers: Mapping[str, MoELayer], min_experts: int, init: NewExpert) -> None:
    for name, layer in layers.items():
        if min_experts > layer.max_experts:
            raise ValueError(
                f"min_experts: expected at most {layer.max_experts}, the slots of {name}, found "
                f"{min_experts}"
            )
        if init == "pretrained" and layer.origin is None:
            raise ValueError(
                f"init: 'pretrained' needs layers made with keep_origin=True, {name} is not"
            )
        if init == "copy_redrawn" and find_layout(layer.experts.slots[0]) is None:
            raise ValueError(
                "init: 'copy_redrawn' needs FFNs of plain linear layers, those of "
                f"{name} are {type(layer.experts.slots[0]).__name__}. Give 'copy_most_used'"
            )


def twins_of(layers: Mapping[str, MoELayer], average: nn.Module) -> dict[str, MoELayer]:
    """The layers of an averaged copy, which are named alike but for a prefix, ``module.``"""
    if any(
        layer.experts.sharded or layer.experts.parallel is not None for layer in layers.values()
    ):
        raise ConfigError(
            "averages: each rank has a share of the weights (FSDP2, expert parallelism), and none "
            "averages them. Train with DDP, or without an average."
        )
    copies = moe_layers(average)
    prefix = next(
        (name for name in ("", "module.") if {name + x for x in layers} <= {*copies}), None
    )
    if prefix is None:
        raise ConfigError(
            f"averages: expected copies of the model, with MoE layers {list(layers)}, found "
            f"{list(copies)}"
        )
    return {name: copies[prefix + name] for name in layers}


@torch.no_grad()
def follow(twin: MoELayer, layer: MoELayer, added: int | None) -> None:
    """Give an averaged copy the layer's set of experts; new ones start at their weights."""
    new = {slot for slot in layer.live if slot not in twin.live or slot == added}
    for slot in new:
        if slot not in twin.live:
            twin.add_expert(slot, torch.ones(layer.dim), "slot")
        pairs = zip(twin.slot_parameters(slot), layer.slot_parameters(slot), strict=True)
        for average, parameter in pairs:
            average.copy_(parameter)
    for slot in set(twin.live) - set(layer.live):
        twin.remove_expert(slot)


def forget_moments(optimizers: Sequence[Optimizer], layer: MoELayer, slot: int) -> None:
    for optimizer in optimizers:
        for parameter in layer.slot_parameters(slot):
            # NOTE: without state Adam also counts its steps, for the bias correction, anew.
            optimizer.state.pop(parameter, None)


def _stats(sums: Sums) -> RoutingStats:
    """The sums over slots that a window keeps: counts, and the tokens' own fp32."""
    return RoutingStats(sums.load_S.long(), sums.k_hist.long(), sums.unserved_D.float())


def _sizes(sums: Mapping[str, Tensor]) -> dict[str, int]:
    return {key: len(values) for key, values in sums.items()}


@contextmanager
def whole(layer: nn.Module, model: Any) -> Iterator[None]:
    """Make the parameters of ``layer``, a part of ``model``, whole on every rank within the block.

    What is written to them goes into their shares, or to the experts' owners. On one device, and
    under DDP, nothing happens.
    """
    pool = getattr(layer, "experts", None)
    if pool is not None and pool.parallel is not None:
        with pool.parallel.whole(pool):
            yield
        return
    if any(isinstance(p, DTensor) for p in layer.parameters()):
        with _gathered(layer):
            yield
        return
    units = FullyShardedDataParallel.fsdp_modules(model)
    around = [unit for unit in units if any(module is layer for module in unit.modules())]
    if not around:
        yield
        return
    # Only the block that holds the layer's shares is gathered, not the model around it.
    innermost = min(around, key=lambda unit: sum(1 for _ in unit.modules()))
    with FullyShardedDataParallel.summon_full_params(innermost, recurse=False):
        yield


@contextmanager
@torch.no_grad()
def _gathered(layer: nn.Module) -> Iterator[None]:
    """Put whole parameters in the place of shares, and back, with what was written to them."""
    shares = [
        (module, name, p)
        for module in layer.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    ]
    found = {p: nn.Parameter(p.full_tensor(), p.requires_grad) for _, _, p in shares}
    for module, name, share in shares:
        setattr(module, name, found[share])
    try:
        yield
    finally:
        for module, name, share in shares:
            setattr(module, name, share)
        for share, p in found.items():
            # Every rank has written the same: none has to send it.
            share.copy_(
                distribute_tensor(p, share.device_mesh, share.placements, src_data_rank=None)
            )

"""How experts come and go: when, which ones, and the Lightning callback that changes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import lightning as L
from torch import Tensor

from dynmoe.adaptation.fsdp import whole
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import MoELayer, NewExpert, RoutingStats, moe_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """When routing is recorded and experts are updated, in optimizer steps.

    Windows of ``length`` steps begin at ``start`` and then every ``period``; the update follows a
    window's last step. ``unit="epoch"`` gives all three as fractions of an epoch: the
    paper's language runs record from 1/3 to 2/3 of every epoch (start 1/3, length 1/3, period 1).

    Raises:
        ValueError: a window that is empty, or longer than the period.
    """

    start: float
    length: float
    period: float
    unit: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if not (self.start >= 0 and 0 < self.length <= self.period):
            raise ValueError(
                f"expected start >= 0 and 0 < length <= period, found start={self.start}, "
                f"length={self.length}, period={self.period}"
            )

    def in_steps(self, steps_per_epoch: int) -> Schedule:
        """Return the same schedule in whole optimizer steps, at least one step long.

        The period of an epoch schedule is rounded to whole steps once, so that all windows are
        equally far apart.
        """
        if self.unit == "step":
            return self
        length = max(1, round(self.length * steps_per_epoch))
        return Schedule(
            start=round(self.start * steps_per_epoch),
            length=length,
            period=max(length, round(self.period * steps_per_epoch)),
        )

    def records(self, step: int) -> bool:
        """Tell whether 0-based optimizer step ``step`` lies in a window."""
        return step >= self.start and (step - self.start) % self.period < self.length

    def updates_after(self, step: int) -> bool:
        """Tell whether ``step`` is the last one of a window."""
        return step >= self.start and (step - self.start) % self.period == self.length - 1


class Decision(NamedTuple):
    """Slots to empty, and the slot that gets a new expert."""

    remove: tuple[int, ...]
    add: int | None


def decide(
    load: Mapping[int, int], unserved: int, num_slots: int, min_experts: int = 1
) -> Decision:
    """Make one update of DynMoE's Algorithm 1 (arXiv 2405.14297) for one layer.

    A pure function of one window's counts.

    ``load`` maps every living slot to the tokens that chose it in the window; ``unserved`` is the
    number of tokens that chose none. Experts without a token go, except that ``min_experts`` stay
    (lowest slots first). One expert is added if any token was unserved and a slot is free, in the
    lowest free slot, those just emptied included. A window without any token decides nothing.
    """
    if sum(load.values()) + unserved == 0:
        return Decision((), None)
    idle = [slot for slot in sorted(load) if load[slot] == 0]
    must_stay = max(0, min_experts - (len(load) - len(idle)))
    remove = tuple(idle[must_stay:])
    free = [slot for slot in range(num_slots) if slot not in load or slot in remove]
    add = free[0] if unserved > 0 and free else None
    return Decision(remove, add)


class DynMoECallback(L.Callback):
    """DynMoE's adaptive process (arXiv 2405.14297, Algorithm 1) on every adaptive MoE layer.

    It reads ``outputs["routing"]`` of ``training_step`` (``{layer name: [RoutingStats, ...]}``, by
    the names in ``pl_module.backbone``), so evaluation can never reach it; acts after the optimizer
    step, so masks never change between a forward and its backward; counts optimizer steps, so
    gradient accumulation does not move it. Windows are summed over all data-parallel ranks before
    the decision: every rank makes the same change. Its state is in the checkpoint.

    ``reset_moments`` starts all parameters of a new expert's slot without optimizer state;
    the official code keeps the old. ``on_event`` gets one dict per layer and update, on rank 0.
    """

    def __init__(
        self,
        start: float,
        length: float,
        period: float,
        unit: Literal["step", "epoch"] = "step",
        min_experts: int = 1,
        init: NewExpert = "copy_most_used",
        reset_moments: bool = True,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        try:
            self.schedule = Schedule(start, length, period, unit)
        except ValueError as error:
            raise ConfigError(f"moe.adaptation: {error}") from error
        self.min_experts = min_experts
        self.init: NewExpert = init
        self.reset_moments = reset_moments
        self.on_event = on_event
        self._step = 0
        self._window: dict[str, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.schedule.unit == "epoch":
            self.schedule = self.schedule.in_steps(_steps_per_epoch(trainer))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # The optimizer step this batch contributes to: at the batch's end it may have been taken.
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        if self.schedule.records(self._step):
            for name, calls in outputs["routing"].items():
                for stats in calls:
                    self._add_to_window(name, stats)
        # NOTE: the update waits for the last micro-batch of the window's last step.
        stepped = trainer.global_step > self._step
        if stepped and self.schedule.updates_after(self._step):
            for index, (name, layer) in enumerate(moe_layers(pl_module.backbone).items()):
                # The seed is the same on all ranks, and in a run that is resumed.
                if layer.adaptive:
                    self._update(trainer, name, layer, seed=self._step * 1000 + index)
            self._window = {}

    def _add_to_window(self, name: str, stats: RoutingStats) -> None:
        # NOTE: sums stay on the device; the host waits for them once a window, in `_update`.
        new = stats._asdict()
        window = self._window.get(name)
        if window is not None:  # a resumed window comes from the CPU
            new = {key: window[key].to(value.device) + value for key, value in new.items()}
        self._window[name] = new

    def _update(self, trainer: L.Trainer, name: str, layer: MoELayer, seed: int) -> None:
        total = _sum_over_ranks(trainer, self._window[name])
        load = dict(zip(layer.live, total["load_E"].tolist(), strict=True))
        k_hist = total["k_hist"].tolist()
        before = len(layer.live)
        # NOTE: tokens whose sum is exactly 0 point nowhere: Algorithm 1 adds only if R_S != 0.
        unserved = k_hist[0] if total["unserved_D"].any() else 0
        change = decide(load, unserved, layer.max_experts, self.min_experts)
        for slot in change.remove:
            layer.remove_expert(slot)
        if change.add is not None:
            # NOTE: trainer.model is the module as the strategy wraps it, which knows the shares.
            with whole(layer, trainer.model):
                layer.add_expert(change.add, total["unserved_D"], self.init, load, seed)
            if self.reset_moments:
                _forget_moments(trainer, layer, change.add)
        event = {
            "step": self._step,
            "layer": name,
            "removed": list(change.remove),
            "added": change.add,
            "before": before,
            "after": len(layer.live),
            "unrouted": k_hist[0] / max(1, sum(k_hist)),
            "tokens": sum(k_hist),
        }
        if not trainer.is_global_zero:
            return
        log.info(
            "step %d, %s: removed %s, added %s, %d -> %d experts",
            *(event[key] for key in ("step", "layer", "removed", "added", "before", "after")),
        )
        if self.on_event is not None:
            self.on_event(event)

    # NOTE: every rank sums its own window. A checkpoint holds their total, which rank 0 alone takes
    # back: the next sum over ranks would count it once for each of them.

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["dynmoe_window"] = {
            name: _sum_over_ranks(trainer, window) for name, window in self._window.items()
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._window = checkpoint["dynmoe_window"] if trainer.is_global_zero else {}


def _sum_over_ranks(trainer: L.Trainer, window: dict[str, Tensor]) -> dict[str, Tensor]:
    # A copy, because reduce() may write into its argument.
    return {
        key: trainer.strategy.reduce(value.clone(), reduce_op="sum")
        for key, value in window.items()
    }


def _forget_moments(trainer: L.Trainer, layer: MoELayer, slot: int) -> None:
    for optimizer in trainer.optimizers:
        for parameter in layer.slot_parameters(slot):
            # NOTE: without state Adam also counts its steps, for the bias correction, anew.
            optimizer.state.pop(parameter, None)


def _steps_per_epoch(trainer: L.Trainer) -> int:
    """Return optimizer steps: the data module's number if it has one, else the loader's."""
    own = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    if own is not None:
        return max(1, int(own))
    if math.isinf(trainer.num_training_batches):
        raise ConfigError(
            "moe.adaptation.unit=epoch: the training loader has no end; give the window in steps "
            "(unit=step), or the data module an attribute steps_per_epoch"
        )
    return max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)

"""MoE layers in transformers' ``Trainer``: auxiliary loss, padding, state, adaptation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from dynmoe.adaptation.adapt import Adaptation, Event, check_arguments
from dynmoe.adaptation.decision import Schedule, Unit
from dynmoe.adaptation.updates import RouterUpdates
from dynmoe.errors import ConfigError
from dynmoe.layers.moe import (
    NewExpert,
    Routed,
    aux_loss,
    conflict_loss,
    mask_padding,
    moe_layers,
    record_routing,
)

log = logging.getLogger(__name__)


class MoETrainerCallback(TrainerCallback):
    """Trains a model with MoE layers in transformers' ``Trainer``, whatever their routers.

    ::

        Trainer(model, args, train_dataset=data, callbacks=[MoETrainerCallback()])

    In training, ``aux_weight`` times the auxiliary loss of all MoE layers, and their loss of token
    gradient conflict, are added to the loss in the model's output; in evaluation the loss stays the
    model's own. With None add both in your own ``Trainer.compute_loss``. Padding
    (``attention_mask`` of ``input_ids``) routes nowhere. The state of routers moves after each
    optimizer step (``RouterUpdates``); it is in the model's buffers, and so in its checkpoints.

    Raises:
        ConfigError: in the first step an output without a loss; at the start fp16 with a loss of
            token gradient conflict.
    """

    def __init__(self, aux_weight: float | None = 0.01) -> None:
        self.aux_weight = aux_weight
        self._process: RouterUpdates | Adaptation | None = None
        self._hooks: list[RemovableHandle] = []
        self._forward: ExitStack | None = None  # what holds during one forward in training
        self._tape: dict[str, list[Routed]] = {}
        self._loss: Tensor | None = None
        self._state = TrainerState()
        self._has_conflicts = False
        self._share = 1.0  # of an auxiliary loss where the Trainer does not take the mean

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        self._stop()
        for hook in [*model._forward_hooks.values()]:
            # Left by a training that was stopped: two would add the auxiliary loss twice.
            if isinstance(owner := getattr(hook, "__self__", None), MoETrainerCallback):
                owner._stop()
        parts = args.gradient_accumulation_steps
        # NOTE: with `num_items_in_batch` the Trainer adds the losses of micro-batches and ranks,
        # which are then parts of one mean (Trainer.compute_loss and training_step).
        ranks = args.world_size if args.average_tokens_across_devices else 1
        self._share = 1 / (parts * ranks)
        self._state = state
        self._has_conflicts = any(layer.conflict for layer in moe_layers(model).values())
        if self._has_conflicts and args.fp16:
            raise ConfigError(
                "TrainingArguments: fp16 scales gradients, which may overflow before conflict "
                "compares them. Set bf16=True, or conflict=None in the MoE layers"
            )
        self._process = self._begin(model, optimizer, state, train_dataloader, parts)
        self._hooks = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def _begin(
        self, model: Any, optimizer: Any, state: TrainerState, loader: Any, parts: int
    ) -> RouterUpdates | Adaptation:
        updates = RouterUpdates(model, optimizer, state.max_steps)
        updates.steps = state.global_step
        return updates

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._process is not None:
            self._process.step(self._loss)
            self._loss = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # A callback does not see the loss: the model's output has it.

    @torch.compiler.disable
    def _open(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not model.training:
            return
        self._forward = ExitStack()
        self._forward.enter_context(mask_padding(model, _token_mask(model, kwargs)))
        if self.aux_weight is not None:
            self._tape = self._forward.enter_context(record_routing(model))

    @torch.compiler.disable
    def _close(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self._forward is None:
            return None
        self._forward.close()
        self._forward = None
        if output is None or self.aux_weight is None:  # None: the forward failed
            return None
        share = self._share if kwargs.get("num_items_in_batch") is not None else 1.0
        aux = self.aux_weight * share * aux_loss(self._tape)
        if self._has_conflicts:
            aux = aux + share * conflict_loss(model, self._tape, self._state.global_step)
        named = isinstance(output, Mapping)
        loss = output.get("loss") if named else output[0]
        if loss is None or loss.numel() != 1:
            raise ConfigError(
                f"{type(self).__name__}: the model's output has no loss (label smoothing and "
                "compute_loss_func take it outside of the model). Set aux_weight=None and add "
                "0.01 * aux_loss(tape) in your own compute_loss."
            )
        loss = loss + aux
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if named:
            output["loss"] = loss
            return output
        return (loss, *output[1:])


class DynMoETrainerCallback(MoETrainerCallback, ExportableState):
    """DynMoE's adaptive process on a model that transformers' ``Trainer`` trains.

    ::

        Trainer(model, args, train_dataset=data, callbacks=[DynMoETrainerCallback(0, 100, 100)])

    It is a ``MoETrainerCallback`` that also lets experts come and go. Windows count optimizer
    steps; the other arguments are those of ``Adaptation``. The state is in ``trainer_state.json``:
    a resumed training goes on in the middle of a window.

    Raises:
        ConfigError: a window that cannot be, an argument that is none of its choices; at the start
            of training a model that cannot be adapted (``Adaptation``); in its first step an output
            without a loss.
    """

    _process: Adaptation | None

    def __init__(
        self,
        start: float,
        length: float,
        period: float,
        unit: Unit = "step",
        min_experts: int = 1,
        init: NewExpert = "copy_most_used",
        reset_moments: bool = True,
        aux_weight: float | None = 0.01,
        on_event: Callable[[Event], None] | None = None,
        remove_below: float = 0.0,
    ) -> None:
        super().__init__(aux_weight)
        try:
            self.schedule = Schedule(start, length, period, unit)
            check_arguments(min_experts, init, reset_moments, remove_below)
        except ValueError as error:
            raise ConfigError(f"DynMoETrainerCallback: {error}") from error
        self.min_experts = min_experts
        self.init: NewExpert = init
        self.reset_moments = reset_moments
        self.remove_below = remove_below
        self.on_event = on_event

    def _begin(
        self, model: Any, optimizer: Any, state: TrainerState, loader: Any, parts: int
    ) -> Adaptation:
        schedule = self.schedule
        if schedule.unit == "epoch":
            schedule = schedule.in_steps(max(1, -(-len(loader) // parts)))
        adaptation = Adaptation(
            model,
            optimizer,
            schedule,
            self.min_experts,
            self.init,
            self.reset_moments,
            self.on_event,
            num_steps=state.max_steps,
            remove_below=self.remove_below,
        )
        if state.is_world_process_zero and (reason := schedule.never_updates(state.max_steps)):
            log.warning(reason)
        if state.global_step:
            known: Any = state.stateful_callbacks or {}
            _restore(adaptation, known.get(type(self).__name__), state.global_step)
        return adaptation

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in JSON: the Trainer asks for it on rank 0 alone."""
        arguments = {
            "start": self.schedule.start,
            "length": self.schedule.length,
            "period": self.schedule.period,
            "unit": self.schedule.unit,
            "min_experts": self.min_experts,
            "init": self.init,
            "reset_moments": self.reset_moments,
            "remove_below": self.remove_below,
            "aux_weight": self.aux_weight,
        }
        now = None if self._process is None else self._process.state_dict()
        if now is not None:
            window = now["window"].items()
            now["window"] = {n: {k: v.tolist() for k, v in sums.items()} for n, sums in window}
        return {"args": arguments, "attributes": {"progress": now}}


def _restore(adaptation: Adaptation, saved: Any, step: int) -> None:
    progress = saved["attributes"]["progress"] if isinstance(saved, Mapping) else None
    if progress is None:  # a checkpoint from before the callback was there
        adaptation.load_state_dict({"steps": step, "window": {}})
        return
    window = progress["window"].items()
    sums = {n: {k: torch.tensor(v) for k, v in of.items()} for n, of in window}
    adaptation.load_state_dict({"steps": progress["steps"], "window": sums})


def _token_mask(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return False on padding, [B, N], where the blocks see just these tokens."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    two_lengths = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if mask is None or ids is None or mask.shape != ids.shape or two_lengths:
        return None
    found: Tensor = mask.bool()
    return found

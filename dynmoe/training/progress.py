"""The progress of a run: plain lines in its run.log and where there is no terminal, else a bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dynmoe.report.words import measure_number
from dynmoe.selection import judged
from dynmoe.training.callbacks import RunRecorder


class RunLines(L.Callback):
    """A line at every evaluation and, between them, every ``seconds``.

    All lines go to ``run.log``. Those of evaluations are printed, the others too unless a
    progress bar shows the same (``has_bar``); with ``quiet`` none is.
    """

    def __init__(
        self, recorder: RunRecorder, seconds: float, has_bar: bool = False, quiet: bool = False
    ) -> None:
        self.recorder = recorder
        self.seconds = seconds
        self.has_bar = has_bar
        self.quiet = quiet
        self._began = self._last_line = self._evaluating = 0.0
        self._first_step = self._evaluations = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._last_line = time.perf_counter()
        self._evaluating = 0.0
        self._first_step, self._evaluations = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if self._is_due():
            self._say(
                trainer, f"{self._pace(trainer)}loss {outputs['loss'].item():.4f}", self.has_bar
            )

    def on_validation_start(self, *_: Any) -> None:
        self._evaluating -= time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self._evaluating += time.perf_counter()
        self._evaluations += 1

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_due():
            self._say(trainer, f"evaluating, batch {batch_idx + 1}", self.has_bar)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The end of an epoch is an evaluation, and the recorder, a Checkpoint, comes last.
        result = self.recorder.result
        if result is not None and result["step"] == trainer.global_step - 1:
            self._say(trainer, self._pace(trainer) + evaluated(result, self.recorder.facts))

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.recorder.folder.note(f"stopped at step {trainer.global_step}")

    def _is_due(self) -> bool:
        return time.perf_counter() - self._last_line >= self.seconds

    def _say(self, trainer: L.Trainer, text: str, log_only: bool = False) -> None:
        self._last_line = time.perf_counter()
        if trainer.is_global_zero:
            folder = self.recorder.folder
            line = f"step {trainer.global_step} of {trainer.max_steps}: {text}"
            (folder.note if log_only or self.quiet else folder.say)(line)

    def _pace(self, trainer: L.Trainer) -> str:
        """Training steps per second since this start, and the time left with evaluations."""
        steps = trainer.global_step - self._first_step
        if not steps:
            return ""
        step_time = (time.perf_counter() - self._began - self._evaluating) / steps
        left = (trainer.max_steps - trainer.global_step) * step_time
        if self._evaluations:  # the first record of an image run follows one step, others hundreds
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            ahead = data.plan.evaluations_from(trainer.global_step)
            left += ahead * self._evaluating / self._evaluations
        return f"{1 / step_time:.2f} steps/s, {duration(left)} left, "


def evaluated(result: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """One line on a record: its training loss, the scores that select and that are reported."""
    choice, parts = judged(result, facts), [f"evaluated, training loss {result['loss']:.4f}"]
    for role, score in (("selects", choice.validation), ("reported", choice.test)):
        sets, measure = facts[role]["sets"], facts[role]["measure"]
        if not sets or (role == "reported" and facts["reported"] == facts["selects"]):
            continue
        place = sets[0] if len(sets) == 1 else f"{len(sets)} sets"
        parts.append(f"{measure} {measure_number(measure, score)} on {place} ({role})")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Text of a time span, in s, min or h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class RunProgress(ProgressBar):
    """One bar for the whole run: steps done, time left, loss, the evaluation under way.

    Lightning's own bars start again at each epoch; here an epoch is the stretch up to the next
    evaluation, so they never show how far the run is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Lightning calls this on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps,"),
                TimeRemainingColumn(),
                TextColumn("left  {task.fields[state]}"),
            )
            self._task = self._progress.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, state=""
            )
            self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._show(f"loss {outputs['loss']:.3f}", completed=trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._show(f"evaluating, batch {batch_idx + 1}")

    def on_validation_end(self, *_: Any) -> None:
        self._show("")

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _show(self, state: str, **fields: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, state=state, **fields)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

"""One progress bar for the whole run: steps done, time left, loss, and the evaluation under way."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunProgress(ProgressBar):
    """Lightning's own bars start anew at each epoch; here an epoch is the stretch up to the next
    evaluation, so they never show how far the run is."""

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

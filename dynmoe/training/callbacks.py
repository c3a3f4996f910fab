"""The callback that writes a run's records and checkpoints at every evaluation."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dynmoe.metrics.routing import TRAIN
from dynmoe.records import RunFolder

Select = Callable[[list[dict[str, Any]]], Mapping[str, Any] | None]


class RunRecorder(Checkpoint):
    """After each evaluation: one line in ``results.jsonl``, the routing, then the checkpoints.

    ``last.ckpt`` is what a killed run resumes from; ``selected.ckpt`` is the one of the record that
    ``select`` chooses among all so far. Records are written before the checkpoint; on resuming,
    ``RunFolder.truncate_after`` drops those the checkpoint has not seen.

    ``constants`` (DomainBed's ``args`` and ``hparams``) are part of every result line;
    ``epoch_at`` tells the epoch of a step. With ``save_every`` ``last.ckpt`` is also written every
    so many optimizer steps between evaluations: a run that goes on from there has the same weights,
    but its next record's mean loss and training routing are of the steps since then.

    ``mem_gb`` is the peak memory in GiB, on a GPU since the start of this stage; on the CPU it is
    the peak of the whole process, earlier stages included.
    """

    def __init__(
        self,
        folder: RunFolder,
        select: Select,
        constants: Mapping[str, Any],
        epoch_at: Callable[[int], float],
        save_every: int | None = None,
    ) -> None:
        self.folder = folder
        self.save_every = save_every
        self.select = select
        self.constants = constants
        self.epoch_at = epoch_at
        self._clock = 0.0
        self._training = 0.0
        self._first_step = 0
        self._last_save = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_save = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = time.perf_counter()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # An evaluation follows the last batch, and saves after its record: a run that is killed in
        # the evaluation must not go on behind it.
        if self.save_every is None or trainer.is_last_batch:
            return
        step = trainer.global_step
        if step % self.save_every == 0 and step > self._last_save:
            self._save(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        self._training, self._clock = now - self._clock, now

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":  # a validation outside of training is not a record
            return
        step = trainer.global_step - 1
        steps = trainer.global_step - self._first_step
        result = {
            "step": step,
            "epoch": self.epoch_at(step),
            "step_time": self._training / max(1, steps),
            "eval_time": time.perf_counter() - self._clock,
            **pl_module.losses_since_last(),
            **pl_module.scores(),
            "mem_gb": _memory_gb(),
            **self.constants,
        }
        routing = [{"step": step, **record} for record in pl_module.routing_records()]
        for record in routing:
            if record["source"] == TRAIN:
                for key in ("mean_k", "unrouted"):
                    _log(trainer, f"moe/{record['layer']}/{key}", record[key], step)
                _log(trainer, f"moe/{record['layer']}/experts", len(record["slots"]), step)
        if trainer.is_global_zero:
            self.folder.append("results", result)
            self.folder.append("routing", *routing)
            if examples := pl_module.example_records():
                self.folder.append("examples", *({"step": step, **each} for each in examples))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._last_save = trainer.global_step
        checkpoints = self.folder.path / "checkpoints"
        unfinished = checkpoints / "unfinished.ckpt"
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            chosen = self.select(self.folder.read("results"))
            if chosen is not None and chosen["step"] == trainer.global_step - 1:
                shutil.copyfile(unfinished, checkpoints / "copy.ckpt")
                (checkpoints / "copy.ckpt").replace(checkpoints / "selected.ckpt")
            unfinished.replace(checkpoints / "last.ckpt")
        trainer.strategy.barrier()


def _log(trainer: L.Trainer, name: str, value: float, step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({name: value}, step=step)


def _memory_gb() -> float:
    """Peak memory: of the GPU where there is one (as DomainBed), else of the process.

    The process's peak cannot be reset: it includes the stages trained before in this process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# The end of a run that no longer gains.


class Patience(EarlyStopping):
    """Lightning's, after ``patience`` evaluations without a higher score, and after a resume too.

    Lightning stops where the score was computed; a run that was killed between that and its end
    would go on training.
    """

    def __init__(self, score: str, patience: int) -> None:
        super().__init__(
            score,
            mode="max",
            patience=patience,
            check_finite=False,  # a constant prediction has no correlation
            check_on_train_epoch_end=False,  # there a resumed run has no score yet
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.wait_count >= self.patience:
            trainer.should_stop = True


# One progress bar for the whole run: steps done, time left, loss, and the evaluation under way.


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

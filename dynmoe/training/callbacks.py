"""A run's records, checkpoints and early stop, at every evaluation."""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from dynmoe import process
from dynmoe.files import replace_synced
from dynmoe.metrics.routing import TRAIN
from dynmoe.records import RunFolder, Seal
from dynmoe.selection import LAST, Record, by_loss, judged, selected
from dynmoe.training.saving import save

RECORDS = "records"  # key of a checkpoint: digests of the records up to its step


class ShrinkingTokens(L.Callback):
    """Tells the blocks that keep ever fewer patches which optimizer step is next."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        from dynmoe.backbones.sparse import TokenSparsifier  # loads timm

        for module in pl_module.modules():
            if isinstance(module, TokenSparsifier):
                module.go_to(trainer.global_step)


class RunRecorder(Checkpoint):
    """After each evaluation: one line in ``results.jsonl``, the routing, then the checkpoints.

    A killed run resumes from ``last.ckpt``; ``selected.ckpt`` belongs to the best record so far,
    by the rule of ``facts`` (``selection``, ``test_envs``, ``selects``, ``reported`` of
    ``run.json``). Records are written before the checkpoint, with ``BackgroundFiles`` up to an
    evaluation before it; on resuming, ``RunFolder.truncate_after`` drops those it has not seen.

    With ``patience`` training stops after so many evaluations without a better one; the line of
    the last evaluation then says ``stopped_early``. Counts are part of the checkpoint.

    The routing of sets, most of the records of a long run, is kept at every ``routing_every``-th
    evaluation, and where the rule selects a step, by its own measure or by the loss (as
    ``dynmoe-report --by-loss`` does), or training ends; that of training always.

    ``constants`` (DomainBed's ``args`` and ``hparams``) are part of every result line;
    ``epoch_at`` gives the epoch of a step. With ``save_every``, ``last.ckpt`` is also written every
    so many optimizer steps between evaluations: a run that resumes from there has the same weights
    and mean losses, but the training routing of its next record is of the steps since then, as is
    its ``step_time``.

    ``mem_gb`` is the peak memory in GiB, on a GPU since the start of this stage; on the CPU it is
    the peak of the whole process, earlier stages included.
    """

    def __init__(
        self,
        folder: RunFolder,
        facts: Mapping[str, Any],
        constants: Mapping[str, Any],
        epoch_at: Callable[[int], float],
        save_every: int | None = None,
        patience: int | None = None,
        routing_every: int = 1,
    ) -> None:
        self.folder = folder
        self.facts = facts
        self.save_every = save_every
        self.patience = patience
        self.routing_every = routing_every
        self.constants = constants
        self.epoch_at = epoch_at
        self.result: dict[str, Any] | None = None  # of the last evaluation
        self._clock = 0.0
        self._training = 0.0
        self._first_step = 0
        self._last_save = 0
        self._best: Record | None = None  # step and scores of the selected record
        self._least: Record | None = None  # of the one that is selected by its loss
        self._without_gain = 0  # evaluations since then
        self._evaluations = 0
        self._seal = Seal(folder)

    def state_dict(self) -> dict[str, Any]:
        counts = {"without_gain": self._without_gain, "evaluations": self._evaluations}
        return {"best": self._best, "least": self._least, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._without_gain = state_dict["best"], state_dict["without_gain"]
        self._least = state_dict.get("least")  # here and below, of an older version: none
        self._evaluations = state_dict.get("evaluations", 0)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:
            checkpoint[RECORDS] = self._seal.at(trainer.global_step - 1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_save = trainer.global_step
        # A run that goes on within an epoch has no start of that epoch.
        self._clock, self._first_step = time.perf_counter(), trainer.global_step
        process.catch_signals_again()  # Lightning has just put its own handlers in place
        # A run that was killed after its last evaluation must not resume training.
        trainer.should_stop = trainer.should_stop or self._is_over()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = time.perf_counter()
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # NOTE: Lightning adds one whenever a run goes on from a checkpoint of the end of an epoch:
        # the steps of its loggers would be off by one more after every restart.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # NOTE: an evaluation follows the last batch, and saves after its record: a run that is
        # killed in the evaluation must repeat it, not resume after it.
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
            "step_time": self._training / steps if steps else math.nan,
            "eval_time": time.perf_counter() - self._clock,
            **pl_module.losses_since_last(),
            **pl_module.result(),
            "selects": self.facts["selects"],
            "reported": self.facts["reported"],
            "mem_gb": _memory_gb(),
            **self.constants,
        }
        if pl_module.nonfinite_step is not None:
            result["nonfinite_step"] = pl_module.nonfinite_step
        self.result = result
        # Scores are the same on all ranks, and so is the decision.
        self._compare(result)
        _log(trainer, "validation", judged(result, self.facts).validation, step)
        if self._is_over():
            trainer.should_stop = True
            if trainer.global_step < trainer.max_steps:
                result["stopped_early"] = True
        routing = [{"step": step, **record} for record in pl_module.routing_records()]
        for record in routing:
            if record["source"] == TRAIN:
                for key in ("mean_k", "unrouted", "conflict_share", "conflict_cosine"):
                    if record.get(key) is not None:
                        _log(trainer, f"moe/{record['layer']}/{key}", record[key], step)
                _log(trainer, f"moe/{record['layer']}/experts", len(record["slots"]), step)
        is_last = trainer.should_stop or trainer.global_step >= trainer.max_steps
        if not self._keeps_routing(step, is_last):
            routing = [record for record in routing if record["source"] == TRAIN]
        if trainer.is_global_zero:
            self.folder.check_there()
            self.folder.append("results", result)
            self.folder.append("routing", *routing)
            if examples := pl_module.example_records():
                self.folder.append("examples", *({"step": step, **each} for each in examples))

    def _compare(self, result: Mapping[str, Any]) -> None:
        """Keep the better of a record and the best one so far."""
        record = {"step": result["step"], "scores": result["scores"]}
        chosen = _better(self._best, record, self.facts)
        self._least = _better(self._least, record, by_loss(self.facts))
        # NaN (a constant prediction has no correlation) is no gain, even at first.
        gains = chosen is record and not math.isnan(judged(record, self.facts).validation)
        self._without_gain = 0 if gains else self._without_gain + 1
        self._best = chosen

    def _keeps_routing(self, step: int, is_last: bool) -> bool:
        """Count an evaluation; whether it records the routing of sets: reports show that of the
        step that the rule selects, which is the best one so far."""
        is_best = any(
            best is not None and best["step"] == step for best in (self._best, self._least)
        )
        selects = is_best and self.facts["selection"] not in LAST
        number, self._evaluations = self._evaluations, self._evaluations + 1
        return number % self.routing_every == 0 or selects or is_last

    def _is_over(self) -> bool:
        return self.patience is not None and self._without_gain >= self.patience

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._last_save = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # a run that goes on from here does not log these steps again
        is_best = self._best is not None and self._best["step"] == trainer.global_step - 1
        unfinished = self.folder.path / "checkpoints" / "unfinished.ckpt"
        save(trainer, unfinished, partial(_put_in_place, unfinished, is_best))
        trainer.strategy.barrier()


def _put_in_place(unfinished: Path, is_best: bool) -> None:
    """Let a checkpoint that is on disk take the place of the last one, and of the selected one."""
    if is_best:
        copy = unfinished.with_name("copy.ckpt")
        shutil.copyfile(unfinished, copy)
        replace_synced(copy, unfinished.with_name("selected.ckpt"))
    replace_synced(unfinished, unfinished.with_name("last.ckpt"))


def _better(best: Record | None, record: Record, facts: Mapping[str, Any]) -> Record | None:
    """The one that the rule selects; None where one run does not decide."""
    return selected([each for each in (best, record) if each is not None], facts)


def _log(trainer: L.Trainer, name: str, value: float, step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({name: value}, step=step)


def _memory_gb() -> float:
    """Peak memory in GiB: of the GPU where there is one (as DomainBed), else of the process.

    The process's peak cannot be reset: it includes the stages trained before in this process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""The end of a run whose loss or weights are no longer finite."""

from __future__ import annotations

import logging
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dynmoe.errors import Diverged
from dynmoe.layers.expert_parallel import is_elsewhere
from dynmoe.records import RunFolder
from dynmoe.tasks.base import MoETask

log = logging.getLogger(__name__)

NEVER = 2**62
EVERY = 10  # optimizer steps; on a GPU and between ranks a look at the loss makes them wait


class FiniteLoss(L.Callback):
    """Stop on all ranks when a loss or a weight is not finite, before it is recorded or saved.

    ``action="continue"`` only notes the step in ``run.json`` and in the results. A gradient that
    is not finite shows in the weights, or, where a GradScaler skips the step, nowhere: under
    ``16-mixed`` this is normal.

    Raises:
        Diverged: naming the step.
    """

    def __init__(self, folder: RunFolder, action: Literal["stop", "continue"] = "stop") -> None:
        self.folder = folder
        self.action = action
        self._first: Tensor | None = None  # step, on the device
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": None if self._first is None else int(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["step"] is not None:
            self._first = torch.tensor(state_dict["step"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step = trainer.global_step  # of the optimizer, counted from 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        step = torch.where(loss.isfinite(), NEVER, self._step)
        self._first = step if self._first is None else torch.minimum(self._first.to(step), step)
        alone = trainer.world_size == 1 and loss.device.type == "cpu"
        if alone or trainer.global_step % EVERY == 0:
            self._look(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer, pl_module, weights=True)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer, pl_module, weights=True)

    def _look(self, trainer: L.Trainer, task: Any, weights: bool = False) -> None:
        """End or note the run if something was not finite.

        All ranks come here together, or wait for ever; to save a checkpoint too.
        """
        device = trainer.strategy.root_device
        first = torch.tensor(NEVER) if self._first is None else self._first
        found = torch.stack([first.to(device), torch.tensor(NEVER, device=device)])
        if weights and not _are_finite(task):
            found[1] = trainer.global_step - 1
        loss, weight = trainer.strategy.reduce(found, reduce_op="min").tolist()
        step = min(loss, weight)
        if step == NEVER or task.nonfinite_step is not None:
            return
        self._first = torch.tensor(step, device=device)
        task.nonfinite_step = step
        if trainer.is_global_zero:
            self.folder.add_facts(nonfinite_step=step)
        what = "loss was" if loss <= weight else "weights were"
        if self.action == "continue":
            log.warning("the %s not finite in optimizer step %d; the run goes on", what, step)
        else:
            raise Diverged(
                f"the {what} not finite in optimizer step {step}; the run is stopped, and records "
                "end before it. Lower task.optimizer.lr or set trainer.gradient_clip_val=1; "
                "task.on_nonfinite=continue goes on, and reports mark the run"
            )


def _are_finite(task: MoETask) -> bool:
    trained = (p.detach() for p in task.parameters() if p.requires_grad)
    # Of sharded and shared ones this rank's: the caller asks all ranks.
    own = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    return all(bool(p.isfinite().all()) for p in own if not is_elsewhere(p))

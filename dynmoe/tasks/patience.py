"""The end of a run that no longer gains."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping


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

"""Two data-parallel processes decide on the sum of their records and stay identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from test_callback import DIM, Model, make_callback, nobody, only_expert_0
from torch.multiprocessing.spawn import ProcessExitedException
from torch.utils.data import DataLoader


class OwnTokens(Model):
    """Rank 0 sees tokens of expert 0 only, rank 1 tokens that nobody serves, then both of both."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        mine = only_expert_0(self.layer) if self.global_rank == 0 else nobody(self.layer)
        both = torch.cat([only_expert_0(self.layer), nobody(self.layer)])
        return DataLoader([mine.detach()] * 2 + [both.detach()] * 4, batch_size=None)


class SaveEachRank(L.Callback):
    def __init__(self, folder: Path, events: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.events = events

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = {"model": pl_module.state_dict(), "events": self.events}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")
        trainer.save_checkpoint(self.folder / "last.ckpt")


def fit_two(folder: Path, max_epochs: int, window: int, ckpt_path: Path | None = None) -> list[Any]:
    """Train on two CPU processes; the state and events of each.

    Now and then a process aborts in gloo's threads ("terminate called without an active
    exception"), at no fault of what is tested: then once more.
    """
    try:
        return _fit_two(folder, max_epochs, window, ckpt_path)
    except ProcessExitedException:
        return _fit_two(folder, max_epochs, window, ckpt_path)


def _fit_two(folder: Path, max_epochs: int, window: int, ckpt_path: Path | None) -> list[Any]:
    events: list[dict[str, Any]] = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="spawn", find_unused_parameters=True),
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            make_callback(events, length=window, period=window),
            SaveEachRank(folder, events),
        ],
    )
    trainer.fit(OwnTokens(), ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.slow
def test_two_processes_stay_identical(tmp_path: Path) -> None:
    ranks = fit_two(tmp_path, max_epochs=1, window=2)
    first = ranks[0]["events"][0]
    # Neither rank could decide this alone: the expert's tokens are on rank 0, the lost on rank 1.
    assert (first["removed"], first["added"], first["tokens"]) == ([1, 2], 1, 16)
    assert len(ranks[0]["events"]) == 3 and not ranks[1]["events"]  # written once
    for name, value in ranks[0]["model"].items():
        assert torch.equal(value, ranks[1]["model"][name]), name
    assert ranks[0]["model"]["backbone.0.router.directions.1"].numel() == DIM


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_a_window(tmp_path: Path) -> None:
    """The checkpoint holds what both ranks have recorded, not twice what rank 0 has."""
    (straight, _) = fit_two(tmp_path, max_epochs=2, window=12)
    fit_two(tmp_path, max_epochs=1, window=12)
    (resumed, _) = fit_two(tmp_path, max_epochs=2, window=12, ckpt_path=tmp_path / "last.ckpt")
    assert resumed["events"] == straight["events"] and len(straight["events"]) == 1

"""A run that was killed between evaluations goes on from the last step it saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_vl import run, stage_folders

from dynmoe.adaptation.callback import DynMoECallback
from dynmoe.tasks.vision_language import VisionLanguage


class Killed(BaseException):
    pass


def test_a_run_goes_on_between_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 0 to 7, one evaluation; killed in step 5, after step 3 was saved: equal weights."""
    settings = ("task.steps=8", "task.eval_every=8", "task.save_every=4", "moe=dynmoe_vl")
    settings += ("moe.adaptation.length=3", "moe.adaptation.period=3")
    straight = run(tmp_path / "straight", *settings)
    step = VisionLanguage.training_step

    def killed(self: VisionLanguage, batch: object, batch_idx: int) -> object:
        moe = self.trainer.callbacks and any(
            isinstance(callback, DynMoECallback) for callback in self.trainer.callbacks
        )
        if moe and self.global_step == 5:
            raise Killed
        return step(self, batch, batch_idx)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(VisionLanguage, "training_step", killed)
        with pytest.raises(Killed):
            run(tmp_path / "killed", *settings)
    (folder,) = stage_folders(tmp_path / "killed")["moe"]
    saved = torch.load(folder.path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 and not folder.read("results")

    run(tmp_path / "killed", *settings)
    one, other = (
        torch.load(each.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for each in (straight, folder)
    )
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [record["step"] for record in folder.read("results")] == [7]
    assert [event["step"] for event in folder.read("events")] == [2, 2, 5, 5]
    test_score = straight.read("results")[0]["test_score"]
    assert folder.read("results")[0]["test_score"] == test_score

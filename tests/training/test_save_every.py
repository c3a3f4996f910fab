"""A run that was killed goes on from the last step it saved, and misses no evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_runs import tiny_config
from tiny_vl import records, run

from dynmoe import job
from dynmoe.layers.moe import moe_layers
from dynmoe.records import RunFolder
from dynmoe.tasks.vl import VisionLanguage

pytestmark = pytest.mark.slow


class Killed(BaseException):
    pass


@contextmanager
def killed(hook: Literal["training_step", "validation_step"], made: int) -> Iterator[None]:
    """The stage moe dies in `hook` when `made` optimizer steps are made."""
    original = getattr(VisionLanguage, hook)

    def dies(self: VisionLanguage, batch: Any, batch_idx: int) -> Any:
        if moe_layers(self.backbone) and self.global_step == made:
            raise Killed
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(VisionLanguage, hook, dies)
        yield


def last(folder: RunFolder) -> dict[str, Any]:
    return torch.load(folder.path / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_between_evaluations(tmp_path: Path, accumulate: int) -> None:
    """Steps 0 to 7, one evaluation; step 3 is saved, step 5 kills it twice: equal weights."""
    settings = (
        *("task.steps=8", "task.eval_every=8", "task.save_every=4", "moe=dynmoe_vl"),
        *("moe.adaptation.length=3", "moe.adaptation.period=3"),
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    folder = run(tmp_path, *settings)
    straight, results = last(folder)["state_dict"], folder.read("results")

    for again in (("overwrite=true",), ()):
        with killed("training_step", made=5):
            run(tmp_path, *settings, *again)
        assert last(folder)["global_step"] == 4 and not folder.read("results")
    run(tmp_path, *settings)

    resumed = last(folder)["state_dict"]
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    assert [record["step"] for record in folder.read("results")] == [7]
    for key in ("scores", "loss", "aux_loss"):
        assert folder.read("results")[0][key] == results[0][key]
    assert 0 < folder.read("results")[0]["step_time"] < 60  # no clock of the machine
    assert [event["step"] for event in folder.read("events")] == [2, 2, 5, 5]


def test_a_run_killed_in_an_evaluation_repeats_it(tmp_path: Path) -> None:
    """Steps 0 to 3, an evaluation and a step to save after every second; killed in each of them."""
    folder = run(tmp_path, "task.save_every=2")
    straight = records(folder)

    with killed("validation_step", made=2):
        run(tmp_path, "task.save_every=2", "overwrite=true")
    with killed("validation_step", made=4):
        run(tmp_path, "task.save_every=2")
    run(tmp_path, "task.save_every=2")

    assert [record["step"] for record in folder.read("results")] == [1, 3]
    assert records(folder) == straight


def test_a_checkpoint_that_lightning_wrote_for_slurm_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would take it under Slurm in a folder without a checkpoint of ours."""
    slurm = {"NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**slurm, "JOB_ID": "1", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder = RunFolder(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of an earlier command")
    job.train(tiny_config("task.steps=1", moe="dense"), folder)
    assert [record["step"] for record in folder.read("results")] == [0]
    assert list(tmp_path.rglob("hpc_ckpt_*")) == [tmp_path / "hpc_ckpt_1.ckpt"]

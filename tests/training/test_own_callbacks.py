"""Callbacks that a user adds to a run: they act, and averages of weights are what is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from test_train import everything
from tiny_runs import Run, tiny_config

from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.training.build import own_callbacks

EMA = "{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"


class Killed(Exception):
    pass


class KillAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class Stopper(EarlyStopping):
    pass


def node(name: str, **options: Any) -> str:
    fields = {"_target_": f"{__name__}.{name}", **options}
    return "{" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}"


@pytest.mark.slow
def test_a_moving_average_is_scored_saved_and_resumed(run: Run, tmp_path: Path) -> None:
    """Nine steps with three updates of experts, killed in the middle of a window."""
    straight = run(f"+trainer.callbacks=[{EMA}]", name="straight")
    saved = torch.load(straight.path / "checkpoints" / "last.ckpt", weights_only=True)
    current, average = saved["current_model_state"], saved["state_dict"]
    pools = [name for name in average if name.endswith("active_E")]
    assert pools and all(torch.equal(average[name], current[name]) for name in pools)
    assert any(not torch.equal(average[name], current[name]) for name in average)

    kill = node("KillAt", step=7)
    with pytest.raises(Killed):
        run(f"+trainer.callbacks=[{EMA},{kill}]", name="killed")
    assert 0 < len(RunFolder(tmp_path / "killed").read("results")) < 3
    again = run(f"+trainer.callbacks=[{EMA}]", name="killed")
    assert everything(again) == everything(straight)


def test_one_callback_needs_no_list() -> None:
    cfg = tiny_config(f"+trainer.callbacks={node('KillAt', step=3)}")
    (callback,) = own_callbacks(cfg)
    assert type(callback).__name__ == "KillAt"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (node("Stopper", monitor="x"), r"Stopper cannot be .*EarlyStopping: .*task\.patience"),
        (node("Path", **{"_args_": "[x]"}), "expected callbacks of Lightning"),
        (node("KillAt"), r"trainer\.callbacks\.0: .*'step'"),
    ],
)
def test_callbacks_that_a_run_cannot_have(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own_callbacks(tiny_config(f"+trainer.callbacks=[{given}]"))

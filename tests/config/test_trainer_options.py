"""Lightning's trainer options are each decided: allowed, or refused with what to use instead."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from dynmoe.config.compose import preflight
from dynmoe.config.trainer import FIXED, FREE, several_devices, trainer_options

SIGNATURE = inspect.signature(Trainer).parameters


def found(**trainer: Any) -> list[str]:
    return list(trainer_options(OmegaConf.create({"trainer": trainer})))


def test_every_option_of_lightning_is_decided() -> None:
    assert not set(FREE) & FIXED.keys()
    assert {*FREE, *FIXED} == set(SIGNATURE)


@pytest.mark.parametrize("key", sorted(SIGNATURE))
def test_options_that_cut_a_run_are_refused_with_what_to_use_instead(key: str) -> None:
    """Given as people give them: one batch, one epoch, half of the data, a switch, a text."""
    values = (1, 2, 0.5, True, "00:01:00", {"hours": 1})
    refused = [text for value in values for text in found(**{key: value})]
    if key in FREE:
        assert not refused
        return
    typed = {(type(value), str(value)) for value in values}
    allowed = typed & {(type(value), str(value)) for value in FIXED[key].values}
    assert len(refused) == len(values) - len(allowed)
    assert all(text.startswith(f"trainer.{key}: expected ") for text in refused)
    assert all(text.endswith(FIXED[key].instead) for text in refused)
    assert not found(**{key: None})


def test_one_is_one_batch_and_one_point_zero_is_all() -> None:
    assert found(limit_val_batches=1) and not found(limit_val_batches=1.0)
    assert found(limit_val_batches=0) and found(limit_val_batches=0.0)


def test_an_option_that_nobody_decided_is_refused() -> None:
    assert found(new_in_lightning=3) == [
        "trainer.new_in_lightning: not known to keep a run's records right. Leave it out"
    ]


def test_the_command_is_refused() -> None:
    options = ("+trainer.limit_val_batches=1", "trainer.max_epochs=1")
    val, epochs = preflight(("task=vit_domainbed", *options)).problems
    assert val.startswith("trainer.limit_val_batches: ") or epochs.startswith("trainer.limit_val")
    assert "task.steps=N" in val + epochs and "task.eval_every=N" in val + epochs


DDP = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "find_unused_parameters": True}


@pytest.mark.parametrize(
    ("trainer", "moe", "message"),
    [
        ({"devices": 1, "strategy": "auto"}, "every_two", None),
        ({"devices": "auto", "strategy": "auto"}, "every_two", None),  # only the machine can tell
        ({"devices": 2, "strategy": DDP}, "every_two", None),
        ({"devices": 2, "strategy": "ddp"}, "none", None),
        ({"devices": 2, "strategy": "ddp_find_unused_parameters_true"}, "every_two", None),
        ({"devices": 2, "strategy": "auto"}, "every_two", "trainer=ddp"),
        ({"devices": "2", "strategy": "auto"}, "none", "trainer=ddp"),
        ({"devices": [0, 1], "strategy": "auto"}, "every_two", "trainer=ddp"),
        ({"devices": "0,1", "strategy": "auto"}, "every_two", "trainer=ddp"),
        ({"devices": 1, "num_nodes": 2, "strategy": "auto"}, "every_two", "trainer=ddp"),
        ({"devices": 2, "strategy": "ddp"}, "every_two", "find_unused_parameters=true"),
        (
            {"devices": 2, "strategy": {**DDP, "find_unused_parameters": False}},
            [1],
            "find_unused_parameters=true",
        ),
    ],
)
def test_several_devices_need_a_strategy(
    trainer: dict[str, Any], moe: Any, message: str | None
) -> None:
    cfg = OmegaConf.create({"trainer": trainer, "moe": {"layers": moe}})
    texts = list(several_devices(cfg))
    assert len(texts) == (message is not None)
    assert all(str(message) in text for text in texts)

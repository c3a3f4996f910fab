"""`${recipe:key}` reads the protocol for the chosen data set, or DomainBed's random draw."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from dynmoe.config import runs
from dynmoe.config.runs import sha8
from dynmoe.seeding import sample_hparams


def config(dataset: str = "PACS", hparams_seed: int = 0) -> DictConfig:
    runs.register()
    return OmegaConf.create(
        {
            "data": {"name": dataset},
            "hparams_seed": hparams_seed,
            "trial_seed": 1,
            "protocol": {
                "name": "test",
                "defaults": {"steps": 5001, "batch_size": 32, "lr": 5e-5, "weight_decay": 0.0},
                "datasets": {"DomainNet": {"steps": 15001}, "VLCS": None},
            },
            "steps": "${recipe:steps}",
            "lr": "${recipe:lr}",
            "weight_decay": "${recipe:weight_decay}",
            "batch_size": "${recipe:batch_size}",
            "wrong": "${recipe:batchsize}",
        }
    )


def test_a_data_set_without_an_entry_takes_the_defaults() -> None:
    assert (config().steps, config().lr) == (5001, 5e-5)
    assert config("VLCS").steps == 5001


def test_an_entry_changes_only_what_it_names() -> None:
    assert (config("DomainNet").steps, config("DomainNet").lr) == (15001, 5e-5)


def test_a_draw_replaces_what_domainbed_draws_and_nothing_else() -> None:
    cfg, drawn = config(hparams_seed=2), sample_hparams("PACS", 2, 1)
    for key in ("lr", "batch_size", "weight_decay"):
        assert cfg[key] == drawn[key]
    assert cfg.steps == 5001


def test_an_unknown_key_names_those_that_exist() -> None:
    message = "protocol test has no 'batchsize'; it has batch_size, lr, steps, weight_decay"
    with pytest.raises(InterpolationResolutionError, match=message):
        _ = config().wrong


def test_sha8_is_the_head_of_sha256() -> None:
    assert sha8("") == "e3b0c442"

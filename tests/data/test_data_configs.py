"""The recipes of the shipped protocols."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dynmoe.config.options import own

CONF = Path(__file__).parents[2] / "conf"
DATA_SETS = sorted(path.stem for path in (CONF / "data").glob("[!_]*.yaml"))
PROTOCOLS = ("domainbed", "domainbed_2020", "gmoe", "swad")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        yield


def recipe(protocol: str, dataset: str) -> tuple[float, ...]:
    node = compose(overrides=[f"+protocol={protocol}"]).protocol
    merged = OmegaConf.merge(node.defaults, node.datasets.get(dataset, {}))
    assert isinstance(merged, DictConfig)
    keys = ("steps", "eval_every", "batch_size", "lr", "weight_decay")
    assert sorted(merged) == sorted(keys)
    return tuple(merged[key] for key in keys)


@pytest.mark.parametrize(
    ("protocol", "dataset", "expected"),
    [
        ("domainbed", "PACS", (5001, 300, 32, 5e-5, 0.0)),
        ("domainbed", "DomainNet", (5001, 1000, 32, 5e-5, 0.0)),
        ("domainbed", "RotatedMNIST", (5001, 100, 64, 1e-3, 0.0)),
        ("domainbed_2020", "DomainNet", (5001, 1000, 32, 5e-5, 0.0)),
        ("swad", "VLCS", (5001, 200, 32, 5e-5, 0.0)),
        ("swad", "DomainNet", (15001, 1000, 32, 5e-5, 0.0)),
        ("gmoe", "PACS", (5001, 300, 32, 3e-5, 1e-6)),
        ("gmoe", "VLCS", (5001, 300, 32, 3e-5, 1e-6)),
        ("gmoe", "OfficeHome", (5001, 300, 32, 1e-5, 1e-6)),
        ("gmoe", "TerraIncognita", (5001, 300, 32, 5e-5, 1e-4)),
        ("gmoe", "DomainNet", (15001, 500, 32, 5e-5, 0.0)),
        ("gmoe", "MyOwn", (5001, 300, 32, 3e-5, 0.0)),
        *[(protocol, "RotatedDigits", (501, 50, 32, 1e-3, 1e-4)) for protocol in PROTOCOLS],
        *[(protocol, "ColoredDigits", (501, 50, 32, 1e-3, 1e-4)) for protocol in PROTOCOLS],
    ],
)
def test_recipes(protocol: str, dataset: str, expected: tuple[float, ...]) -> None:
    assert recipe(protocol, dataset) == expected


def test_only_swad_evaluates_on_plain_images() -> None:
    nodes = {name: compose(overrides=[f"+protocol={name}"]).protocol for name in PROTOCOLS}
    assert [name for name, node in nodes.items() if not node.augment_eval] == ["swad"]
    assert all(node.name == name and node.holdout_fraction == 0.2 for name, node in nodes.items())


def test_every_data_set_of_the_protocols_is_shipped() -> None:
    named = {own("data", data).name for data in DATA_SETS}
    recipes = {
        name
        for protocol in PROTOCOLS
        for name in compose(overrides=[f"+protocol={protocol}"]).protocol.datasets
    }
    assert recipes <= named

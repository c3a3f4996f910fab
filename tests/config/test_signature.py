"""Signatures read from source agree with Python's own, and nothing is imported on the way."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException as HydraMissing
from omegaconf import DictConfig

from dynmoe.config.targets import TargetError, class_attribute, signature

CORE = """
from dataclasses import dataclass
from typing import ClassVar

raise RuntimeError("this module must never be imported")

modality = "sound"

class Base:
    modality: ClassVar[str] = "image"
    def __init__(self, width: int, *, depth: int = 2): ...

class Child(Base):
    @classmethod
    def load(cls, path: str): ...

class Open(Base):
    modality = "text"
    def __init__(self, name, **kwargs): ...

@dataclass
class Point:
    x: int
    y: float = 0.0

@dataclass
class Point3(Point):
    z: float = 0.0

@dataclass(eq=False)
class Fields(Base):
    height: int

def build(a, b: bool = True, /, c="c"): ...

Alias = Child
value = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    root = tmp_path / "readonly_pkg"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("from .core import Child as Kid\nfrom .gone import Lost\n")
    (root / "core.py").write_text(CORE)
    (root / "inner" / "__init__.py").write_text("from ..core import *\nfrom ..core import build\n")
    (root / "lazy.py").write_text("def __getattr__(name): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield root.name
    assert root.name not in sys.modules


@pytest.mark.parametrize(
    ("target", "names", "is_open"),
    [
        ("core.Base", ["width", "depth"], False),
        ("core.Child", ["width", "depth"], False),
        ("Kid", ["width", "depth"], False),
        ("core.Alias", ["width", "depth"], False),
        ("core.Child.load", ["path"], False),
        ("core.Open", ["name"], True),
        ("core.Point3", ["x", "y", "z"], False),
        ("core.Fields", ["height"], False),
        ("core.build", ["a", "b", "c"], False),
        ("inner.build", ["a", "b", "c"], False),
    ],
)
def test_parameters(package: str, target: str, names: list[str], is_open: bool) -> None:
    found = signature(f"{package}.{target}")
    assert found is not None
    assert (list(found.parameters), found.open) == (names, is_open)


def test_annotations_and_defaults(package: str) -> None:
    found = signature(f"{package}.core.Base")
    assert found is not None
    assert found.parameters["width"].annotation == "int"
    assert [p.has_default for p in found.parameters.values()] == [False, True]


@pytest.mark.parametrize("target", ["core.value", "inner.Base", "lazy.Anything", "Lost"])
def test_what_only_python_can_tell_is_left_unchecked(package: str, target: str) -> None:
    assert signature(f"{package}.{target}") is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("core.Bas", "readonly_pkg.core has no 'Bas'. Did you mean 'Base'?"),
        ("cor.Base", "readonly_pkg has no 'cor'. Did you mean 'core'?"),
        ("core", "'readonly_pkg.core' is a module, not a class or function"),
        ("core.Base.fit", "readonly_pkg.core.Base has no 'fit'."),
    ],
)
def test_a_target_that_does_not_exist(package: str, target: str, message: str) -> None:
    with pytest.raises(TargetError) as error:
        signature(f"{package}.{target}")
    assert str(error.value) == message


def test_a_lazy_package_knows_its_names() -> None:
    """Names that dynmoe.lazy imports late are no open set."""
    assert signature("dynmoe.data.GlueData") is not None
    with pytest.raises(TargetError, match="Did you mean 'GlueData'"):
        signature("dynmoe.data.GluData")
    with pytest.raises(TargetError, match="has no 'module'"):
        signature("dynmoe.data.module.DomainData")


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(TargetError, match="no package 'no_such_package' is installed"):
        signature("no_such_package.Thing")


def test_a_target_without_a_dot() -> None:
    with pytest.raises(TargetError, match="'Adam' is not a dotted path"):
        signature("Adam")


@pytest.mark.parametrize(
    ("target", "attribute"),
    [("Base", "image"), ("Child", "image"), ("Open", "text"), ("build", "sound"), ("Point", None)],
)
def test_class_attribute(package: str, target: str, attribute: str | None) -> None:
    assert class_attribute(f"{package}.core.{target}", "modality") == attribute


@pytest.mark.parametrize("cls", [DictConfig, HydraMissing, argparse.ArgumentParser])
def test_signatures_agree_with_inspect(cls: type) -> None:
    found = signature(f"{cls.__module__}.{cls.__qualname__}")
    assert found is not None
    expected = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    assert list(found.parameters) == expected


@pytest.mark.parametrize(
    ("target", "some"),
    [
        ("torch.optim.Adam", {"params", "lr", "weight_decay"}),
        ("lightning.pytorch.Trainer", {"max_steps", "devices", "precision"}),
        ("lightning.pytorch.loggers.CSVLogger", {"save_dir", "name", "version"}),
    ],
)
def test_heavy_packages_are_read_without_loading_them(target: str, some: set[str]) -> None:
    loaded = set(sys.modules)
    found = signature(target)
    assert found is not None
    assert some <= set(found.parameters)
    assert not found.open
    assert set(sys.modules) - loaded <= {target.split(".")[0]}


def test_builtins_have_no_source() -> None:
    assert signature("builtins.dict") is None
    assert signature("math.sqrt") is None

"""A finished run as files for other software: the checks of the command, and the writing.

PyTorch is imported by the functions that need it: a wrong command is refused at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from dynmoe.config.mixing import MIX
from dynmoe.config.options import modality
from dynmoe.config.trust import KEY, packages
from dynmoe.convert.checkpoints import share, write
from dynmoe.errors import ConfigError, UserError
from dynmoe.records import RunFolder
from dynmoe.training import trained
from dynmoe.version import version

NOTE = "export.json"
"""Marks a folder that this command wrote, and says of what."""


class Format(NamedTuple):
    """One form of an export."""

    modalities: tuple[str, ...]
    """Of the runs that it is for. The first format of a modality is its default."""
    module: str = ""
    """In this folder; its ``write(model, folder)`` returns the largest relative difference."""
    packages: tuple[str, ...] = ()
    """Those of the extra that is called like the format."""


FORMATS = {
    "transformers": Format(("text", "text-stream"), "transformers_folder"),
    "onnx": Format(("image",), "onnx_file", ("onnx", "onnxruntime", "onnxscript")),
    "llava": Format(("vision-language",)),
}

TOLERANCE = 1e-4
"""Difference of logits, relative to the largest one from 1 on, from which an export has failed."""


class Order(NamedTuple):
    """A checked command."""

    format: str
    folder: RunFolder
    cfg: DictConfig
    checkpoint: Path
    target: Path


def order(given: Mapping[str, str]) -> Order:
    """Check a command before any work.

    Raises:
        ConfigError: no finished run, a format that is not for it or whose packages are missing, or
            a target that must not be replaced.
    """
    folder = RunFolder(Path(given["run"]).expanduser())
    cfg = trained.configuration(folder, packages(given.get(KEY, "")))
    kind = modality(cfg, "data")
    fitting = [name for name, each in FORMATS.items() if kind in each.modalities]
    chosen = given.get("format") or next(iter(fitting), "")
    if chosen not in fitting:
        if not fitting:
            raise ConfigError(f"run={given['run']}: there is no format for {kind} runs yet")
        known = f"not for {kind} runs" if chosen in FORMATS else "unknown"
        raise ConfigError(f"format={chosen}: {known}, expected {' or '.join(fitting)}")
    if chosen != "llava":
        if missing := [name for name in FORMATS[chosen].packages if find_spec(name) is None]:
            raise ConfigError(
                f"format={chosen}: needs the package{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)}: pip install 'dynmoe[{chosen}]'"
            )
        if not folder.is_done:
            raise ConfigError(
                f"run={given['run']}: expected a finished run, found one that is {folder.state}. "
                "The command that started it goes on"
            )
        check_router(cfg, chosen)
        _check_heads(cfg, chosen)
    for key in ("backbone.path", "data.root"):
        if key in given:
            _override(cfg, key, given[key])
    default = "last" if chosen == "llava" else "selected"
    checkpoint = trained.given_checkpoint(folder, given.get("checkpoint", default))
    target = Path(given["to"]).expanduser().resolve()
    if chosen != "llava":
        _check_target(target, folder, given)
    return Order(chosen, folder, cfg, checkpoint, target)


OURS = "dynmoe.layers."
WRITTEN = ("TopAnyRouter", "TopKRouter", "CosineTopKRouter", "AverageKeyRouter")
"""Routers that the code of transformers' folders knows (``stacked.py``)."""
NO_GRAPH = ("PrefixRouter", "UniFRouter", "ExpertChoiceRouter", "SoftSlots")
"""Routers that ONNX has no operations for, or whose experts choose among the tokens of a batch."""


def check_router(cfg: DictConfig, chosen: str) -> None:
    """Refuse a router that the format cannot have, before the run is loaded.

    Raises:
        ConfigError: not known there, a capacity, or ``combine=tutel``.
    """
    router = cfg.moe.get("router") or {}
    target = str(router.get("_target_", ""))
    name = target.removeprefix(OURS)
    unknown = name not in WRITTEN if chosen == "transformers" else name in NO_GRAPH
    if target.startswith(OURS) and unknown:
        raise ConfigError(
            f"format={chosen}: cannot have this run's router, {name}. "
            + (f"It has {', '.join(WRITTEN)}; " if chosen == "transformers" else "")
            + "dynmoe-eval reads every run"
        )
    for option, found, good in (
        ("capacity_factor", router.get("capacity_factor") is not None, "null"),
        ("combine", router.get("combine") == "tutel", "constant_k"),
    ):
        if found:
            raise ConfigError(
                f"run: its moe.router.{option}={router[option]} makes the output of a token depend "
                f"on the others of its batch, which no other software computes. Train with "
                f"moe.router.{option}={good}"
            )


def _check_heads(cfg: DictConfig, chosen: str) -> None:
    """Refuse a model with a head for each of several tasks.

    Raises:
        ConfigError: it has them.
    """
    if str(cfg.data._target_).endswith(MIX):
        tasks = ", ".join(cfg.data.tasks)
        raise ConfigError(
            f"format={chosen}: this run on {cfg.data.name} has a head for each task ({tasks}), "
            f"which no class of transformers has. Train on one, e.g. data={cfg.data.tasks[0]}; "
            "dynmoe-eval reads every run"
        )


def _override(cfg: DictConfig, key: str, value: str) -> None:
    node, _, leaf = key.partition(".")
    if leaf not in cfg[node]:
        raise ConfigError(f"{key}: this run on {cfg.data.name} has no such key")
    cfg[node][leaf] = value
    if key == "backbone.path":
        cfg.data.tokenizer_path = value
    elif "root" in cfg.data.get("environments", {}):  # the saved configuration is resolved
        cfg.data.environments.root = value


def _check_target(target: Path, folder: RunFolder, given: Mapping[str, str]) -> None:
    place = f"to={given['to']}"
    if target in (folder.path.resolve(), *folder.path.resolve().parents):
        raise ConfigError(f"{place}: holds the run itself. Name another folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{place}: expected a folder, found a file. Name another one")
    if not any(target.iterdir()):
        return
    if not (target / NOTE).is_file():
        raise ConfigError(
            f"{place}: holds files that dynmoe-convert did not write. Name a new folder"
        )
    if given.get("overwrite") != "true":
        raise ConfigError(f"{place}: exists already; pass overwrite=true to replace the folder")


def export(given: Mapping[str, str]) -> Path:
    """Write the export of a run, compare it with the run's model, and say how they differ.

    Returns:
        The folder.

    Raises:
        ConfigError: see ``order``; a model that the format cannot express.
        UserError: the written model computes something else.
    """
    wanted = order(given)
    if wanted.format == "llava":
        from dynmoe.convert.checkpoints import to_official

        return to_official(given)[0].parent
    from dynmoe.convert.runs import trained_model

    print(f"reading {wanted.checkpoint}", flush=True)
    model = trained_model(wanted.cfg, wanted.folder, wanted.checkpoint)
    writer = import_module(f"dynmoe.convert.{FORMATS[wanted.format].module}")
    with new_folder(wanted.target) as folder:
        print(f"writing {wanted.target}", flush=True)
        difference = writer.write(model, folder)
        if not difference <= TOLERANCE:
            raise UserError(
                f"format={wanted.format}: the written model's logits differ from the run's by "
                f"{difference:.1e} of their size, expected {TOLERANCE:g} at most. Nothing was kept"
            )
        note = {
            "format": wanted.format,
            "run": wanted.folder.path.name,
            "checkpoint": wanted.checkpoint.name,
            "step": model.step,
            "dynmoe": version(),
            "largest_difference": difference,
        }
        write(folder / NOTE, json.dumps(note, indent=2) + "\n")
        for file in folder.rglob("*"):
            if file.is_file():
                share(file)
    experts = ", ".join(map(str, model.num_experts.values())) or "no"
    print(f"{experts} experts in the MoE layers; logits differ by {difference:.1e} at most")
    files = sorted(wanted.target.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{wanted.target}, {size / 1e6:,.1f} MB: {', '.join(file.name for file in files)}")
    return wanted.target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside the target, which takes the target's place if all goes well.

    Raises:
        ConfigError: it cannot be made.
    """
    part, old = (target.with_name(f".{target.name}.{kind}") for kind in ("part", "old"))
    for left in (part, old):  # by a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"to={target}: cannot be made ({error.strerror}). Name another folder"
        ) from error
    try:
        yield part
        if target.exists():
            target.replace(old)
        part.replace(target)
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)

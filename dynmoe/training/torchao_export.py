"""A run's model with weights that torchao keeps in 8 or 4 bits, and its kernels compute with.

torchao rounds the weights itself. A layer whose weights are no plain tensors is called as a module
(``layers.ffn``), so that experts are too.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dynmoe.errors import ConfigError
from dynmoe.records import Record, RunFolder
from dynmoe.training.bits import Place
from dynmoe.training.calibrate import Inputs

WEIGHTS, ABOUT = "weights.pt", "about.json"
ROUNDS = 5
"""Passes whose median time is the speed."""


class Format(NamedTuple):
    module: str
    config: str
    """Its configuration in torchao."""
    groups: tuple[int, ...]
    """Sizes of groups of input columns that it may have; empty: a scale for each row."""
    dtype: torch.dtype
    """Of all other weights."""
    trainer: dict[str, Any]
    """Options of the trainer that evaluates it."""


FORMATS = {
    "int8": Format("torchao.quantization", "Int8WeightOnlyConfig", (), torch.float32, {}),
    # NOTE: torchao's stable 4 bits need a GPU and the package mslk. These are packed for CPUs; with
    # fp32 inputs their kernel takes a hundred times as long, so all else is bf16.
    "int4": Format(
        "torchao.prototype.quantization.int4",
        "PrototypeInt4WeightOnlyConfig",
        (128, 64, 32),
        torch.bfloat16,
        {"precision": "bf16-mixed", "accelerator": "cpu"},
    ),
}


def check(formats: Sequence[str]) -> None:
    """Check that torchao has these formats.

    Raises:
        ConfigError: it is not installed, or has no such format.
    """
    for name in formats:
        if find_spec("torchao") is None:
            raise ConfigError(
                f"quant.export={name}: needs the package torchao: pip install -e '.[torchao]', or "
                "leave quant.export out"
            )
        form = FORMATS[name]
        try:
            getattr(import_module(form.module), form.config)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"quant.export={name}: torchao {version('torchao')} has no {form.config} in "
                f"{form.module}, where 0.18 has it. Install torchao==0.18.0, or choose "
                "quant.export=int8"
            ) from error


def export(
    folder: RunFolder,
    checkpoint: Path,
    backbone: nn.Module,
    places: Sequence[Place],
    name: str,
    batches: Sequence[Inputs],
) -> tuple[nn.Module, Record]:
    """Write ``quantized/<format>/`` with the weights of the model in a format of torchao.

    ``backbone``: deployed, in evaluation mode; it stays as it is.

    Returns:
        The model, and the entries of a record: sizes of the files and measured speed, of the model
        in fp32 too.
    """
    form = FORMATS[name]
    model = copy.deepcopy(backbone).to(form.dtype)
    layers = {place.name for place in places if not place.is_transposed}
    in_groups = {place.name: _group(place, form) for place in places if place.name in layers}
    left_out = [n for n, group in in_groups.items() if group is None] + [
        place.name for place in places if place.is_transposed
    ]
    _quantize(model, form, in_groups)
    out = folder.path / "quantized" / name
    out.mkdir(parents=True, exist_ok=True)
    size = _saved(model, out / WEIGHTS)
    before = out / "fp32.pt"
    fp32_size = _saved(backbone, before)
    before.unlink()
    speeds = _speeds([(backbone, torch.float32), (model, form.dtype)], batches[:2])
    about = {
        "method": f"torchao {name}",
        "torchao": version("torchao"),
        "groups": sorted({group for group in in_groups.values() if group}),
        "left_out": left_out,
        "bytes": size,
        "fp32_bytes": fp32_size,
        "samples_per_s": speeds[1],
        "fp32_samples_per_s": speeds[0],
        "threads": torch.get_num_threads(),
    }
    described = {**about, "format": name, "checkpoint": str(checkpoint), "layers": sorted(layers)}
    (out / ABOUT).write_text(json.dumps(described, indent=1) + "\n")
    return model, about


def _group(place: Place, form: Format) -> int | None:
    """The largest size of groups that divides the inputs; 0 for rows, None for none."""
    if not form.groups:
        return 0
    inputs = place.weight_OI.shape[1]
    return next((size for size in form.groups if inputs % size == 0), None)


def _quantize(model: nn.Module, form: Format, in_groups: dict[str, int | None]) -> None:
    from torchao.quantization import quantize_

    config = getattr(import_module(form.module), form.config)
    for size in {group for group in in_groups.values() if group is not None}:
        chosen = {name for name, group in in_groups.items() if group == size}
        made = config(group_size=size) if size else config()
        quantize_(model, made, filter_fn=lambda module, name, chosen=chosen: name in chosen)


def _saved(model: nn.Module, file: Path) -> int:
    torch.save(model.state_dict(), file)
    return file.stat().st_size


@torch.no_grad()
def _speeds(
    models: Sequence[tuple[nn.Module, torch.dtype]], batches: Sequence[Inputs]
) -> list[float]:
    """Samples per second of each model, in turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS + 1):
        for (model, dtype), own in zip(models, times, strict=True):
            start = time.perf_counter()
            for batch in batches:
                with _autocast(batch, dtype):
                    model(*batch)
            own.append(time.perf_counter() - start)
    samples = sum(len(tree_leaves(batch)[0]) for batch in batches)
    return [round(samples / statistics.median(own[1:]), 2) for own in times]


def _autocast(batch: Inputs, dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(tree_leaves(batch)[0].device.type, dtype)


def load(run: str | Path, name: str, targets: Sequence[str] = ()) -> nn.Module:
    """Return the exported model of a run, in evaluation mode. Its own checkpoint must be there.

    ``targets``: packages whose code the run's configuration may call beside dynmoe's, PyTorch's and
    Lightning's, as ``dynmoe-eval targets=``.

    Raises:
        ConfigError: the run has no such export, its configuration calls other code, or torchao is
            missing.
    """
    from dynmoe.training import build, trained
    from dynmoe.training.quantize import deploy

    folder = RunFolder(Path(run))
    out = folder.path / "quantized" / name
    try:
        checkpoint = Path(json.loads((out / ABOUT).read_text())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{out}: expected an export. Write it: dynmoe-eval run={run} mode=quantize "
            f"quant.export={name}"
        ) from None
    check([name])
    cfg = trained.configuration(folder, targets)
    settings = build.settle_runtime(cfg)
    data = build.build_data(cfg)
    data.restore(folder.path)
    data.setup("validate")
    task, _ = build.load(cfg, data, settings["fused_attention"], checkpoint)
    deploy(task)
    model: nn.Module = task.backbone.to(FORMATS[name].dtype).eval()
    import torchao.quantization  # noqa: F401  (its tensors may be read then)

    state = torch.load(out / WEIGHTS, weights_only=True)
    model.load_state_dict(state, assign=True)
    return model

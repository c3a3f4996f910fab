"""A trained run with quantised weights, without training: scores over average bits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from dynmoe.backbones.deploy import compact_layers, merge_adapters
from dynmoe.config.quantize import Quantisation, batches_of, exports_of, quantisations_of
from dynmoe.errors import DataError
from dynmoe.layers import Router
from dynmoe.layers.moe import moe_layers
from dynmoe.records import Record, RunFolder
from dynmoe.report.drawing import save
from dynmoe.report.evaluations import newest, title_of
from dynmoe.report.quantize import FP32, draw_quantisations, quantize_table, subject_of
from dynmoe.report.tables import to_rich
from dynmoe.training import build, torchao_export
from dynmoe.training.bits import Place, average_bits, bit_map, places_in
from dynmoe.training.block_scores import look
from dynmoe.training.calibrate import Done, Inputs, calibrate, round_all, rounding_of
from dynmoe.training.evaluate import judged, loaded, reported_by
from dynmoe.training.mixing import connect


def quantize(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> list[Record]:
    """Evaluate the run as it is, with every quantisation that was asked for, and every export.

    Writes ``quantized/<format>/``, adds to ``quantize.jsonl``, draws it (``figures/quantize.png``)
    and prints its table.

    Returns:
        The new lines of ``quantize.jsonl``, the run's own weights first.

    Raises:
        ConfigError: a policy for modules that the model does not have, or an export without
            torchao.
    """
    wanted, formats = quantisations_of(cfg), exports_of(cfg)
    torchao_export.check(formats)
    reported = reported_by(folder)
    data, task, step, trainer = loaded(folder, checkpoint, cfg)
    deploy(task)
    backbone, device = task.backbone, trainer.strategy.root_device
    places = places_in(backbone)
    connect(cfg, data, backbone)
    batches = calibration_batches(data, batches_of(cfg), trainer)
    task.eval().to(device)
    seen = look(backbone, places, batches, wanted)
    # Before anything is evaluated: a map may be refused.
    maps = [bit_map(places, how, seen) for how in wanted]
    records: list[Record] = []

    def evaluated(about: Record, by: Any = trainer) -> None:
        data.repeat_evaluation_of(step)
        by.validate(task, datamodule=data, verbose=False)
        weights = {"step": step, "checkpoint": checkpoint.name, "data_hash": data.data_hash}
        record = {**weights, **about, **judged(task, reported)}
        records.append(record)
        folder.append("quantize", record)

    folder.mend("quantize")
    evaluated({"method": FP32})
    for name in formats:  # of the weights as they are: torchao rounds them itself
        exported, about = torchao_export.export(folder, checkpoint, backbone, places, name, batches)
        with _in_place_of(task, exported):
            evaluated(about, trainer_for(cfg, folder, name))
    with unquantised(places if len(wanted) > 1 else (), folder.path) as restore:
        for how, bits in zip(wanted, maps, strict=True):
            restore()
            task.eval().to(device)
            start = time.perf_counter()
            done = _quantised(backbone, batches, bits, how)
            seconds = time.perf_counter() - start
            how_done = described(places, how, bits, done, len(batches))
            evaluated({**how_done, "seconds": round(seconds, 2)})
            _tell(done)
    known = newest(folder.read("quantize"), subject_of)
    title = title_of(folder.path.name, known)
    Console().print(to_rich(quantize_table(known, title)))
    print(save(draw_quantisations(known, title), folder.path / "figures" / "quantize.png"))
    return records


def trainer_for(cfg: DictConfig, folder: RunFolder, name: str) -> Any:
    """A trainer that evaluates a model of this format."""
    cfg = OmegaConf.merge(cfg, {"trainer": torchao_export.FORMATS[name].trainer})  # type: ignore
    return build.build_trainer(cfg, [], folder, max_steps=1)


@contextmanager
def _in_place_of(task: Any, model: nn.Module) -> Iterator[None]:
    own, task.backbone = task.backbone, model
    task.routing.watch(model)
    try:
        yield
    finally:
        task.backbone = own
        task.routing.watch(own)


def deploy(task: Any) -> None:
    """Merge adapters, drop empty slots, and keep the keys of routers that read experts' weights."""
    backbone: nn.Module = task.backbone
    merge_adapters(backbone)
    compact_layers(backbone)
    for layer in moe_layers(backbone).values():
        if type(layer.router).prepare is not Router.prepare:
            layer.experts.fix_keys()
    task.routing.watch(backbone)


def calibration_batches(data: Any, number: int, trainer: Any) -> list[Inputs]:
    """Return the backbone's inputs of the first training batches, on the trainer's device.

    Raises:
        DataError: there are none.
    """
    found: list[Inputs] = []
    step = 0
    while len(found) < number and step < data.plan.steps:
        data.repeat_evaluation_of(step - 1)
        for batch in data.train_dataloader():
            found.append(trainer.strategy.batch_to_device(batch).inputs)
            if len(found) == number:
                break
        step = data.plan.next_evaluated(step) + 1
    if not found:
        raise DataError("mode=quantize: found no training batch to calibrate with")
    return found


@contextmanager
def unquantised(places: Sequence[Place], folder: Path) -> Iterator[Callable[[], None]]:
    """Give a function that writes the weights of now back. They wait in a file below ``folder``: a
    model fits into memory once, not always twice."""
    with TemporaryDirectory(dir=folder, prefix=".quantize") as own:
        file = Path(own, "weights.pt")
        torch.save([place.weight_OI for place in places], file)

        def restore() -> None:
            # NOTE: a mapped file ends with its last tensor, so that its pages are not kept.
            weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for place, weight_OI in zip(places, weights, strict=True):
                place.weight_OI.copy_(weight_OI)

        yield restore


def _quantised(
    backbone: nn.Module, batches: Sequence[Inputs], bits: Mapping[str, int], how: Quantisation
) -> Done:
    if how.method == "rtn":
        return round_all(backbone, bits, how)
    console = Console(stderr=True)
    if not console.is_interactive:
        return calibrate(backbone, batches, bits, how)
    with console.status("calibrating") as status:

        def progress(block: int, blocks: int) -> None:
            status.update(f"{block} of {blocks} blocks quantised")

        return calibrate(backbone, batches, bits, how, progress)


def described(
    places: Sequence[Place],
    how: Quantisation,
    bits: Mapping[str, int],
    done: Done,
    batches: int,
) -> Record:
    """The entries of a record that say how the weights were quantised."""
    shapes = {place.name: (*place.weight_OI.shape,) for place in places}
    mean, with_grids = average_bits(shapes, bits, rounding_of(how, how.default))
    errors = list(done.errors.values())
    error, rtn_error = (
        [sum(each) / len(errors) for each in zip(*errors, strict=True)] if errors else (None, None)
    )
    kinds: dict[str, Counter[int]] = {}
    for place in places:
        kinds.setdefault(place.kind, Counter())[bits[place.name]] += 1
    return {
        "method": how.method,
        "options": how.options() | ({} if how.method == "rtn" else {"calib.batches": batches}),
        "average_bits": mean,
        "average_bits_with_grids": with_grids,
        "layers_by_kind": {kind: dict(counts) for kind, counts in kinds.items()},
        "bits": dict(bits),
        "fallback": done.fallback,
        "kept_rtn": done.kept_rtn,
        "output_error": error,
        "rtn_output_error": rtn_error,
    }


def _tell(done: Done) -> None:
    if done.fallback:
        print(
            f"{len(done.fallback)} layers saw no calibration data and were rounded to nearest "
            f"(quant.calib.batches=... takes more): {', '.join(done.fallback)}"
        )

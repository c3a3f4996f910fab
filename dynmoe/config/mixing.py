"""Rules of `mixing` and of the data of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from dynmoe.config.environments import environment_names, test_indices
from dynmoe.config.models import moe_layers
from dynmoe.config.options import modality, read
from dynmoe.config.targets import did_you_mean
from dynmoe.data.text.tasks import TASKS

MIX = ".GlueMixData"

# Keys that only some rules read.
OWN_KEYS = {
    "metric": ("dynamic",),
    "aggregate": ("dynamic",),
    "layers": ("dynamic",),
    "eta": ("dynamic", "ref_loss"),
    "c": ("dynamic", "ref_loss"),
    "reference": ("ref_loss",),
    "weights": ("dynamic", "ref_loss", "random", "fixed"),
}
# Functions of conversations (dynmoe/data/vl/content.py) that all come from one place.
ONE_SOURCE = ("easy_vqa", "vqa", "science_qa")
NEEDED = {"weights": "fixed", "reference": "ref_loss"}
MOVING = ("dynamic", "ref_loss", "random")


def mixing_fits(cfg: DictConfig) -> Iterator[str]:
    """Weights of sources need sources, and what moves them."""
    rule = read(cfg, "mixing.rule", str)
    if rule is None:
        return
    node = read(cfg, "mixing", dict) or {}
    every = node.get("every")
    for key in node.keys() & OWN_KEYS.keys():
        if rule not in OWN_KEYS[key]:
            yield f"mixing.{key}: mixing={rule} has no use for it. Leave it out"
    if rule in MOVING and every is None:
        yield f"mixing.every: mixing={rule} moves the weights after probes. Set it, e.g. to 100"
    yield from _compared_layers(cfg, node.get("layers"))
    yield from _experts_to_compare(cfg, rule)
    yield from _sources(cfg, rule)
    yield from _by_source(node)
    if every is not None and any(word in _strategy(cfg) for word in ("fsdp", "expertparallel")):
        yield "mixing: probes need whole weights on each device. Choose trainer=ddp, or one device"


def _compared_layers(cfg: DictConfig, layers: object) -> Iterator[str]:
    if layers == []:
        yield "mixing.layers: expected one MoE layer or more, found none. Set [-1] for the last"
    count, given = moe_layers(cfg), layers if isinstance(layers, list) else []
    if count and any(type(each) is int and not -count <= each < count for each in given):
        yield outside(count, given)


def outside(count: int, layers: Sequence[int]) -> str:
    """Say that `mixing.layers` names MoE layers that are not there."""
    return (
        f"mixing.layers: expected indices of {count} MoE layers, from {-count} to {count - 1}, "
        f"found {list(layers)}. Set [-1] for the last"
    )


def _strategy(cfg: DictConfig) -> str:
    node = read(cfg, "trainer.strategy._target_", str) or read(cfg, "trainer.strategy", str) or ""
    return node.lower()


def _experts_to_compare(cfg: DictConfig, rule: str) -> Iterator[str]:
    if rule != "dynamic" or "router" not in cfg.get("moe", {}):
        return
    router, name = read(cfg, "moe.router", dict), read(cfg, "moe.name", str)
    if router is None:
        yield (
            f"mixing: dynamic compares the routing of MoE layers, moe={name} has none. Choose "
            "moe=dynmoe, or mixing=uniform."
        )
    elif str(router.get("_target_")).endswith(".SoftSlots"):
        yield (
            f"mixing: dynamic compares which experts tokens choose, moe={name} records no choice. "
            "Choose moe=dynmoe, or mixing=uniform."
        )


def _sources(cfg: DictConfig, rule: str) -> Iterator[str]:
    """Data of a single source; where the configuration does not tell, the run does."""
    target, name = read(cfg, "data._target_", str) or "", read(cfg, "data.name", str)
    one = f"mixing: {rule} needs several training sets, {name} is one. Choose"
    kind = modality(cfg, "data")
    if kind == "text" and not target.endswith(MIX):
        yield f"{one} data=glue_mix 'data.tasks=[rte,mrpc]', or leave mixing out."
    elif kind == "text-stream":
        yield f"{one} another task, or leave mixing out."
    elif kind == "image":
        names, tests = environment_names(cfg), test_indices(cfg)
        if names and 0 < len(names) - len(set(tests)) < 2:
            yield (
                f"mixing: {rule} needs several training environments, data.test_envs={tests} "
                "leaves one. Test on fewer, or leave mixing out."
            )
    elif kind == "vision-language":
        content = (read(cfg, "data.content._target_", str) or "").rpartition(".")[2]
        stage = read(cfg, "stage.name", str) or ""
        files = (read(cfg, "data.content.files", dict) or {}).get(stage, ())
        captions = content == "scenes" and stage == "align"
        if content in ONE_SOURCE or captions or (content == "llava" and len(files) < 2):
            yield (
                f"{one} data=llava with two files or more in data.content.files.{stage}, "
                "data=scenes with stage=instruct or moe, or leave mixing out."
            )


def _by_source(node: Mapping[str, object]) -> Iterator[str]:
    """Numbers by source, whose names only the data tell."""
    reference = node.get("reference")
    if isinstance(reference, str):
        missing = reference == "???"  # which is said elsewhere
        if not missing and not (Path(reference).expanduser() / "mixing.jsonl").is_file():
            yield (
                "mixing.reference: expected a run folder with a mixing.jsonl, found none in "
                f"'{reference}'. Runs with probes have one, e.g. mixing=uniform mixing.every=100"
            )
    for key, words in (("weights", ""), ("reference", " or a run folder")):
        given = node.get(key)
        numbers = [*given.values()] if isinstance(given, Mapping) else given
        if given is None and node.get("rule") == NEEDED.get(key):
            yield f"mixing.{key}: expected {{source: number}}{words}, found none"
        if given is None or (isinstance(given, str) and (key == "reference" or given == "???")):
            continue
        if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
            yield (
                f"mixing.{key}: expected {{source: number}}, numbers in the order of the sources' "
                f"names{words}, found {given!r}"
            )
        elif key == "weights" and not any(numbers):
            yield f"mixing.weights: expected some above 0, found {given!r}"


def known_tasks(cfg: DictConfig) -> Iterator[str]:
    """Tasks of a mix: known, each once, from one place."""
    if not (read(cfg, "data._target_", str) or "").endswith(MIX):
        return
    tasks = read(cfg, "data.tasks", list)
    if tasks is None:
        return
    known = [name for name in TASKS if name != "glosses"]
    for name in tasks:
        if name not in known:
            near = did_you_mean(str(name), known)
            yield f"data.tasks: no task '{name}'.{near} Tasks are {', '.join(known)}"
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        yield (
            f"data.tasks: expected two different tasks or more, found {tasks}. For one choose its "
            "own data, e.g. data=rte"
        )
    if read(cfg, "data.ood", list):
        yield "data.ood: is for one task. Leave it out, or choose the data of that task"

"""Rules that need more than one key. Each takes the configuration and yields its messages.

A value that is missing or of the wrong type is somebody else's message: a rule that cannot read
what it speaks about stays silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config.options import options_with
from dynmoe.config.signature import TargetError, class_attribute

T = TypeVar("T")
Rule = Callable[[DictConfig], Iterator[str]]

WEIGHT_FILES = (".safetensors", ".pth", ".bin")


def read(cfg: DictConfig, key: str, kind: type[T]) -> T | None:
    """The resolved value at `key` as plain Python, None where it is not there or not a `kind`."""
    try:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:
        return None
    if isinstance(value, bool) and kind not in (bool, object):
        return None
    if isinstance(value, int) and kind is float:
        value = float(value)
    return value if isinstance(value, kind) else None


def top_k_within_experts(cfg: DictConfig) -> Iterator[str]:
    top_k, experts = read(cfg, "moe.top_k", int), read(cfg, "moe.num_experts", int)
    if top_k is None or experts is None:
        return
    if "top_k" not in (read(cfg, "moe.router", dict) or {}):
        name = read(cfg, "moe.name", str)
        yield f"moe.top_k: the router of moe={name} takes no top_k. Choose moe=topk or moe=gmoe."
    if top_k < 1:
        yield f"moe.top_k: expected 1 or more, found {top_k}"
    if top_k > experts:
        yield (
            f"moe: top_k ({top_k}) > num_experts ({experts}): a token cannot choose more experts "
            "than exist. Lower moe.top_k or raise moe.num_experts."
        )


def expert_bounds(cfg: DictConfig) -> Iterator[str]:
    experts, slots = read(cfg, "moe.num_experts", int), read(cfg, "moe.max_experts", int)
    if experts is None or slots is None:
        return
    if experts < 1:
        yield f"moe.num_experts: expected 1 or more, found {experts}"
    if read(cfg, "moe.adaptation", dict) is None:
        if slots != experts:
            yield (
                f"moe: max_experts ({slots}) != num_experts ({experts}): without moe.adaptation "
                f"the pool never changes. Set moe.max_experts={experts}."
            )
        return
    if experts > slots:
        yield (
            f"moe: num_experts ({experts}) > max_experts ({slots}): there is no slot for every "
            "expert. Lower moe.num_experts or raise moe.max_experts."
        )
    fewest = read(cfg, "moe.adaptation.min_experts", int)
    if fewest is not None and fewest < 1:
        yield f"moe.adaptation.min_experts: expected 1 or more, found {fewest}"
    if fewest is not None and fewest > experts:
        yield (
            f"moe: adaptation.min_experts ({fewest}) > num_experts ({experts}): training would "
            "start below the minimum. Lower moe.adaptation.min_experts or raise moe.num_experts."
        )


def parts_add_up(cfg: DictConfig) -> Iterator[str]:
    """Parts of one FFN need weights that sum to k; EMoE's router needs such parts."""
    init, router = read(cfg, "moe.init", str), read(cfg, "moe.router", dict)
    if init is None or router is None:
        return
    parts = init in ("cluster", "random")
    average = str(router.get("_target_")).endswith("AverageKeyRouter")
    if parts and not average and router.get("weights_sum") != "k":
        yield (
            f"moe.init: {init} makes experts whose outputs add up, but this router's weights sum "
            "to 1. Choose moe=emoe or moe=emoe_learn, or set moe.init=copy."
        )
    if average and not parts:
        yield (
            f"moe.init: {init} makes whole experts, but moe.router adds up outputs. "
            "Set moe.init=cluster or random."
        )


def expert_layers(cfg: DictConfig) -> Iterator[str]:
    layers = read(cfg, "moe.layers", list)
    if layers is not None and all(isinstance(index, int) for index in layers):
        if len(set(layers)) < len(layers):
            yield f"moe.layers: expected distinct block indices, found {layers}"
        if any(index < 0 for index in layers):
            yield f"moe.layers: expected block indices from 0, found {layers}"
        depth = read(cfg, "backbone.options.depth", int)
        if depth is not None and any(index >= depth for index in layers):
            yield (
                f"moe.layers: expected block indices below {depth} (backbone.options.depth), "
                f"found {layers}"
            )
    wanted = layers if layers is not None else read(cfg, "moe.layers", str)
    if wanted is None or "router" not in cfg.get("moe", {}):
        return
    if wanted in ([], "none"):
        if cfg.moe.router:
            yield f"moe.layers: {wanted} leaves the router without a layer: choose moe=dense"
    elif not cfg.moe.router:
        yield (
            f"moe: layers is {wanted}, but router is null: MoE layers need a router. "
            "Set moe.layers=none or choose another moe=..."
        )


def same_modality(cfg: DictConfig) -> Iterator[str]:
    """The task decides; data and backbone must speak its language."""
    wanted = _modality(cfg, "task.module")
    for group in ("data", "backbone"):
        found = _modality(cfg, group)
        if None in (wanted, found) or wanted == found:
            continue
        fitting = options_with(group, lambda node: _modality(node) == wanted)
        fix = f" Choose {group}={' or '.join(fitting)}." if fitting else ""
        yield f"{group}: task.module works on {wanted}, this {group} on {found}.{fix}"


def test_environments(cfg: DictConfig) -> Iterator[str]:
    envs = read(cfg, "data.test_envs", list)
    if envs is None or not all(isinstance(env, int) for env in envs):
        return
    if not envs:
        yield "data.test_envs: empty: name at least one environment to test on, e.g. [0]"
    if len(set(envs)) < len(envs):
        yield f"data.test_envs: expected distinct environments, found {envs}"
    if any(env < 0 for env in envs):
        yield f"data.test_envs: expected indices from 0, found {envs}"


def batch_divides(cfg: DictConfig) -> Iterator[str]:
    batch = read(cfg, "data.batch_size", int)
    parts = read(cfg, "trainer.accumulate_grad_batches", int) or 1
    ranks = (device_count(cfg) or 1) * (read(cfg, "trainer.num_nodes", int) or 1)
    if batch is not None and batch > 0 and parts * ranks > 0 and batch % (parts * ranks):
        yield (
            f"data.batch_size: {batch} does not divide into {ranks} devices x {parts} accumulated "
            f"parts. Choose a multiple of {ranks * parts}."
        )


def ranges(cfg: DictConfig) -> Iterator[str]:
    for key in (
        "task.steps",
        "task.epochs",
        "task.eval_every",
        "task.patience",
        "trainer.max_steps",
        "data.batch_size",
        "data.eval_batch_size",
        "data.max_length",
    ):
        count = read(cfg, key, int)
        if count == -1 and key in ("task.steps", "trainer.max_steps"):
            if read(cfg, "task.epochs", int) is None:
                yield f"{key}: -1 takes its length from task.epochs, which this task has not"
        elif count is not None and count < 1:
            yield f"{key}: expected 1 or more, found {count}"
    for key in ("seed", "trial_seed", "hparams_seed"):
        seed = read(cfg, key, int)
        if seed is not None and seed < 0:
            yield f"{key}: expected 0 or more, found {seed}"
    share = read(cfg, "protocol.holdout_fraction", float)
    none_will_do = share == 0 and _modality(cfg, "task.module") == "text"
    if share is not None and not (0 < share < 1 or none_will_do):
        yield f"protocol.holdout_fraction: expected a share between 0 and 1, found {share}"


def pretrained_weights(cfg: DictConfig) -> Iterator[str]:
    weights = read(cfg, "backbone.pretrained", str)
    if weights is not None:
        if not weights.endswith(WEIGHT_FILES):
            yield (
                f"backbone.pretrained: expected true, false or a file ending in "
                f"{', '.join(WEIGHT_FILES)}, found '{weights}'"
            )
        elif not Path(weights).expanduser().is_file():
            yield f"backbone.pretrained: no file '{weights}'"
    untrained = read(cfg, "backbone.pretrained", bool) is False
    if untrained and read(cfg, "moe.adaptation.init", str) == "pretrained":
        yield (
            "moe.adaptation.init: 'pretrained' copies the backbone's trained FFN, but "
            "backbone.pretrained is false. Set backbone.pretrained=true or another init."
        )


def data_folder(cfg: DictConfig) -> Iterator[str]:
    for key in ("data.root", "data.ood_root"):
        root = read(cfg, key, str)
        if root is not None and not Path(root).expanduser().is_dir():
            yield f"{key}: no folder '{root}'. Give the folder of the data set: {key}=FOLDER"


def text_run(cfg: DictConfig) -> Iterator[str]:
    """What a run on texts needs beside its keys."""
    if _modality(cfg, "task.module") != "text" or _modality(cfg, "data") != "text":
        return
    missing = [name for name in ("transformers", "datasets") if find_spec(name) is None]
    if missing:
        yield f'task: needs {" and ".join(missing)}: pip install "dynmoe[language]"'
    source, root = read(cfg, "data.source", str), read(cfg, "data.root", str)
    if source in ("tsv", "parquet") and root is None:
        yield f"data.root: data.source={source} needs the folder of the files: data.root=FOLDER"
    if source in ("hub", "embedded") and root is not None:
        yield f"data.root: data.source={source} reads no folder. Add data.source=tsv or parquet"
    ood, ood_root = read(cfg, "data.ood", list), read(cfg, "data.ood_root", str)
    if ood and ood_root is None:
        yield f"data.ood_root: data.ood={ood} needs the folder of their files: data.ood_root=FOLDER"
    path = read(cfg, "backbone.path", str)
    if path is not None and not (Path(path).expanduser() / "config.json").is_file():
        yield f"backbone.path: expected a folder with a config.json, found none in '{path}'"
    if read(cfg, "hparams_seed", int):
        yield "hparams_seed: draws DomainBed's hyper-parameters. Sweep task.optimizer.lr instead"


def selection_fits(cfg: DictConfig) -> Iterator[str]:
    selection, modality = read(cfg, "task.selection", str), _modality(cfg, "task.module")
    of_texts = selection in ("best_dev", "heldout")
    if selection is None or modality is None:
        return
    if of_texts != (modality == "text"):
        fix = "protocol=glue or glue_heldout" if modality == "text" else "protocol=domainbed"
        yield f"task.selection: {selection} is not for a task on {modality}. Choose {fix}."
    elif selection == "heldout" and read(cfg, "protocol.holdout_fraction", float) == 0:
        yield (
            "protocol.holdout_fraction: 0 leaves nothing to select by. "
            "Set a share, e.g. 0.1, or task.selection=best_dev"
        )


def adaptation_there(cfg: DictConfig) -> Iterator[str]:
    """A schedule alone is no adaptation."""
    adaptation = read(cfg, "moe.adaptation", dict)
    if adaptation is not None and "_target_" not in adaptation:
        name = read(cfg, "moe.name", str)
        yield f"schedule: moe={name} does not adapt its experts. Leave it out, or choose moe=dynmoe"


def run_folder(cfg: DictConfig) -> Iterator[str]:
    name, outputs = read(cfg, "name", str), read(cfg, "paths.outputs", str)
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        yield (
            f"name: expected a folder below paths.outputs, found '{name}'. "
            "Another place is chosen by paths.outputs=FOLDER."
        )
    if outputs is None:
        return
    path = Path(outputs)
    parent = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not parent.is_dir():
        yield f"paths.outputs: '{parent}' is not a folder, found '{outputs}'"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield (
            f"paths.outputs: no right to write to '{parent}'. Choose another: paths.outputs=FOLDER"
        )


def one_device_per_job(cfg: DictConfig) -> Iterator[str]:
    """Lightning starts its other processes with the whole command line, the sweep's -m included."""
    strategy = read(cfg, "trainer.strategy", str) or read(cfg, "trainer.strategy._target_", str)
    distributed = any(word in str(strategy).lower() for word in ("ddp", "fsdp", "deepspeed"))
    if distributed or device_count(cfg) != 1:
        yield (
            "trainer: a sweep runs each job on one device, found "
            f"devices={read(cfg, 'trainer.devices', object)}, strategy={strategy}. "
            "Set trainer.devices=1 trainer.strategy=auto, or start the jobs one by one."
        )


def clipping_optimizer(cfg: DictConfig) -> Iterator[str]:
    """Lightning refuses it at the first step (plugins/precision/amp.py, clip_gradients)."""
    clips = read(cfg, "trainer.gradient_clip_val", float)
    mixed = "mixed" in str(read(cfg, "trainer.precision", object))
    if clips and mixed and read(cfg, "task.optimizer.fused", bool):
        yield (
            "trainer: gradient_clip_val with mixed precision needs an optimizer that is not fused. "
            "Set task.optimizer.fused=false."
        )


def device_count(cfg: DictConfig) -> int | None:
    """Devices per node; None where only the machine can tell (auto, -1)."""
    devices = read(cfg, "trainer.devices", object)
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return int(text) if text.isdigit() else None


def _modality(cfg: DictConfig, node: str = "") -> str | None:
    target = read(cfg, f"{node}._target_" if node else "_target_", str)
    if target is None:
        return None
    try:
        found = class_attribute(target, "modality")
    except TargetError:
        return None
    return found if isinstance(found, str) else None


RULES: tuple[Rule, ...] = (
    top_k_within_experts,
    expert_bounds,
    parts_add_up,
    expert_layers,
    same_modality,
    test_environments,
    batch_divides,
    ranges,
    pretrained_weights,
    data_folder,
    text_run,
    selection_fits,
    adaptation_there,
    run_folder,
    clipping_optimizer,
)
SWEEP_RULES: tuple[Rule, ...] = (one_device_per_job,)

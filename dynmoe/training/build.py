"""Build the objects of a run from its configuration, for training and for evaluation."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

from dynmoe import process, ranks, runtime, selection
from dynmoe.adaptation import RouterCallback
from dynmoe.backbones import hub, weights
from dynmoe.backbones.families import FAMILIES
from dynmoe.backbones.surgery import add_moe_layers, is_mixture
from dynmoe.config import models
from dynmoe.config.machine import NO_GPU
from dynmoe.config.runs import flat, start_folder
from dynmoe.config.schema import SCHEMAS
from dynmoe.config.trainer import UNFIT
from dynmoe.data.base import StepPlan, TaskData
from dynmoe.errors import ConfigError, reason_of
from dynmoe.layers.moe import moe_layers
from dynmoe.layers.soft import SoftMoELayer
from dynmoe.metrics import efficiency
from dynmoe.records import RecordError, RunFolder
from dynmoe.tasks.base import MoETask
from dynmoe.training.callbacks import RunRecorder, ShrinkingTokens
from dynmoe.training.finite import FiniteLoss
from dynmoe.training.instantiation import make
from dynmoe.training.progress import RunLines, RunProgress
from dynmoe.training.saving import CheckpointFiles, read_checkpoint
from dynmoe.training.trained import checkpoint_of
from dynmoe.version import version as dynmoe_version

# Lightning announces devices, tips and stop reasons at INFO; the summary says what matters of it.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=r".*using a custom batch sampler.*")
warnings.filterwarnings("ignore", message=r".*`srun` command is available.*")  # see ranks.tasks
warnings.filterwarnings("ignore", message=r".*LeafSpec.*")  # inside Lightning 2.6, torch >= 2.11
warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
warnings.filterwarnings("ignore", message=r".*will save all targets and predictions.*")
warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")  # the task sums over ranks itself
warnings.filterwarnings("ignore", message=r".*in eval mode at the start.*")  # frozen vision towers


TOWER = "vision."

# Keys of a backbone, how its name tells of them, and the option that it always has.
TUNED = {"token_sparsify": ("sparse tokens", "keep"), "adapter": ("adapters", "dim")}

SETS = 6  # that are listed one by one

# Settings of a language model that change its output but not the shapes of its weights.
UNSEEN = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rms_norm_eps", "rope_parameters")


def build_data(cfg: DictConfig, **plan: Any) -> TaskData:
    """The data module, connected to the plan of the run; ``plan`` replaces fields of it.

    Nothing is read from disk before ``setup``.
    """
    data: TaskData = make(cfg.data)
    data.connect(replace(step_plan(cfg), **plan))
    return data


def step_plan(cfg: DictConfig) -> StepPlan:
    """The optimizer steps that the configuration asks for."""
    return StepPlan(
        seed=cfg.seed,
        steps=cfg.trainer.max_steps,  # task.steps, unless the trainer says otherwise
        epochs=cfg.task.get("epochs"),
        eval_every=cfg.task.eval_every,
        accumulate=cfg.trainer.accumulate_grad_batches,
        by_source=cfg.get("mixing") is not None,
    )


def other_data(folder: RunFolder, data: TaskData) -> str | None:
    """How the data, which have been set up, differ from those that `run.json` tells of, if they do:
    images by name and size of their files, texts by every character, and by their tokenizer."""
    try:
        before = folder.read_run()
    except RecordError:
        return None  # damaged or lost: nothing to compare with, and written anew in training
    hashes: dict[str, tuple[Any, Any]] = {"data hash": (before.get("data_hash"), data.data_hash)}
    if "tokenizer" in before:
        hashes["tokenizer"] = (before["tokenizer"], data.facts.get("tokenizer"))
    others = [f"{what} {old} -> {new}" for what, (old, new) in hashes.items() if old != new]
    if not others:
        return None
    known = before.get("sizes", {})
    sizes = {name: (known.get(name), size) for name, size in data.sizes.items()}
    changed = [f"{name} {old} -> {new}" for name, (old, new) in sizes.items() if old != new]
    counts = f"; examples: {', '.join(changed)}" if changed else ""
    return f"{', '.join(others)}{counts}"


def settle_runtime(cfg: DictConfig) -> dict[str, Any]:
    """Apply ``runtime`` for the device of ``trainer``. Returns the settings in effect.

    Raises:
        ConfigError: there is no such device.
    """
    # NOTE: Lightning would say so only after the data are read.
    no_mps = cfg.trainer.accelerator == "cuda" or not torch.backends.mps.is_available()
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available() and no_mps:
        raise ConfigError(f"trainer.accelerator: {NO_GPU}")
    on_gpu = {"gpu": True, "cuda": True, "auto": torch.cuda.is_available()}
    device_type = "cuda" if on_gpu.get(cfg.trainer.accelerator) else str(cfg.trainer.accelerator)
    return runtime.apply(cfg.runtime, "cpu" if device_type == "auto" else device_type)


def build_task(cfg: DictConfig, data: TaskData, fused_attention: bool) -> MoETask:
    """Build backbone, MoE layers and task, on the CPU. Seeds the weights by ``seed``.

    Weights of an earlier stage are loaded before MoE layers are made from them.

    Raises:
        ConfigError: a backbone that cannot be built, has too few positions for the data's texts, or
            lacks blocks that are named; an earlier stage whose weights do not fit.
    """
    if loads_a_mixture(cfg):  # many gigabytes: first without them
        shell(cfg, data, data.backbone_arguments)
    L.seed_everything(cfg.seed, verbose=False)
    backbone = make(cfg.backbone, **data.backbone_arguments)
    start = start_folder(cfg)
    if start is not None:
        load_backbone(backbone, start)
    data.check_backbone(backbone)
    runtime.set_fused_attention(backbone, fused_attention)
    adaptation = cfg.moe.adaptation
    init = starting_init(cfg.moe, backbone, bool(cfg.backbone.pretrained) or start is not None)
    keep_origin = adaptation is not None and adaptation.get("init") == "pretrained"
    add_layers(cfg.moe, backbone, init=init, keep_origin=keep_origin)
    return make(
        cfg.task.module,
        **data.task_arguments,
        backbone=backbone,
        **build_optimizer(cfg),
        seed=cfg.seed,
    )


def loads_a_mixture(cfg: DictConfig) -> bool:
    """Whether the weights are those of a model that is a mixture already, and gets MoE layers."""
    node = cfg.backbone
    if cfg.moe.router is None or not node.pretrained or "architecture" not in node:
        return False
    kind = models.model_type(cfg)
    if kind is None and node.architecture is None:
        kind = hub.configuration(node.model, node.get("path"), None, {}).model_type
    return kind in FAMILIES


def build_optimizer(cfg: DictConfig) -> dict[str, Any]:
    """The makers of optimizer and schedule, tried on one parameter: PyTorch checks their values
    when the training begins.

    Raises:
        ConfigError: values that they refuse.
    """
    makers = {"optimizer": make(cfg.task.optimizer), "scheduler": make(cfg.task.get("scheduler"))}
    node = "task.optimizer"
    try:
        optimizer = makers["optimizer"]([nn.Parameter(torch.zeros(1))])
        node = "task.scheduler"
        if makers["scheduler"] is not None:
            makers["scheduler"](optimizer=optimizer, num_training_steps=1)
    except Exception as error:
        raise ConfigError(
            f"{node}: {cfg.task[node.partition('.')[2]]._target_} does not take these values: "
            f"{reason_of(error)}"
        ) from error
    return makers


def starting_init(moe: DictConfig, backbone: nn.Module, trained: bool) -> str:
    """The ``init`` of ``add_moe_layers`` in a run; ``trained``: the backbone has been."""
    if moe.init != "auto":
        return str(moe.init)
    if is_mixture(backbone):
        return "keep"
    return "copy" if trained else "fresh"


def shapes_init(moe: DictConfig, backbone: nn.Module) -> str:
    """An ``init`` that makes layers of the same shapes, and looks at no weights."""
    init = starting_init(moe, backbone, trained=True)
    return {"cluster": "random", "fresh": "copy"}.get(init, init)


def add_layers(moe: DictConfig, backbone: nn.Module, **settings: Any) -> None:
    """Replace FFNs of a backbone by the MoE layers of a ``moe`` node; ``settings`` are arguments of
    ``add_moe_layers`` that replace those of the node, ``init`` among them where that is auto."""
    given = {
        "num_experts": moe.num_experts,
        "max_experts": moe.max_experts,
        "layers": moe.layers,
        "init": moe.init,
        "expert_dropout": moe.expert_dropout,
        "recompute": moe.recompute,
        "backend": moe.get("backend", "auto"),
        "shared_experts": moe.get("shared_experts", 0),
        "conflict": moe.get("conflict"),
        **settings,
    }
    if "router" not in given:
        given["router"] = make(moe.router)
    add_moe_layers(backbone, **given)


def build_callbacks(
    cfg: DictConfig, data: TaskData, folder: RunFolder, more: Sequence[L.Callback] = ()
) -> list[L.Callback]:
    """The end of a run that diverges; the adaptation of experts, or of the state of routers alone;
    ``more``; those of ``trainer.callbacks``; records, checkpoints and early stop; progress.

    Raises:
        ConfigError: one that a run cannot have.
    """
    callbacks: list[L.Callback] = [FiniteLoss(folder, cfg.task.get("on_nonfinite", "stop"))]
    if cfg.moe.adaptation is None:
        callbacks.append(RouterCallback())
    else:
        callbacks.append(make(cfg.moe.adaptation, on_event=partial(folder.append, "events")))
    if (cfg.backbone.get("token_sparsify") or {}).get("shrink_steps"):
        callbacks.append(ShrinkingTokens())
    callbacks += [*more, *own_callbacks(cfg)]
    recorder = RunRecorder(
        folder,
        judging(cfg, data),
        constants(cfg, data),
        data.epoch_at,
        cfg.task.get("save_every"),
        cfg.task.get("patience"),
        cfg.task.get("routing_every", 1),
    )
    has_bar = shows_bar(cfg)
    quiet = not cfg.trainer.enable_progress_bar
    callbacks += [recorder, RunLines(recorder, cfg.runtime.progress_every, has_bar, quiet)]
    if has_bar:
        callbacks.append(RunProgress())
    return callbacks


def own_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """The callbacks of ``trainer.callbacks``, a list or one."""
    given: Any = make(cfg.trainer.get("callbacks"), "trainer.callbacks")
    callbacks = [given] if isinstance(given, L.Callback) else list(given or ())
    for callback in callbacks:
        if not isinstance(callback, L.Callback):
            raise ConfigError(
                f"trainer.callbacks: expected callbacks of Lightning, found {type(callback)}"
            )
        # The check of the command knows a class by its own name alone.
        if unfit := {cls.__name__ for cls in type(callback).__mro__} & set(UNFIT):
            reasons = "; ".join(f"{name}: {UNFIT[name]}" for name in unfit)
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} cannot be added to a run. {reasons}"
            )
    return callbacks


def shows_bar(cfg: DictConfig) -> bool:
    """Whether progress is a bar: on a terminal that this process has for itself."""
    on_terminal = Console().is_interactive and not process.is_worker()
    return bool(cfg.trainer.enable_progress_bar) and on_terminal


def build_trainer(
    cfg: DictConfig, callbacks: list[L.Callback], folder: RunFolder, max_steps: int
) -> L.Trainer:
    """The Lightning trainer.

    Raises:
        ConfigError: options that Lightning refuses together, a missing device, or several that
            only this machine could tell.
    """
    loggers = [make(node) for node in (cfg.logger or {}).values()]
    try:
        trainer: L.Trainer = make(
            cfg.trainer,
            plugins=trainer_plugins(cfg),
            max_steps=max_steps,
            callbacks=callbacks,
            enable_progress_bar=shows_bar(cfg),
            logger=loggers,
            # NOTE: under Slurm Lightning starts a run without a checkpoint from any hpc_ckpt_*.ckpt
            # in this folder, which it once wrote into the run folder: here is none.
            default_root_dir=str(folder.path / "checkpoints"),
        )
    except ConfigError as error:
        raise ConfigError(f"{error} (trainer=cpu runs anywhere)") from error
    if trainer.world_size != trainer.num_devices * trainer.num_nodes:
        raise ConfigError(
            f"trainer: devices={cfg.trainer.devices} are {trainer.num_devices} on each of "
            f"{trainer.num_nodes} nodes, but {trainer.world_size} processes were started. "
            f"Start one for each: srun --ntasks-per-node={trainer.num_devices} dynmoe-run ..."
        )
    if trainer.world_size > 1 and cfg.trainer.strategy == "auto":
        raise ConfigError(
            f"trainer: several devices need trainer=ddp, found {trainer.world_size} of them for "
            f"devices={cfg.trainer.devices}. Set trainer=ddp or trainer.devices=1"
        )
    return trainer


def trainer_plugins(cfg: DictConfig) -> list[Any]:
    """``trainer.plugins``, the writer of checkpoints, and the environment of Lightning that says
    who starts processes.

    Lightning's own choice under Slurm answers its signals with a checkpoint beside ours.
    """
    given: Any = cfg.trainer.get("plugins")
    if OmegaConf.is_config(given):
        given = make(given, "trainer.plugins")
    plugins = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    if not any(isinstance(each, CheckpointIO) for each in plugins):
        plugins.append(CheckpointFiles())
    tasks = ranks.tasks()
    if tasks is None or any(isinstance(each, ClusterEnvironment) for each in plugins):
        return plugins
    if tasks == 1:  # a batch script of a job with several tasks is one process, too
        return [*plugins, LightningEnvironment()]
    # It refuses `srun -n2`, which does not set this, and says no reason.
    nodes = cfg.trainer.get("num_nodes") or 1
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
    return [*plugins, SLURMEnvironment(auto_requeue=False)]


def judging(cfg: DictConfig, data: TaskData) -> dict[str, Any]:
    """The entries of ``run.json`` that say how the run is judged; see ``dynmoe.records``."""
    rule = cfg.task.selection
    return {
        "selection": rule,
        "test_envs": data.test_envs,
        **selection.measured_by(rule, data.env_names, data.test_envs),
    }


def constants(cfg: DictConfig, data: TaskData) -> dict[str, Any]:
    """``args`` and ``hparams`` of a result line: those that DomainBed's readers group and select
    by (domainbed/lib/reporting.py, domainbed/model_selection.py, scripts/collect_results.py)."""
    args = {
        "algorithm": cfg.moe.algorithm,
        "dataset": cfg.data.name,
        "test_envs": data.test_envs,
        "trial_seed": cfg.trial_seed,
        "hparams_seed": cfg.hparams_seed,
        "seed": cfg.seed,
    }
    hparams = {
        "lr": cfg.task.optimizer.lr,
        "batch_size": cfg.data.batch_size,
        "weight_decay": cfg.task.optimizer.weight_decay,
    }
    return {"args": args, "hparams": hparams}


def facts(
    cfg: DictConfig,
    data: TaskData,
    task: MoETask,
    trainer: L.Trainer,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``run.json``: everything a table or figure needs beside the records."""
    costs = efficiency.count(task.backbone, *data.sample)
    return {
        "name": cfg.name,
        "protocol": cfg.protocol.name,
        "modality": data.modality,
        **judging(cfg, data),
        "measure": "accuracy",
        "algorithm": cfg.moe.algorithm,
        "moe": cfg.moe.name,
        "stage": cfg.stage.name if cfg.get("stage") else None,
        "backbone": _backbone_name(cfg.backbone),
        "weights": _weights(cfg.backbone),
        "loaded": weights.loaded_parts(task.backbone),
        "dataset": cfg.data.name,
        "env_names": data.env_names,
        "class_names": data.class_names,
        "seed": cfg.seed,
        "trial_seed": cfg.trial_seed,
        "hparams_seed": cfg.hparams_seed,
        "steps": data.steps,
        "eval_every": data.eval_every,
        "patience": cfg.task.get("patience"),
        "batch_size": cfg.data.batch_size,
        "data_hash": data.data_hash,
        "sizes": data.sizes,
        "left_out": data.left_out,
        "baseline": None,
        **data.facts,
        **({} if data.mixture is None else {"mixing": data.mixture.facts}),
        "config": flat(cfg),
        "costs": costs,
        "trained_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "tokens_by_block": _tokens_by_block(task.backbone),
        "start_experts": {n: len(m.live) for n, m in moe_layers(task.backbone).items()},
        "versions": {
            "dynmoe": dynmoe_version(),
            "torch": torch.__version__,
            "lightning": L.__version__,
            **{name: version(name) for name in data.libraries},
            "python": platform.python_version(),
        },
        "machine": runtime.machine(),
        "device": _device_name(trainer),
        "threads": torch.get_num_threads(),
        "runtime": {
            "threads": torch.get_num_threads(),
            **settings,
            "precision": str(cfg.trainer.precision),
            "fused_optimizer": bool(cfg.task.optimizer.get("fused")),
        },
        "bf16_gain": _bf16_gain(task, trainer),  # measured: no setting that runs may differ in
    }


def _tokens_by_block(backbone: nn.Module) -> list[int] | None:
    """Tokens of an image after each block where blocks leave some out; else None."""
    if not any(hasattr(block, "sparsifier") for block in getattr(backbone, "blocks", ())):
        return None
    from dynmoe.backbones.sparse import token_counts  # loads timm

    return token_counts(backbone)


def _bf16_gain(task: MoETask, trainer: L.Trainer) -> float | None:
    """What bf16 would be worth to a run in fp32 on this CPU: None where nothing is known of it."""
    in_fp32 = trainer.precision in ("32-true", "32", 32)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    return runtime.bf16_gain(task.backbone) if in_fp32 and on_cpu else None


def announcement(facts: Mapping[str, Any], resumed: int) -> list[str]:
    """The lines before the first step: model, data, steps, device. ``resumed``: the last step of
    the checkpoint that the run goes on from, -1 without one."""
    threads = facts["threads"]
    experts = ", ".join(map(str, facts["start_experts"].values()))
    layers = f"MoE layers with {experts} experts" if experts else "no MoE layer"
    whole, trained = efficiency.total(facts["costs"]), facts["trained_parameters"]
    if trained < whole:
        layers += f"; {trained / 1e6:.1f} of {whole / 1e6:.1f} M parameters are trained"
    if tokens := facts["tokens_by_block"]:
        layers += f"; {tokens[-1]} tokens are left in the last block"
    before = f", resumed after step {resumed}" if resumed >= 0 else ""
    return [
        f"model: {facts['algorithm']}, {facts['backbone']}, {facts['weights']}; {layers}",
        f"data: {facts['dataset']}, {_sizes(facts['sizes'])}",
        f"steps: {facts['steps']} with batch size {facts['batch_size']}, an evaluation every "
        f"{facts['eval_every']}{before}",
        f"device: {facts['device']}, {threads} thread{'s' * (threads != 1)}",
    ]


def _sizes(sizes: Mapping[str, int]) -> str:
    if len(sizes) > SETS:
        return f"{sum(sizes.values()):,} examples in {len(sizes)} sets"
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items())


def _backbone_name(backbone: DictConfig) -> str:
    """Return its name and its changes, e.g. ``vit_tiny_patch16_224 (depth 6)``."""
    name = Path(backbone.model or backbone.get("path") or backbone.architecture).name
    changes = [f"folder {Path(backbone.path).name}"] if backbone.get("path") else []
    changes += [f"{key} {value}" for key, value in backbone.options.items()]
    if backbone.get("lora"):
        changes.append(f"LoRA {', '.join(f'{k} {v}' for k, v in backbone.lora.items())}")
    for key, (word, always) in TUNED.items():
        if (node := backbone.get(key)) is not None:
            given = {always: getattr(SCHEMAS[f"backbone.{key}"], always)} | dict(node)
            changes.append(f"{word} {', '.join(_unusual(f'backbone.{key}', given, always))}")
    if backbone.get("vision"):
        tower = backbone.vision
        changes.append(f"vision {Path(tower.model or tower.path).name}, {tower.image_size} px")
    return f"{name} ({', '.join(changes)})" if changes else name


def _unusual(node: str, given: Mapping[str, Any], always: str) -> Iterator[str]:
    """Values other than the defaults of a node, and that of the key ``always``."""
    for key, value in given.items():
        if key == always or value != getattr(SCHEMAS[node], key):
            yield f"{key} {value}"


def _weights(backbone: DictConfig) -> str:
    """Return ``from scratch``, or the origin of pretrained weights."""
    pretrained = backbone.pretrained
    place = pretrained if isinstance(pretrained, str) else backbone.get("path")
    hub = "hub" if backbone.get("library", "path" in backbone) not in ("timm", False) else "timm"
    found = f"pretrained: {Path(place).name if place else hub}" if pretrained else "from scratch"
    if backbone.get("vision"):
        return f"{found}; vision tower {_weights(backbone.vision)}"
    return found


def _device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def load_backbone(backbone: nn.Module, start: Path) -> None:
    """Load the last weights of a finished run into a backbone. The backbone keeps its own vision
    tower if a converted checkpoint has none.

    Raises:
        ConfigError: no such run, a checkpoint of an earlier step, weights of another model, or a
            converted checkpoint of a language model with other settings.
    """
    folder = RunFolder(start)
    file = checkpoint_of(folder, "last")
    if not folder.is_done or not file.exists():
        raise ConfigError(
            f"stage.start={start}: expected the folder of a finished run with checkpoints/last.ckpt"
        )
    saved = read_checkpoint(file, mmap=True)
    step, results = saved["global_step"] - 1, folder.read("results")
    if results and results[-1]["step"] != step:  # a converted checkpoint has none
        raise ConfigError(
            f"{file}: is of step {step}, and the run ended with step {results[-1]['step']}. Put "
            "its last checkpoint there, or train it again: overwrite=true"
        )
    state, prefix = saved["state_dict"], "backbone."
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    whole = found
    own = {k: v for k, v in backbone.state_dict().items() if k.startswith(TOWER)}
    if own and not _has_tower(found, TOWER):
        if not any(part.startswith(TOWER[:-1]) for part in weights.loaded_parts(backbone)):
            raise ConfigError(
                f"stage.start={start}: has no vision tower, and this backbone's has random "
                "weights. Set backbone.vision.pretrained=true or a file"
            )
        whole = found | own
    place = f"stage.start={start}, for the backbone before it gets MoE layers"
    weights.load_whole(backbone, whole, place)
    weights.remember(backbone, weights.Loaded(tensors=len(found), part="stage.start"))
    _check_language_model(backbone, start)


def _check_language_model(backbone: nn.Module, start: Path) -> None:
    """Compare the settings that a converted checkpoint has in config.json."""
    folder = start / "language_model"
    if not (folder / "config.json").is_file():
        return
    theirs, ours = hub.configuration(None, str(folder), None, {}), backbone.config
    if wrong := [key for key in UNSEEN if getattr(theirs, key, 0) != getattr(ours, key, 0)]:
        raise ConfigError(
            f"stage.start={start}: its language model has another {', '.join(wrong)} than this "
            f"backbone. Take its own: backbone.path={folder} backbone.pretrained=false"
        )


def shell(cfg: DictConfig, data: TaskData, arguments: Mapping[str, Any]) -> nn.Module:
    """The model of a run without its weights, on the meta device, with its MoE layers.

    ``arguments``: those of the backbone that the data determine.

    Raises:
        ConfigError: a backbone that cannot be built, or lacks blocks that are named.
    """
    node: Any = OmegaConf.create(OmegaConf.to_container(cfg.backbone, resolve=True))
    for each in (node, node.get("vision")):
        if each is not None:
            each.pretrained = False
    with torch.device("meta"):
        backbone: nn.Module = make(node, "backbone", **arguments)
        data.check_backbone(backbone)
        add_layers(cfg.moe, backbone, init=shapes_init(cfg.moe, backbone))
    return backbone


def description(cfg: DictConfig, backbone: nn.Module) -> str:
    """A model in one line: its name, its MoE layers, its parameters."""
    layers = moe_layers(backbone)
    first = next(iter(layers.values()), None)
    soft = sum(isinstance(module, SoftMoELayer) for module in backbone.modules())
    mixture = f"{len(layers)} MoE layers" if first else "no MoE layers"
    if soft:
        mixture = f"{soft} Soft MoE layers of {cfg.moe.num_experts} experts"
    if first is not None:
        mixture += f" of {len(first.live)} experts, up to {cfg.moe.max_experts}"
    number = sum(p.numel() for p in backbone.parameters())
    return (
        f"model: {_backbone_name(cfg.backbone)}, {_weights(cfg.backbone)}; {mixture}; "
        f"{number / 1e6:.1f} M parameters"
    )


def load(
    cfg: DictConfig, data: TaskData, fused_attention: bool, checkpoint: Path
) -> tuple[MoETask, int]:
    """Return the task with the checkpoint's weights, on the CPU, and the checkpoint's step.

    Raises:
        ConfigError: its weights are of another size, e.g. since the data's vocabulary has changed.
    """
    saved = read_checkpoint(checkpoint)
    state, tower = saved["state_dict"], f"backbone.{TOWER}"
    if keeps_tower := "vision" in cfg.backbone and not _has_tower(state, tower):
        cfg.backbone.vision.pretrained = True
    task = build_task(cfg, data, fused_attention)
    if keeps_tower:
        state |= {k: v for k, v in task.state_dict().items() if k.startswith(tower)}
    weights.load_whole(task, state, f"{checkpoint}, for this run's configuration and data")
    return task, saved["global_step"] - 1


def _has_tower(weights: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the vision tower is included: a converted checkpoint may leave it out."""
    return any(name.startswith(prefix) for name in weights)

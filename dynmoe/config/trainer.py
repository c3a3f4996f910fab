"""Options of Lightning's ``Trainer``: those a run may set, and the one value that others must have.

A run's records rest on how it is cut into steps and evaluations. Options that change this without
the rest of the run knowing would give numbers of a part of the data, or mark a short run as done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dynmoe.config.options import device_count, read
from dynmoe.config.targets import did_you_mean

FREE = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "sync_batchnorm"),
    *("max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("deterministic", "benchmark", "detect_anomaly", "inference_mode", "profiler"),
    *("log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams"),
    "callbacks",
)


class Fixed(NamedTuple):
    """Values that leave a run as it is, and the key that does what the option is used for."""

    values: tuple[Any, ...]
    instead: str


_WHOLE = "evaluations are whole; fewer of them: task.eval_every=N, a short try: trainer=smoke"
_STEPS = "the length of a run is task.steps=N, or task.epochs=N where the task has epochs"
_EVERY = "evaluations are task.eval_every=N steps apart"

FIXED = {
    "fast_dev_run": Fixed((False, 0), "a short try is trainer=smoke"),
    "max_epochs": Fixed((-1,), _STEPS),
    "min_epochs": Fixed((0,), _STEPS),
    "min_steps": Fixed((0,), _STEPS),
    "max_time": Fixed((), f"{_STEPS}; a run that is stopped goes on by the same command"),
    "limit_train_batches": Fixed((1.0,), _STEPS),
    "limit_val_batches": Fixed((1.0,), _WHOLE),
    "limit_test_batches": Fixed((1.0,), _WHOLE),
    "limit_predict_batches": Fixed((1.0,), _WHOLE),
    "overfit_batches": Fixed((0, 0.0), "give a small data set"),
    "val_check_interval": Fixed((1.0,), _EVERY),
    "check_val_every_n_epoch": Fixed((1,), _EVERY),
    "num_sanity_val_steps": Fixed((0,), "trainer=smoke runs an evaluation after three steps"),
    "reload_dataloaders_every_n_epochs": Fixed((0,), "batches follow from seed"),
    "use_distributed_sampler": Fixed((False,), "data are split over ranks already"),
    "enable_checkpointing": Fixed((True,), "checkpoints between evaluations: task.save_every=N"),
    "barebones": Fixed((False,), "dynmoe-bench measures speed"),
    "logger": Fixed((), "loggers are logger=csv, tensorboard, wandb, mlflow or none"),
    "default_root_dir": Fixed((), "folders are paths.outputs=FOLDER, and name=NAME in it"),
    "model_registry": Fixed((), "runs are kept below paths.outputs"),
}


def trainer_options(cfg: DictConfig) -> Iterator[str]:
    node = read(cfg, "trainer", dict) or {}
    for key, value in node.items():
        if key in FREE or str(key).startswith("_"):
            continue
        fixed = FIXED.get(str(key))
        if fixed is None:
            yield f"trainer.{key}: not known to keep a run's records right. Leave it out"
        # NOTE: to Lightning 1 is one batch, and 1.0 all of them.
        elif value is not None and not any(
            type(value) is type(right) and value == right for right in fixed.values
        ):
            expected = fixed.values[0] if fixed.values else "null"
            yield f"trainer.{key}: expected {expected}, found {value}; {fixed.instead}"


def several_devices(cfg: DictConfig) -> Iterator[str]:
    """DDP waits for the gradients of experts that no token of a rank chose."""
    devices, nodes = device_count(cfg), read(cfg, "trainer.num_nodes", int) or 1
    strategy = read(cfg, "trainer.strategy", str)
    if nodes == 1 and devices in (None, 1):
        return
    count = f"devices={read(cfg, 'trainer.devices', object)}, num_nodes={nodes}"
    if strategy == "auto":
        yield f"trainer: several devices need trainer=ddp (or trainer=fsdp2), found {count}"
    target = str(read(cfg, "trainer.strategy._target_", str))
    waits = (
        not read(cfg, "trainer.strategy.find_unused_parameters", bool)
        if target.endswith("DDPStrategy")
        else strategy in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
    )
    if waits and read(cfg, "moe.layers", object) not in (None, "none"):
        yield (
            f"trainer.strategy: with {count} DDP waits for experts that no token of a device "
            "chose. Choose trainer=ddp, which sets find_unused_parameters=true"
        )


def sharded_fits(cfg: DictConfig) -> Iterator[str]:
    """Each device has a share of weights and gradients."""
    target = str(read(cfg, "trainer.strategy._target_", str))
    if "FSDP" not in target and "ExpertParallel" not in target:
        return
    if read(cfg, "trainer.strategy.state_dict_type", str) not in (None, "full"):
        yield (
            "trainer.strategy.state_dict_type: expected full: a checkpoint is one file, which one "
            "device reads as well"
        )
    clips = read(cfg, "trainer.gradient_clip_val", float)
    if "FSDP" in target and clips:
        if "FSDP2" not in target:
            yield (
                "trainer.gradient_clip_val: trainer=fsdp cannot clip by the norm of all shares. "
                "Set trainer=fsdp2 or trainer.gradient_clip_val=null"
            )
        elif read(cfg, "trainer.gradient_clip_algorithm", str) == "value":
            yield (
                "trainer.gradient_clip_algorithm: expected norm with trainer=fsdp2, found value. "
                "Leave it out"
            )
    for name in _classes(cfg, "trainer.callbacks"):
        if name in AVERAGING:
            yield (
                f"trainer.callbacks: {name} averages whole weights, of which each device has a "
                "share. Set trainer=ddp, or leave it out"
            )


def writer_of_checkpoints(cfg: DictConfig) -> Iterator[str]:
    """A checkpoint takes the place of the one before as soon as it is on disk."""
    for name in _classes(cfg, "trainer.plugins"):
        if name == "AsyncCheckpointIO":
            yield (
                "trainer.plugins: AsyncCheckpointIO tells nobody when a checkpoint is on disk, and "
                "part of one would take the place of the one before. Set task.async_save=true, and "
                "leave it out"
            )
        elif name.endswith("CheckpointIO") and read(cfg, "task.async_save", bool):
            yield OWN_WRITER


OWN_WRITER = (
    "task.async_save: trainer.plugins has a writer of checkpoints of its own. Leave it out, or set "
    "task.async_save=false"
)


def _classes(cfg: DictConfig, key: str) -> Iterator[str]:
    """The names of the classes of a node, or of a list of them."""
    given = read(cfg, key, object)
    for node in given if isinstance(given, list) else [given]:
        if isinstance(node, dict):
            yield str(node.get("_target_")).rpartition(".")[2]


READ_EXPERTS = ("AverageKeyRouter", "UniFRouter")
"""Routers that look at the weights of all experts."""


def experts_apart(cfg: DictConfig) -> Iterator[str]:
    """Devices share the experts of each layer (trainer=expert_parallel)."""
    if "ExpertParallel" not in str(read(cfg, "trainer.strategy._target_", str)):
        return
    moe = read(cfg, "moe.name", str)
    router = str(read(cfg, "moe.router._target_", str)).rpartition(".")[2]
    if read(cfg, "moe.router", dict) is None or router == "SoftSlots":
        yield f"trainer.strategy: moe={moe} has no routed experts to share. Set trainer=ddp"
    if router in READ_EXPERTS:
        yield (
            f"trainer.strategy: the router of moe={moe} reads the weights of all experts, which "
            "devices share. Set trainer=ddp or trainer=fsdp2"
        )
    if read(cfg, "moe.conflict.weight", float):
        yield (
            "moe.conflict.weight: compares gradients of a token at all of its experts, which "
            "devices share. Set trainer=ddp, or moe.conflict.weight=0"
        )
    if str(read(cfg, "trainer.precision", str)) in ("16-mixed", "16"):
        yield (
            "trainer.precision: each device would decide by its own experts whether a step of "
            "16-mixed counts. Set trainer.precision=bf16-mixed"
        )
    size, devices = read(cfg, "trainer.strategy.size", int), device_count(cfg)
    ranks = None if devices is None else devices * (read(cfg, "trainer.num_nodes", int) or 1)
    if size is not None and (size < 1 or (ranks is not None and ranks % size)):
        yield (
            f"trainer.strategy.size: expected a divisor of the {ranks} devices, found {size}. Set "
            "trainer.strategy.size=null, for all"
        )


# Callbacks of the user.

UNFIT = {
    "StochasticWeightAveraging": "its average is neither evaluated nor saved. Take "
    "lightning.pytorch.callbacks.EMAWeightAveraging, or WeightAveraging with use_buffers: false",
    "EarlyStopping": "records would not say that the run ended early. Set task.patience=N",
    "Timer": "records would not say that the run ended early. Set task.steps=N",
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches=N",
    "BatchSizeFinder": "it trains before the run does. Set data.batch_size=N",
    "LearningRateFinder": "it trains before the run does. Set task.optimizer.lr=X",
    "TQDMProgressBar": "a run has its own progress bar. trainer.enable_progress_bar=false hides it",
    "RichProgressBar": "a run has its own progress bar. trainer.enable_progress_bar=false hides it",
    "DynMoECallback": "a run makes its own. Set moe.adaptation.start=N and its other keys",
    "MassCallback": "a run makes its own. Choose moe=mass, and set the keys of moe.adaptation",
    "RouterCallback": "a run moves the state of its routers by itself. Leave it out",
}
"""Callbacks that a run cannot have, by the name of their class: the reason and the fix."""


AVERAGING = {
    "WeightAveraging": ("avg_fn", "multi_avg_fn"),
    "EMAWeightAveraging": (
        "decay",
        "update_every_n_steps",
        "update_starting_at_step",
        "update_starting_at_epoch",
    ),
}


def own_callbacks(cfg: DictConfig) -> Iterator[str]:
    """``trainer.callbacks``, a list of nodes or one node, joins those of a run."""
    given = read(cfg, "trainer.callbacks", object)
    for number, node in enumerate(given if isinstance(given, list) else [given]):
        key = f"trainer.callbacks[{number}]" if isinstance(given, list) else "trainer.callbacks"
        if node is None and not isinstance(given, list):
            continue
        if not isinstance(node, dict) or "_target_" not in node:
            yield (
                f"{key}: expected a callback, found {node!r}. "
                "Write '+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.NAME}]'"
            )
            continue
        name = str(node["_target_"]).rpartition(".")[2]
        if name in UNFIT:
            yield f"{key}: {name} cannot be added to a run: {UNFIT[name]}"
        if name in ("WeightAveraging", "EMAWeightAveraging"):
            # They pass what they do not know on to PyTorch, when training starts.
            words = {"device", "use_buffers", *AVERAGING[name]}
            for word in set(map(str, node)) - words - {"_target_"}:
                yield f"{key}.{word}: unknown key.{did_you_mean(word, words)}"
        averages = {"avg_fn", "multi_avg_fn"} & set(node)
        if name == "WeightAveraging" and not averages and node.get("use_buffers") is not False:
            # torch/optim/swa_utils.py subtracts buffers, and bool tensors have no difference.
            yield (
                f"{key}: the buffers of MoE layers say which experts live and have no mean. Set "
                "use_buffers: false, which copies them"
            )

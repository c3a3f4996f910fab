"""Rules that need more than one key. Each takes the configuration and yields its messages.

A missing value or one of the wrong type has its own message already: a rule that cannot read its
keys stays silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from omegaconf import DictConfig

from dynmoe.adaptation.decision import GrowthSchedule, GrowthUnit, Schedule, Unit
from dynmoe.config import clusters, machine, mixing, models, task_rules
from dynmoe.config.environments import environment_names, test_indices
from dynmoe.config.options import device_count, modality, options_with, read, written
from dynmoe.config.trainer import (
    experts_apart,
    own_callbacks,
    several_devices,
    sharded_fits,
    trainer_options,
    writer_of_checkpoints,
)

Rule = Callable[[DictConfig], Iterator[str]]

# The mixture.


def top_k_within_experts(cfg: DictConfig) -> Iterator[str]:
    top_k, experts = read(cfg, "moe.top_k", int), read(cfg, "moe.num_experts", int)
    if top_k is None or experts is None:
        return
    if "top_k" not in (read(cfg, "moe.router", dict) or {}):
        name = read(cfg, "moe.name", str)
        yield f"moe.top_k: the router of moe={name} takes no top_k. Choose moe=topk or moe=gmoe."
    if top_k > experts:
        yield (
            f"moe: top_k ({top_k}) > num_experts ({experts}): a token cannot choose more experts "
            "than exist. Lower moe.top_k or raise moe.num_experts."
        )


def expert_bounds(cfg: DictConfig) -> Iterator[str]:
    experts, slots = read(cfg, "moe.num_experts", int), read(cfg, "moe.max_experts", int)
    if experts is None or slots is None:
        return
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
    if fewest is not None and fewest > experts:
        yield (
            f"moe: adaptation.min_experts ({fewest}) > num_experts ({experts}): training would "
            "start below the minimum. Lower moe.adaptation.min_experts or raise moe.num_experts."
        )


def plan_within_experts(cfg: DictConfig) -> Iterator[str]:
    mean_k, slots = read(cfg, "plan.mean_k", float), read(cfg, "moe.max_experts", int)
    dense = read(cfg, "moe.layers", object) in (None, "none")  # a stage before the experts
    if mean_k is not None and slots is not None and mean_k > slots and not dense:
        yield (
            f"plan.mean_k: expected at most moe.max_experts ({slots}), which is all experts for "
            f"every token, found {mean_k:g}"
        )


def target_k_within_experts(cfg: DictConfig) -> Iterator[str]:
    router, slots = read(cfg, "moe.router", dict) or {}, read(cfg, "moe.max_experts", int)
    target = router.get("target_k")
    if target == []:
        yield (
            "moe.router.target_k: expected one number, or one for each MoE layer, found none. "
            "Write moe.router.target_k=2"
        )
    given = target if isinstance(target, list) else [target]
    numbers = [k for k in given if isinstance(k, int | float) and not isinstance(k, bool)]
    if slots is not None and any(k > slots for k in numbers):
        yield (
            f"moe.router.target_k: expected at most the number of experts, {slots}, found "
            f"{max(numbers):g}. Lower it or raise moe.num_experts."
        )
    if router.get("unserved") == "best" and any(k < 1 for k in numbers):
        yield (
            f"moe.router.target_k: {min(numbers):g} experts per token need "
            "moe.router.unserved=nothing: with best every token has one."
        )
    top_k = router.get("top_k")
    if isinstance(top_k, int) and any(k > top_k for k in numbers):
        yield (
            f"moe.router.target_k: expected at most moe.router.top_k, {top_k}, found "
            f"{max(numbers):g}. Lower it or raise top_k."
        )
    if "top_p" in router and any(k < 1 for k in numbers):
        yield (
            f"moe.router.target_k: expected 1 or more, found {min(numbers):g}: this router gives "
            "every token its best expert. Raise it, or choose moe=dynmoe_budget."
        )
    if isinstance(target, list) and router.get("per_layer") is False:
        yield (
            "moe.router.target_k: a list has one number for each layer, but one controller is for "
            "all of them. Give one number, or set moe.router.per_layer=true."
        )


def parts_add_up(cfg: DictConfig) -> Iterator[str]:
    """Parts of one FFN need weights that sum to k, and such weights need parts."""
    init, router = read(cfg, "moe.init", str), read(cfg, "moe.router", dict)
    if init is None or router is None:
        return
    parts = init in ("cluster", "random")
    if "num_blocks" in router:  # parts of a shared FFN and of residual ones
        if not parts:
            yield f"moe.init: {init} makes whole experts, moe.router blocks. Set moe.init=random."
        return
    if parts and router.get("weights_sum") != "k":
        yield (
            f"moe.init: {init} makes experts whose outputs add up, but this router's weights sum "
            "to 1. Choose moe=emoe or moe=emoe_learn, or set moe.init=copy."
        )
    if not parts and router.get("weights_sum") == "k":
        yield (
            f"moe.init: {init} makes whole experts, but moe.router adds up outputs. "
            "Set moe.init=cluster or random."
        )


def options_that_need_others(cfg: DictConfig) -> Iterator[str]:
    """Options of a router that do nothing, or fail, without another of its options."""
    router = read(cfg, "moe.router", dict) or {}
    if router.get("min_capacity") and router.get("capacity_factor") is None:
        yield (
            f"moe.router.min_capacity: {router['min_capacity']} needs a moe.router.capacity_factor "
            "(1.5): without one no token is dropped. Set it, or min_capacity=0."
        )
    unused = [key for key in ("z_weight", "sequence_weight") if router.get(key)]
    if unused and read(cfg, "moe.aux_weight", float) == 0:
        yield (
            f"moe.router.{unused[0]}: needs moe.aux_weight above 0, which multiplies it. Set "
            "moe.aux_weight=1, or leave it out."
        )
    if router.get("aux") == "importance_load" and router.get("noise") == 0:
        yield (
            "moe.router.aux: importance_load needs moe.router.noise above 0, which smooths it. "
            "Set noise=1.0, or aux=load_balance."
        )
    aux_weight = read(cfg, "moe.aux_weight", float)
    if "lambda_init" in router and aux_weight is not None and aux_weight != 1:
        yield (
            f"moe.aux_weight: expected 1 with this router, whose loss a controller weighs, found "
            f"{aux_weight:g}. Leave it out, or set moe.router.lambda_init"
        )


# Routers without logits of their own, by the name of their class.
NO_LOGITS = ("TopAnyRouter", "BudgetTopAnyRouter", "AverageKeyRouter", "UniFRouter", "SoftSlots")


def conflict_fits(cfg: DictConfig) -> Iterator[str]:
    """The loss of token gradient conflict needs logits, and gradients that nobody scales."""
    weight = read(cfg, "moe.conflict.weight", float)
    if not weight:
        return
    router = read(cfg, "moe.router", dict)
    name = str((router or {}).get("_target_")).rpartition(".")[2]
    if router is None or name in NO_LOGITS:
        moe = read(cfg, "moe.name", str)
        yield (
            f"moe.conflict.weight: expected 0 with moe={moe}, which has no router with logits, "
            f"found {weight:g}. Set it to 0, or choose moe=topk or another softmax router."
        )
    elif router.get("gate_residual"):
        yield (
            "moe.conflict.weight: needs logits of each layer alone. Set "
            "moe.router.gate_residual=false, or moe.conflict.weight=0."
        )
    if read(cfg, "trainer.precision", object) in ("16-mixed", "16", 16):
        yield (
            "trainer.precision: 16-mixed scales gradients, which may overflow before "
            "moe.conflict compares them. Set bf16-mixed or 32-true, or moe.conflict.weight=0."
        )


def expert_layers(cfg: DictConfig) -> Iterator[str]:
    layers = read(cfg, "moe.layers", list)
    if layers is not None and all(isinstance(index, int) for index in layers):
        yield from _indices("moe.layers", layers)
        known = models.depth(cfg)
        if known is not None and any(index >= known[1] for index in layers):
            yield (
                f"moe.layers: expected block indices below {known[1]} ({known[0]}), found {layers}"
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


def _indices(key: str, found: list[int]) -> Iterator[str]:
    if len(set(found)) < len(found):
        yield f"{key}: expected distinct indices, found {found}"
    if any(index < 0 for index in found):
        yield f"{key}: expected indices from 0, found {found}"


def adaptation_there(cfg: DictConfig) -> Iterator[str]:
    adaptation = read(cfg, "moe.adaptation", dict)
    if adaptation is not None and "_target_" not in adaptation:
        name = read(cfg, "moe.name", str)
        yield f"schedule: moe={name} does not adapt its experts. Leave it out, or choose moe=dynmoe"
    elif adaptation is not None:
        start, length, period = (
            read(cfg, f"moe.adaptation.{key}", float) for key in ("start", "length", "period")
        )
        unit = adaptation.get("unit", "step")
        if start is None or length is None or period is None or unit not in get_args(Unit):
            return
        if start < 0 or min(length, period) <= 0:  # ranges.py says so
            return
        try:
            Schedule(start, length, period, unit)
        except ValueError as error:
            yield f"moe.adaptation: {error}"


def growth_fits(cfg: DictConfig) -> Iterator[str]:
    adaptation = read(cfg, "moe.adaptation", dict) or {}
    if not str(adaptation.get("_target_")).endswith(".MassCallback"):
        return
    target = str(read(cfg, "trainer.strategy._target_", str))
    if "FSDP" in target or "ExpertParallel" in target:
        yield (
            "trainer.strategy: growth by drift (moe.adaptation) compares the gradients of all "
            "experts, of which each device has a share. Set trainer=ddp or moe.adaptation=null."
        )
    experts, slots = read(cfg, "moe.num_experts", int), read(cfg, "moe.max_experts", int)
    if experts is not None and experts == slots:
        yield (
            f"moe: max_experts ({slots}) == num_experts ({experts}): no slot is free, so no expert "
            "can be split. Raise moe.max_experts, or set moe.adaptation=null."
        )
    until, warmup, window = (
        read(cfg, f"moe.adaptation.{key}", float) for key in ("until", "warmup", "window")
    )
    unit = adaptation.get("unit", "share")
    if until is None or warmup is None or window is None or unit not in get_args(GrowthUnit):
        return
    if min(until, warmup, window) <= 0 or "period" in adaptation:  # others say so
        return
    try:
        GrowthSchedule(until, warmup, window, unit)
    except ValueError as error:
        yield f"moe.adaptation: {error}"


# The protocol, and the rule that selects a step.

# Selection rules and protocols by the modality of a task. Image protocols set no rule.
SELECTIONS = {
    "image": ("training_domain_validation", "oracle", "leave_one_domain_out"),
    "text": ("best_dev", "heldout"),
    "text-stream": ("validation",),
    "vision-language": ("last_step",),
}
PROTOCOLS = {
    "image": "domainbed, gmoe or swad",
    "text": "glue or glue_heldout",
    "text-stream": "lm",
    "vision-language": "llava",
}


OWN_DRAWS = ("gmoe", "swad")  # protocols whose code draws from other ranges than DomainBed's


def only_of_one_modality(cfg: DictConfig) -> Iterator[str]:
    kind = modality(cfg, "task.module")
    stops = kind in ("text", "text-stream")
    if read(cfg, "task.patience", object) is not None and not stops:
        yield "task.patience: only text runs stop early. Leave it out"
    if read(cfg, "hparams_seed", int) and kind != "image":
        yield "hparams_seed: draws DomainBed's hyper-parameters. Sweep task.optimizer.lr instead"
    name = read(cfg, "protocol.name", str)
    if read(cfg, "hparams_seed", int) and name in OWN_DRAWS:
        yield (
            f"hparams_seed: draws DomainBed's hyper-parameters, protocol={name} has its own. "
            "Choose protocol=domainbed, or sweep task.optimizer.lr"
        )


def protocol_fits(cfg: DictConfig) -> Iterator[str]:
    kind, name = modality(cfg, "task.module"), read(cfg, "protocol.name", str)
    if kind not in PROTOCOLS or name is None:
        return
    selection = read(cfg, "protocol.selection", str)
    fits = selection is None if kind == "image" else selection in SELECTIONS[kind]
    if not fits:
        yield (
            f"protocol: task.module works on {kind}, protocol={name} does not. "
            f"Choose protocol={PROTOCOLS[kind]}."
        )


def selection_fits(cfg: DictConfig) -> Iterator[str]:
    selection, kind = read(cfg, "task.selection", str), modality(cfg, "task.module")
    if selection is None or kind not in SELECTIONS:
        return
    if selection not in SELECTIONS[kind]:
        fix = PROTOCOLS[kind].split(",")[0]
        yield f"task.selection: {selection} is not for a task on {kind}. Choose protocol={fix}."
    elif selection == "heldout" and read(cfg, "protocol.holdout_fraction", float) == 0:
        yield (
            "protocol.holdout_fraction: 0 leaves no examples to select by. "
            "Set a share, e.g. 0.1, or task.selection=best_dev"
        )


def routing_fits(cfg: DictConfig) -> Iterator[str]:
    every, rule = read(cfg, "task.routing_every", int), read(cfg, "task.selection", str)
    if every is not None and every > 1 and rule == "leave_one_domain_out":
        yield (
            "task.routing_every: leave_one_domain_out selects a step when all runs have ended, and "
            "reports its routing. Set task.routing_every=1"
        )


# Any run.

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def same_modality(cfg: DictConfig) -> Iterator[str]:
    """Data and backbone must work on the modality of the task."""
    wanted = modality(cfg, "task.module")
    for group in ("data", "backbone"):
        found = modality(cfg, group)
        if None in (wanted, found) or wanted == found:
            continue
        fitting = options_with(group, lambda node: modality(node) == wanted)
        fix = f" Choose {group}={' or '.join(fitting)}." if fitting else ""
        yield f"{group}: task.module works on {wanted}, this {group} on {found}.{fix}"


def test_environments(cfg: DictConfig) -> Iterator[str]:
    if read(cfg, "data.test_envs", list) is None or modality(cfg, "data") != "image":
        return
    envs = test_indices(cfg)
    if not envs:
        yield "data.test_envs: empty: name at least one environment to test on, e.g. [0]"
    yield from _indices("data.test_envs", [env for env in envs if isinstance(env, int)])
    names = environment_names(cfg)
    beyond = [
        env for env in envs if names and (env >= len(names) if isinstance(env, int) else True)
    ]
    if names and beyond:
        known = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
        yield (
            f"data.test_envs: there is no environment {', '.join(map(str, beyond))}. Expected "
            f"indices or names: {known}{_quoted(beyond, names)}"
        )
    elif names and len(set(envs)) == len(names):
        yield f"data.test_envs: {envs} leaves no environment to train on. Leave one out"


def _quoted(beyond: Sequence[int | str], names: Sequence[str]) -> str:
    """The fix where numbers that are no index are names."""
    meant = ",".join(f'"{env}"' for env in beyond if isinstance(env, int) and str(env) in names)
    return f". Quote names: 'data.test_envs=[{meant}]'" if meant else ""


def batch_divides(cfg: DictConfig) -> Iterator[str]:
    batch = read(cfg, "data.batch_size", int)
    parts = read(cfg, "trainer.accumulate_grad_batches", int) or 1
    ranks = (device_count(cfg) or 1) * (read(cfg, "trainer.num_nodes", int) or 1)
    if batch is not None and batch > 0 and parts * ranks > 0 and batch % (parts * ranks):
        yield (
            f"data.batch_size: {batch} does not divide into {ranks} devices x {parts} accumulated "
            f"parts. Choose a multiple of {ranks * parts}."
        )


def shares_and_lengths(cfg: DictConfig) -> Iterator[str]:
    """Ranges that depend on the task; dynmoe/config/ranges.py has those of one key."""
    has_epochs = written(cfg, "task.epochs") is not None
    if read(cfg, "trainer.max_steps", int) == -1 and not has_epochs:
        yield "task.steps: -1 takes the length from task.epochs, but this task has no epochs"
    share = read(cfg, "protocol.holdout_fraction", float)
    may_be_none = share == 0 and modality(cfg, "task.module") != "image"
    if share is not None and not (0 < share < 1 or may_be_none):
        yield f"protocol.holdout_fraction: expected a share between 0 and 1, found {share}"


def pretrained_weights(cfg: DictConfig) -> Iterator[str]:
    for key in ("backbone.pretrained", "backbone.vision.pretrained"):
        weights, endings = read(cfg, key, str), ", ".join(WEIGHT_FILES)
        if weights is not None and not weights.endswith(WEIGHT_FILES):
            yield f"{key}: expected true, false or a file ending in {endings}, found '{weights}'"
        elif weights is not None and not Path(weights).expanduser().is_file():
            yield f"{key}: no file '{weights}'"
    untrained = read(cfg, "backbone.pretrained", bool) is False and cfg.get("stage") is None
    if untrained and read(cfg, "moe.adaptation.init", str) == "pretrained":
        yield (
            "moe.adaptation.init: 'pretrained' copies the backbone's trained FFN, but "
            "backbone.pretrained is false. Set backbone.pretrained=true or another init."
        )


def clipping_optimizer(cfg: DictConfig) -> Iterator[str]:
    """Lightning refuses this pair at the first step (plugins/precision/amp.py, clip_gradients)."""
    clips = read(cfg, "trainer.gradient_clip_val", float)
    mixed = "mixed" in str(read(cfg, "trainer.precision", object))
    if clips and mixed and read(cfg, "task.optimizer.fused", bool):
        yield (
            "trainer: gradient_clip_val with mixed precision needs an optimizer that is not fused. "
            "Set task.optimizer.fused=false."
        )


# In the order of their messages.
RULES: tuple[Rule, ...] = (
    *(
        top_k_within_experts,
        target_k_within_experts,
        expert_bounds,
        parts_add_up,
        options_that_need_others,
        conflict_fits,
        mixing.mixing_fits,
        mixing.known_tasks,
    ),
    *(expert_layers, adaptation_there, growth_fits, plan_within_experts),
    *(same_modality, test_environments, batch_divides, shares_and_lengths, pretrained_weights),
    *(machine.data_folder, models.known_vits, models.whole_patches, models.data_fit_backbone),
    models.sparse_tokens,
    *(
        task_rules.text_run,
        task_rules.corpus_run,
        task_rules.is_language_model,
        models.head_has_weights,
        models.language_model,
        models.positions_fit,
        models.own_mixture,
        models.causal_model,
        task_rules.stage_is_chosen,
        task_rules.dense_before_moe,
        task_rules.start_is_a_run,
    ),
    *(
        task_rules.known_templates,
        task_rules.known_question_sets,
        task_rules.trained_parts,
        task_rules.scratch_is_trained,
        task_rules.there_is_training_data,
        machine.folders,
        machine.gpu_there,
    ),
    *(machine.libraries, machine.loggers, only_of_one_modality, protocol_fits, selection_fits),
    routing_fits,
    *(machine.run_folder, clipping_optimizer, own_callbacks),
    *(trainer_options, several_devices, sharded_fits, experts_apart, clusters.as_many_as_started),
    writer_of_checkpoints,
)
RUN_RULES: tuple[Rule, ...] = (clusters.launcher_has_a_sweep,)  # of one run alone
SWEEP_RULES: tuple[Rule, ...] = (clusters.one_device_per_job, clusters.launcher_fits)

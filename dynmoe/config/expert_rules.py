"""Rules of the `moe` node that need more than one key."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from dynmoe.config.reading import read

# The number of blocks, in timm's options and in those of transformers' families.
DEPTHS = ("depth", "num_hidden_layers", "n_layer", "n_layers")


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
    """Parts of one FFN need weights that sum to k, and such weights need parts."""
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
    if not parts and (average or router.get("weights_sum") == "k"):
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
        for key in DEPTHS:
            depth = read(cfg, f"backbone.options.{key}", int)
            if depth is not None and any(index >= depth for index in layers):
                yield (
                    f"moe.layers: expected block indices below {depth} (backbone.options.{key}), "
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


def adaptation_there(cfg: DictConfig) -> Iterator[str]:
    """A schedule alone is no adaptation."""
    adaptation = read(cfg, "moe.adaptation", dict)
    if adaptation is not None and "_target_" not in adaptation:
        name = read(cfg, "moe.name", str)
        yield f"schedule: moe={name} does not adapt its experts. Leave it out, or choose moe=dynmoe"


RULES = (top_k_within_experts, expert_bounds, parts_add_up, expert_layers, adaptation_there)

"""Classes of transformers that are mixtures themselves: a run that they can express needs no code.

Known are dense models whose blocks but the FFN are those of a mixture (Llama and Mistral for
Mixtral, Qwen3 for Qwen3-MoE), and models that were such mixtures before they got MoE layers. Their
routers are top-k over a softmax of a linear score.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers

from dynmoe.convert.stacked import Mixtures

NOT_COPIED = ("model_type", "architectures", "layer_types", "transformers_version", "auto_map")


MIXTURES = {
    "mixtral": ("num_local_experts", None),
    **dict.fromkeys(("olmoe", "qwen3_moe"), ("num_experts", "norm_topk_prob")),
}
"""Mixtures by their type: the keys of the number of experts and of weights that sum to 1, which
Mixtral's always do."""


def native_config(dense: Any, mixtures: Mixtures) -> Any | None:
    """Return the configuration of a native mixture that computes the same; None if there is none.

    ``dense`` is the model before it got MoE layers.
    """
    config = dense.config
    if config.model_type in MIXTURES:
        found = {n for n, module in dense.named_modules() if hasattr(module, "gate_up_proj")}
        every = {name.removesuffix(".experts") for name in found} == mixtures.places.keys()
        make: Any = _same_class if every else None
    else:
        makers = {"llama": _mixtral, "mistral": _mixtral, "qwen3": _qwen3_moe}
        make = makers.get(config.model_type)
    counts = {place.num_experts for place in mixtures.places.values()}
    fits = (
        mixtures.router == "TopK"
        and mixtures.options["scale"] == 1
        and mixtures.gated
        and not mixtures.biased
        and all(place.output_bias is None for place in mixtures.places.values())
        and mixtures.activation == config.hidden_act
        and len(counts) == 1
        and all(name.endswith(".mlp") for name in mixtures.places)
    )
    return make(config, mixtures, counts.pop()) if make and fits else None


def _same_class(config: Any, mixtures: Mixtures, num_experts: int) -> Any | None:
    """All mixtures of a model are ours now, with another number of experts perhaps."""
    number, normalised = MIXTURES[config.model_type]
    hidden = getattr(config, "moe_intermediate_size", config.intermediate_size)
    if mixtures.hidden != hidden or (normalised is None and not mixtures.options["normalised"]):
        return None
    made = copy.deepcopy(config)
    setattr(made, number, num_experts)
    made.num_experts_per_tok = mixtures.options["top_k"]
    if normalised is not None:
        setattr(made, normalised, mixtures.options["normalised"])
    return made


def _mixtral(config: Any, mixtures: Mixtures, num_experts: int) -> Any | None:
    """All blocks are mixtures, whose weights always sum to 1."""
    if (
        len(mixtures.places) != config.num_hidden_layers
        or not mixtures.options["normalised"]
        or getattr(config, "attention_bias", False)
    ):
        return None
    return _copied(
        config,
        transformers.MixtralConfig,
        intermediate_size=mixtures.hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=mixtures.options["top_k"],
    )


def _qwen3_moe(config: Any, mixtures: Mixtures, num_experts: int) -> Any | None:
    if config.use_sliding_window:
        return None
    blocks = {int(name.split(".")[-2]) for name in mixtures.places}
    return _copied(
        config,
        transformers.Qwen3MoeConfig,
        moe_intermediate_size=mixtures.hidden,
        num_experts=num_experts,
        num_experts_per_tok=mixtures.options["top_k"],
        norm_topk_prob=mixtures.options["normalised"],
        mlp_only_layers=sorted(set(range(config.num_hidden_layers)) - blocks),
        decoder_sparse_step=1,
    )


def _copied(config: Any, made: Any, **mixture: Any) -> Any:
    known = vars(made()) | {"head_dim": None}
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_COPIED}
    return made(**{key: value for key, value in values.items() if key in known} | mixture)


def native_names(mixtures: Mixtures) -> dict[str, str]:
    """Return the native name of each tensor of the mixtures, by its name with a place's."""
    names = {"router.weight": "gate.weight"}
    names |= {f"experts.{part}": f"experts.{part}" for part in ("gate_up_proj", "down_proj")}
    return {
        f"{place}.{ours}": f"{place}.{theirs}"
        for place in mixtures.places
        for ours, theirs in names.items()
    }

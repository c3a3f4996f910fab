"""A converted model's run configuration from its settings, and the settings of a run's model.

Settings are those of ``official_config.describe``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from dynmoe.backbones import hub
from dynmoe.backbones.official_config import ARCHITECTURES, FITS, OPTIONS, ROPE
from dynmoe.backbones.surgery import placed_blocks
from dynmoe.config import options
from dynmoe.config.preflight import search_path
from dynmoe.config.reading import modality
from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

BACKBONES = {"stablelm": "vl_stablelm", "qwen": "vl_qwen", "phi": "vl_phi2"}
POOLS = {"dynmoe": "dynmoe_vl_official", "topk": "moe_llava"}

FAMILIES = {ours: family for family, ours in ARCHITECTURES.items()}
ROUTERS = {"dynmoe.layers.TopAnyRouter": "dynmoe", "dynmoe.layers.TopKRouter": "topk"}

# Of transformers' configurations, all that the official code computes.
ONLY: dict[str, dict[str, Any]] = {
    "stablelm": {"hidden_act": "silu", "use_parallel_residual": False, "qk_layernorm": False},
    "qwen": {"hidden_act": "silu", "use_sliding_window": False},
    "phi": {"qk_layernorm": False},
    "every": {"tie_word_embeddings": False},
}
# The same of routers, as far as it bears on evaluation.
ONLY_ROUTERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "dynmoe": {"combine": ("constant_k", "through_k")},
    "topk": {"top_k": (1, 2), "capacity_factor": (None,), "weights_sum": ("one",)},
}


def run_configuration(
    settings: Mapping[str, Any], vision: Mapping[str, Any], language_model: Path
) -> DictConfig:
    """The ``config.yaml`` of a converted model: ``task=vl`` without data to train on.

    ``vision``: of ``official_tower.tower``; ``language_model``: a folder with config.json and
    tokenizer.
    """
    pool = dict(settings["moe"])
    name = POOLS.get(pool.pop("name"))
    stage = ["stage=moe", f"moe={name}"] if name else ["stage=instruct"]
    backbone = f"backbone={BACKBONES[settings['family']]}"
    groups = ["task=vl", "data=questions", backbone, *stage, "trainer=default", "logger=none"]
    with search_path():
        cfg = compose(options.CONFIG_NAME, groups)
        with open_dict(cfg):
            cfg.merge_with(
                {
                    "backbone": {
                        "model": None,
                        "path": str(language_model),
                        "pretrained": False,
                        "projector": settings["projector"],
                        "vision": {**vision, "layer": settings["vision"]["layer"]},
                    },
                    "data": {"fit": settings["vision"]["fit"]},
                    "moe": pool if name else {},
                    "stage": {"start": None},
                }
            )
        OmegaConf.resolve(cfg)
    return cfg


def hub_name(settings: Mapping[str, Any]) -> str:
    """Where a language model of the family is published, with a tokenizer."""
    with search_path():
        return str(options.own("backbone", BACKBONES[settings["family"]]).model)


def settings_of(cfg: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a run's model, trained here or converted; ``weights`` are the backbone's.

    Raises:
        ConfigError: what of it the official code has no place for, all at once.
    """
    if modality(cfg, "backbone") != "vision-language":
        raise ConfigError("run: expected one of task=vl, whose model official code can read")
    node = OmegaConf.to_container(cfg.backbone, resolve=True)
    assert isinstance(node, dict)
    config = hub.configuration(node["model"], node["path"], node["architecture"], node["options"])
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"backbone: the official code has the language models {known}, found "
            f"{config.model_type}"
        )
    family = FAMILIES[config.model_type]
    if problems := list(_problems(cfg, config, family, weights)):
        raise ConfigError("\n".join(problems))
    sizes = {name: getattr(config, name) for name in OPTIONS[family]}
    if family == "qwen":
        sizes["num_key_value_heads"] = config.num_key_value_heads
    sizes["vocab_size"] = len(weights["language_model.model.embed_tokens.weight"])
    rope = {name: config.rope_parameters[name] for name in ROPE[family]}
    sizes["rope_parameters"] = {"rope_type": "default", **rope}
    return {
        "family": family,
        "language_model": {"architecture": config.model_type, "options": sizes},
        "vision": {
            "model": cfg.backbone.vision.model or cfg.backbone.vision.path,
            "layer": cfg.backbone.vision.layer,
            "width": weights["projector.0.weight"].shape[1],
            "fit": cfg.data.fit,
        },
        "projector": cfg.backbone.projector,
        "moe": _pool(cfg.moe, config.num_hidden_layers),
        "notes": [],
    }


def _pool(moe: DictConfig, depth: int) -> dict[str, Any]:
    layers = placed_blocks(moe.layers, depth)
    if not layers:
        return {"name": "dense", "layers": []}
    name = ROUTERS[moe.router._target_]
    keys = "num_experts", "max_experts", *(("top_k",) if name == "topk" else ())
    return {
        "name": name,
        **{key: moe[key] for key in keys},
        "layers": layers,
        **{key: moe[key] for key in ("init", "expert_dropout", "aux_weight")},
    }


def _problems(
    cfg: DictConfig, config: Any, family: str, weights: Mapping[str, Tensor]
) -> Iterator[str]:
    for key, value in {**ONLY[family], **ONLY["every"]}.items():
        if getattr(config, key) != value:
            yield f"backbone: {key}: expected {value}, found {getattr(config, key)}"
    if family == "qwen" and config.num_key_value_heads != config.num_attention_heads:
        yield (
            f"backbone: num_key_value_heads: expected {config.num_attention_heads}, as many as "
            f"heads, found {config.num_key_value_heads}"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        yield f"backbone: rope_type: expected default, found {kind}"
    tower = [name for name in weights if name.startswith("vision.")]
    if tower and "vision.model.embeddings.class_embedding" not in tower:
        yield f"backbone.vision: expected a CLIP of transformers, found {cfg.backbone.vision.model}"
    if cfg.data.fit not in FITS.values():
        yield f"data.fit: expected one of {', '.join(FITS.values())}, found {cfg.data.fit}"
    if placed_blocks(cfg.moe.layers, config.num_hidden_layers):
        yield from _router_problems(cfg.moe.router)


def _router_problems(router: DictConfig) -> Iterator[str]:
    name = ROUTERS.get(router._target_)
    if name is None:
        yield f"moe.router: expected one of {', '.join(ROUTERS)}, found {router._target_}"
        return
    for key, values in ONLY_ROUTERS[name].items():
        if router.get(key, values[0]) not in values:
            expected = " or ".join(map(str, values))
            yield f"moe.router.{key}: expected {expected}, found {router[key]}"

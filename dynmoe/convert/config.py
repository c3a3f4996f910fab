"""What config.json of MoE-LLaVA and DynMoE-LLaVA means for us, both ways.

``model_type`` is ``moe_llava_<family>``, or ``llava_<family>`` of a dense model, which MoE-LLaVA's
second stage ends with and DynMoE starts from. A converted model computes at evaluation what the
official code at its head does:

- DynMoE (``conf/moe/dynmoe.yaml``): any options of the router evaluate so but ``combine=tutel``.
  The code of May 2024 had a capacity, which could drop tokens. ``dynmoe_official_deepspeed`` has
  the losses of the head, to train on.
- MoE-LLaVA (``conf/moe/topk.yaml``), but for two habits of its gate (``sharded_moe.top2gating``),
  which ``describe`` notes: it draws the second expert with noise, at evaluation too, where ours
  is the most probable one, and it drops tokens over a capacity, which however is all of them in
  the published runs (2 choices * eval_capacity_factor 2 = 4 experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from dynmoe.backbones import hub
from dynmoe.backbones.surgery import placed_blocks
from dynmoe.config import options
from dynmoe.config.compose import search_path
from dynmoe.config.options import modality
from dynmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {"stablelm": "stablelm", "qwen": "qwen2", "phi": "phi"}
PROJECTORS = ("linear", "mlp2x_gelu")
FITS = {"pad": "pad", "square": "crop"}  # image_aspect_ratio: ours


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


# Options of transformers' configurations: their official names.
SIZES = _same(
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
)
GROUPED = {**SIZES, **_same("num_key_value_heads", "max_position_embeddings")}
OPTIONS = {
    "stablelm": {**GROUPED, "use_qkv_bias": "use_qkv_bias", "layer_norm_eps": "norm_eps"},
    # Over seq_length tokens Qwen rescales angles and queries, which Qwen2 does not.
    "qwen": {
        **SIZES,
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    "phi": {
        **GROUPED,
        **_same("hidden_act", "layer_norm_eps", "resid_pdrop", "embd_pdrop", "attention_dropout"),
    },
}
ROPE = {
    "stablelm": {"rope_theta": "rope_theta", "partial_rotary_factor": "rope_pct"},
    "qwen": {"rope_theta": "rotary_emb_base"},
    "phi": _same("rope_theta", "partial_rotary_factor"),
}
VISION = {"model": "mm_image_tower", "layer": "mm_vision_select_layer", "width": "mm_hidden_size"}
MOE = ("moe_layers_idx", "num_experts", "top_k_experts", "router_aux_loss_coef")

# The official defaults, and all that ours computes.
ONLY: dict[str, dict[str, Any]] = {
    "stablelm": {},
    "qwen": {"rotary_pct": 1.0, "no_bias": True},
    "phi": {"qk_layernorm": False, "rope_scaling": None},
    "every": {
        "tie_word_embeddings": False,
        "mm_video_tower": None,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
    },
    "moe": {"use_residual": False, "ep_size": 1},
}


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for the model of an official config.json.

    ``family``; ``language_model``: ``architecture`` and ``options`` of transformers; ``vision``:
    ``model``, the ``layer`` whose patches are read, their ``width``, how an image is ``fit``;
    ``projector``; ``moe``: keys of ``conf/moe/<name>.yaml`` with a list of ``layers``; ``notes``:
    what is not as there.

    Raises:
        DataError: what is missing, or ours cannot compute, all at once.
    """
    if problems := list(_problems(config)):
        raise DataError("\n".join(f"config.json: {problem}" for problem in problems))
    family = _family(config)
    options = {ours: config[official] for ours, official in OPTIONS[family].items()}
    rope = {ours: config[official] for ours, official in ROPE[family].items()}
    options["rope_parameters"] = {"rope_type": "default", **rope}
    if family == "qwen":
        options["intermediate_size"] //= 2  # w1 and w2 together
        options["num_key_value_heads"] = options["num_attention_heads"]
    return {
        "family": family,
        "language_model": {"architecture": ARCHITECTURES[family], "options": options},
        "vision": {
            **{ours: config[official] for ours, official in VISION.items()},
            "fit": FITS[config.get("image_aspect_ratio", "square")],
        },
        "projector": config.get("image_projector_type", "linear"),
        "moe": _pool(config["moe"]) if _has_experts(config) else {"name": "dense", "layers": []},
        "notes": list(_notes(config["moe"])) if _has_experts(config) else [],
    }


def official_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model by our settings: ``describe`` gives them back."""
    family, moe = settings["family"], settings["moe"]
    options, is_dense = settings["language_model"]["options"], not moe["layers"]
    config = {
        "model_type": f"llava_{family}" if is_dense else f"moe_llava_{family}",
        **{official: options[ours] for ours, official in OPTIONS[family].items()},
        **{official: options["rope_parameters"][ours] for ours, official in ROPE[family].items()},
        **{official: settings["vision"][ours] for ours, official in VISION.items()},
        **ONLY[family],
        **ONLY["every"],
        "image_aspect_ratio": {fit: name for name, fit in FITS.items()}[settings["vision"]["fit"]],
        "image_projector_type": settings["projector"],
        "mm_use_im_patch_token": False,  # the official default would add a token
        "use_mm_proj": True,
    }
    if family == "qwen":
        config["intermediate_size"] *= 2
        config["kv_channels"] = config["hidden_size"] // config["num_attention_heads"]
    if not is_dense:
        config["moe"] = _official_pool(moe)
    return config


def _official_pool(moe: Mapping[str, Any]) -> dict[str, Any]:
    top_k = moe.get("top_k", -1)
    return {
        **ONLY["moe"],
        "moe_enable": True,
        "moe_mode": "custom",
        "moe_layers_idx": list(moe["layers"]),
        "num_experts": [moe["max_experts"]] * len(moe["layers"]),
        "top_k_experts": top_k,
        "router_aux_loss_coef": moe["aux_weight"],
        "capacity_factor": 1.5,
        "eval_capacity_factor": moe["max_experts"] / abs(top_k),  # all tokens: none is dropped
        "min_capacity": 0,
        "train_modules": [],
    }


def _pool(moe: Mapping[str, Any]) -> dict[str, Any]:
    top_k, slots = moe["top_k_experts"], moe["num_experts"][0]
    adaptive = top_k == -1
    return {
        "name": "dynmoe" if adaptive else "topk",
        "num_experts": slots // 2 if adaptive else slots,  # the first; the weights say who lives
        "max_experts": slots,
        **({} if adaptive else {"top_k": top_k}),
        "layers": list(moe["moe_layers_idx"]),
        "init": "copy",
        "expert_dropout": None,
        "aux_weight": moe["router_aux_loss_coef"],
    }


def _notes(moe: Mapping[str, Any]) -> Iterator[str]:
    top_k, slots = moe["top_k_experts"], moe["num_experts"][0]
    if top_k == 2:
        yield "The official gate draws the second expert with noise, here it is the most probable."
    share = top_k * moe.get("eval_capacity_factor", 1.0) / slots
    if top_k > 0 and share < 1:
        yield (
            f"The official gate serves at most {share:.0%} of the tokens with an expert "
            "(eval_capacity_factor), here all find a place."
        )


def _family(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type")).removeprefix("moe_").removeprefix("llava_")


def _has_experts(config: Mapping[str, Any]) -> bool:
    return str(config["model_type"]).startswith("moe_")


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    family = _family(config)
    known = [f"{moe}llava_{name}" for moe in ("moe_", "") for name in ARCHITECTURES]
    if config.get("model_type") not in known:
        yield f"model_type: expected one of {', '.join(known)}, found {config.get('model_type')}"
        return
    moe = config.get("moe", {}) if _has_experts(config) else {}
    pool = {f"moe.{key}": value for key, value in moe.items()}
    found = {**config, **pool}
    needed = [*OPTIONS[family].values(), *ROPE[family].values(), *VISION.values()]
    needed += [f"moe.{key}" for key in MOE if _has_experts(config)]
    if absent := [key for key in needed if found.get(key) in (None, [])]:
        yield f"expected the keys {', '.join(absent)}, found none"
    only = {**ONLY[family], **ONLY["every"], **{f"moe.{k}": v for k, v in ONLY["moe"].items()}}
    for key, value in only.items():
        if found.get(key, value) != value:
            yield f"{key}: expected {value}, found {found[key]}, which is not supported"
    for key, choices in {"image_projector_type": PROJECTORS, "image_aspect_ratio": FITS}.items():
        if key in config and config[key] not in choices:
            yield f"{key}: expected one of {', '.join(choices)}, found {config[key]}"
    if absent:
        return
    if len(set(pool.get("moe.num_experts", ()))) > 1:
        yield f"moe.num_experts: expected as many in every layer, found {pool['moe.num_experts']}"
    if pool.get("moe.top_k_experts", -1) not in (-1, 1, 2):
        yield f"moe.top_k_experts: expected 1, 2 or -1, found {pool['moe.top_k_experts']}"
    if family == "qwen":
        width = config.get("kv_channels", 128) * config["num_attention_heads"]
        if width != config["hidden_size"]:
            yield f"kv_channels: expected heads of {config['hidden_size']} in all, found {width}"


# A converted model's run configuration from its settings, and the settings of a run's model.
#
# Settings are those of ``official_config.describe``.

BACKBONES = {"stablelm": "vl_stablelm", "qwen": "vl_qwen", "phi": "vl_phi2"}
POOLS = {"dynmoe": "dynmoe_vl_official", "topk": "moe_llava"}

FAMILIES = {ours: family for family, ours in ARCHITECTURES.items()}
ROUTERS = {"dynmoe.layers.TopAnyRouter": "dynmoe", "dynmoe.layers.TopKRouter": "topk"}

# Of transformers' configurations, all that the official code computes.
ONLY_OURS: dict[str, dict[str, Any]] = {
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
    if problems := list(_our_problems(cfg, config, family, weights)):
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
        "moe": _our_pool(cfg.moe, config.num_hidden_layers),
        "notes": [],
    }


def _our_pool(moe: DictConfig, depth: int) -> dict[str, Any]:
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


def _our_problems(
    cfg: DictConfig, config: Any, family: str, weights: Mapping[str, Tensor]
) -> Iterator[str]:
    for key, value in {**ONLY_OURS[family], **ONLY_OURS["every"]}.items():
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

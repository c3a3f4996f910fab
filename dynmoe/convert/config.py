"""Settings of MoE-LLaVA and DynMoE-LLaVA models: from and to their config.json, from and to runs.

``model_type`` is ``moe_llava_<family>``, or ``llava_<family>`` of a dense model, the result of
MoE-LLaVA's second stage, from which DynMoE starts. A converted model computes at evaluation the
same function as the head of the official repository:

- DynMoE (``conf/moe/dynmoe.yaml``): with any options of the router but ``combine=tutel``. The code
  of May 2024 had a capacity, which could drop tokens. ``dynmoe_official_deepspeed`` has the losses
  of the head, to continue training.
- MoE-LLaVA (``conf/moe/topk.yaml``), except for two properties of its gate
  (``sharded_moe.top2gating``), which ``describe`` notes: it draws the second expert with noise, at
  evaluation too, where ours is the most probable one, and it drops tokens over a capacity. In the
  published runs that capacity holds all tokens (2 choices * eval_capacity_factor 2 = 4 experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

PROJECTORS = ("linear", "mlp2x_gelu")
FITS = {"pad": "pad", "square": "crop"}  # image_aspect_ratio: ours


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


class FamilyConfig(NamedTuple):
    """A language model in the official config.json and in a configuration of transformers."""

    architecture: str
    """Its ``model_type`` in transformers."""
    backbone: str
    """Its option of ``conf/backbone``."""
    options: dict[str, str]
    """Options of transformers: their official names."""
    rope: dict[str, str]
    """Rope parameters of transformers: their official names."""
    official: dict[str, Any]
    """Defaults of the official keys, the only values that we compute."""
    ours: dict[str, Any]
    """Options of transformers, the only values that the official code computes."""


SIZES = _same(
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
)
GROUPED = {**SIZES, **_same("num_key_value_heads", "max_position_embeddings")}
DROPOUTS = _same("resid_pdrop", "embd_pdrop", "attention_dropout")
FAMILIES = {
    "stablelm": FamilyConfig(
        architecture="stablelm",
        backbone="vl_stablelm",
        options={**GROUPED, "use_qkv_bias": "use_qkv_bias", "layer_norm_eps": "norm_eps"},
        rope={"rope_theta": "rope_theta", "partial_rotary_factor": "rope_pct"},
        official={},
        ours={"hidden_act": "silu", "use_parallel_residual": False, "qk_layernorm": False},
    ),
    "qwen": FamilyConfig(
        architecture="qwen2",
        backbone="vl_qwen",
        # NOTE: over seq_length tokens Qwen rescales angles and queries, which Qwen2 does not.
        options={
            **SIZES,
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        rope={"rope_theta": "rotary_emb_base"},
        official={"rotary_pct": 1.0, "no_bias": True},
        ours={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "phi": FamilyConfig(
        architecture="phi",
        backbone="vl_phi2",
        options={**GROUPED, **_same("hidden_act", "layer_norm_eps"), **DROPOUTS},
        rope=_same("rope_theta", "partial_rotary_factor"),
        official={"qk_layernorm": False, "rope_scaling": None},
        ours={"qk_layernorm": False},
    ),
}
VISION = {"model": "mm_image_tower", "layer": "mm_vision_select_layer", "width": "mm_hidden_size"}
MOE = ("moe_layers_idx", "num_experts", "top_k_experts", "router_aux_loss_coef")

# Like ``FamilyConfig.official``, for every family, and for the node ``moe``.
OFFICIAL: dict[str, Any] = {
    "tie_word_embeddings": False,
    "mm_video_tower": None,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
}
OFFICIAL_MOE: dict[str, Any] = {"use_residual": False, "ep_size": 1}
# Like ``FamilyConfig.ours``, for every family.
OURS: dict[str, Any] = {"tie_word_embeddings": False}


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the model of an official config.json.

    ``family``; ``language_model``: ``architecture`` and ``options`` of transformers; ``vision``:
    ``model``, the ``layer`` whose patches are read, their ``width``, how an image is ``fit``;
    ``projector``; ``moe``: keys of ``conf/moe/<name>.yaml`` with a list of ``layers``; ``notes``:
    how the converted model differs.

    Raises:
        DataError: naming all keys that are missing, or whose values we cannot compute.
    """
    if problems := list(_official_problems(config)):
        raise DataError("\n".join(f"config.json: {problem}" for problem in problems))
    prefix, _, family = config["model_type"].partition("llava_")
    known, moe = FAMILIES[family], config["moe"] if prefix else None
    options = {ours: config[official] for ours, official in known.options.items()}
    rope = {ours: config[official] for ours, official in known.rope.items()}
    options["rope_parameters"] = {"rope_type": "default", **rope}
    if family == "qwen":
        options["intermediate_size"] //= 2  # w1 and w2 together
        options["num_key_value_heads"] = options["num_attention_heads"]
    return {
        "family": family,
        "language_model": {"architecture": known.architecture, "options": options},
        "vision": {
            **{ours: config[official] for ours, official in VISION.items()},
            "fit": FITS[config.get("image_aspect_ratio", "square")],
        },
        "projector": config.get("image_projector_type", "linear"),
        "moe": _moe_of_official(moe) if moe else {"name": "dense", "layers": []},
        "notes": list(_notes(moe)) if moe else [],
    }


def official_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model by its settings, the inverse of ``describe``."""
    family, moe = settings["family"], settings["moe"]
    known = FAMILIES[family]
    options, is_dense = settings["language_model"]["options"], not moe["layers"]
    config = {
        "model_type": f"llava_{family}" if is_dense else f"moe_llava_{family}",
        **{official: options[ours] for ours, official in known.options.items()},
        **{official: options["rope_parameters"][ours] for ours, official in known.rope.items()},
        **{official: settings["vision"][ours] for ours, official in VISION.items()},
        **known.official,
        **OFFICIAL,
        "image_aspect_ratio": {fit: name for name, fit in FITS.items()}[settings["vision"]["fit"]],
        "image_projector_type": settings["projector"],
        "mm_use_im_patch_token": False,  # the official default would add a token
        "use_mm_proj": True,
    }
    if family == "qwen":
        config["intermediate_size"] *= 2
        config["kv_channels"] = config["hidden_size"] // config["num_attention_heads"]
    if is_dense:
        return config
    top_k = moe.get("top_k", -1)
    config["moe"] = {
        **OFFICIAL_MOE,
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
    return config


def _moe_of_official(moe: Mapping[str, Any]) -> dict[str, Any]:
    top_k, slots = moe["top_k_experts"], moe["num_experts"][0]
    adaptive = top_k == -1
    return {
        "name": "dynmoe" if adaptive else "topk",
        # At the start of training; the weights say which experts are live.
        "num_experts": slots // 2 if adaptive else slots,
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
            "(eval_capacity_factor), here it serves all of them."
        )


def _official_problems(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    types = {f"{moe}llava_{name}": name for moe in ("moe_", "") for name in FAMILIES}
    if not isinstance(kind, str) or kind not in types:
        yield f"model_type: expected one of {', '.join(types)}, found {kind}"
        return
    family, has_experts = types[kind], kind.startswith("moe_")
    known = FAMILIES[family]
    moe = config.get("moe", {}) if has_experts else {}
    if not isinstance(moe, Mapping):
        yield f"moe: expected keys with values, found {moe}"
        return
    pool = {f"moe.{key}": value for key, value in moe.items()}
    found = {**config, **pool}
    needed = [*known.options.values(), *known.rope.values(), *VISION.values()]
    needed += [f"moe.{key}" for key in MOE if has_experts]
    if absent := [key for key in needed if found.get(key) in (None, [])]:
        yield f"expected the keys {', '.join(absent)}, found none"
    in_moe = {f"moe.{key}": value for key, value in OFFICIAL_MOE.items()}
    for key, value in {**known.official, **OFFICIAL, **in_moe}.items():
        if found.get(key, value) != value:
            yield f"{key}: expected {value}, found {found[key]}, which is not supported"
    for key, choices in {"image_projector_type": PROJECTORS, "image_aspect_ratio": FITS}.items():
        if key in config and config[key] not in choices:
            yield f"{key}: expected one of {', '.join(choices)}, found {config[key]}"
    wrong = [
        f"{key}: expected {words}, found {found[key]!r}"
        for key in needed
        for words, fits in [_expected(key)]
        if key not in absent and not fits(found[key])
    ]
    yield from wrong
    if absent or wrong:
        return
    if len(set(pool.get("moe.num_experts", ()))) > 1:
        yield f"moe.num_experts: expected as many in every layer, found {pool['moe.num_experts']}"
    if pool.get("moe.top_k_experts", -1) not in (-1, 1, 2):
        yield f"moe.top_k_experts: expected 1, 2 or -1, found {pool['moe.top_k_experts']}"
    if family == "qwen":
        width = config.get("kv_channels", 128) * config["num_attention_heads"]
        if width != config["hidden_size"]:
            yield f"kv_channels: expected heads of {config['hidden_size']} in all, found {width}"


def _expected(key: str) -> tuple[str, Callable[[Any], bool]]:
    """The values that a needed key of an official config.json may have: words, and a check."""
    if key in ("moe.moe_layers_idx", "moe.num_experts"):
        return (
            "a list of integers",
            lambda value: isinstance(value, list) and all(type(each) is int for each in value),
        )
    if key in ("hidden_act", "mm_image_tower"):
        return "text", lambda value: isinstance(value, str)
    if key == "use_qkv_bias":
        return "true or false", lambda value: isinstance(value, bool)
    return "a number", lambda value: type(value) in (int, float)


# Runs: their configuration from the settings of ``describe``, and the settings of their models.

MOE_OPTIONS = {"dynmoe": "dynmoe_vl_official", "topk": "moe_llava"}
ROUTERS = {"dynmoe.layers.TopAnyRouter": "dynmoe", "dynmoe.layers.TopKRouter": "topk"}

# Options of routers, the only values that evaluate as the official code does.
ROUTER_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "dynmoe": {"combine": ("constant_k", "through_k")},
    "topk": {
        "top_k": (1, 2),
        "capacity_factor": (None,),
        "weights_sum": ("one",),
        "forced_balance": (False,),
    },
}


def run_configuration(
    settings: Mapping[str, Any], vision: Mapping[str, Any], language_model: Path
) -> DictConfig:
    """Return the ``config.yaml`` of a converted model: ``task=vl`` without data to train on.

    ``vision``: the keys of ``weights.tower``; ``language_model``: a folder with config.json and
    tokenizer.
    """
    pool = dict(settings["moe"])
    name = MOE_OPTIONS.get(pool.pop("name"))
    stage = ["stage=moe", f"moe={name}"] if name else ["stage=instruct"]
    groups = [f"backbone={FAMILIES[settings['family']].backbone}", *stage]
    groups += ["task=vl", "data=questions", "trainer=default", "logger=none"]
    with search_path():
        cfg = compose(options.CONFIG_NAME, groups)
        backbone = {
            "model": None,
            "path": str(language_model),
            "pretrained": False,
            "projector": settings["projector"],
            "vision": {**vision, "layer": settings["vision"]["layer"]},
        }
        data, moe = {"fit": settings["vision"]["fit"]}, pool if name else {}
        with open_dict(cfg):
            cfg.merge_with(
                {"backbone": backbone, "data": data, "moe": moe, "stage": {"start": None}}
            )
        OmegaConf.resolve(cfg)
    return cfg


def hub_name(settings: Mapping[str, Any]) -> str:
    """Return the name of the family's published language model, which has a tokenizer."""
    with search_path():
        return str(options.own("backbone", FAMILIES[settings["family"]].backbone).model)


def settings_of(cfg: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of a run's model, whose backbone has the ``weights``.

    Raises:
        ConfigError: naming all settings that the official code does not support.
    """
    if modality(cfg, "backbone") != "vision-language":
        raise ConfigError("run: expected one of task=vl, whose model official code can read")
    node = OmegaConf.to_container(cfg.backbone, resolve=True)
    assert isinstance(node, dict)
    config = hub.configuration(node["model"], node["path"], node["architecture"], node["options"])
    families = {each.architecture: family for family, each in FAMILIES.items()}
    if config.model_type not in families:
        raise ConfigError(
            f"backbone: the official code has the language models {', '.join(families)}, found "
            f"{config.model_type}"
        )
    family = families[config.model_type]
    known = FAMILIES[family]
    if problems := list(_run_problems(cfg, config, family, weights)):
        raise ConfigError("\n".join(problems))
    sizes = {name: getattr(config, name) for name in known.options}
    if family == "qwen":
        sizes["num_key_value_heads"] = config.num_key_value_heads
    sizes["vocab_size"] = len(weights["language_model.model.embed_tokens.weight"])
    rope = {name: config.rope_parameters[name] for name in known.rope}
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
        "moe": _moe_of_run(cfg.moe, config.num_hidden_layers),
        "notes": [],
    }


def _moe_of_run(moe: DictConfig, depth: int) -> dict[str, Any]:
    layers = placed_blocks(moe.layers, depth)
    if not layers:
        return {"name": "dense", "layers": []}
    name = ROUTERS[moe.router._target_]
    keys = "num_experts", "max_experts", *(("top_k",) if name == "topk" else ())
    return {
        "name": name,
        **{key: moe[key] for key in (*keys, "init", "expert_dropout", "aux_weight")},
        "layers": layers,
    }


def _run_problems(
    cfg: DictConfig, config: Any, family: str, weights: Mapping[str, Tensor]
) -> Iterator[str]:
    for key, value in {**FAMILIES[family].ours, **OURS}.items():
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
    if not placed_blocks(cfg.moe.layers, config.num_hidden_layers):
        return
    router = cfg.moe.router
    name = ROUTERS.get(router._target_)
    if name is None:
        yield f"moe.router: expected one of {', '.join(ROUTERS)}, found {router._target_}"
        return
    if cfg.moe.get("shared_experts"):
        yield f"moe.shared_experts: expected 0, found {cfg.moe.shared_experts}"
    for key, values in ROUTER_OPTIONS[name].items():
        if router.get(key, values[0]) not in values:
            expected = " or ".join(map(str, values))
            yield f"moe.router.{key}: expected {expected}, found {router[key]}"

"""Weights of MoE-LLaVA and DynMoE-LLaVA under their published names and under ours, both ways.

Sources: ``moellava/model`` of github.com/PKU-YuanGroup/MoE-LLaVA (``language_model``,
``llava_arch``, ``multimodal_projector/builder``, ``multimodal_encoder``);
github.com/LINs-lab/DynMoE uses the same models, and its DeepSpeed
(``DeepSpeed-0.9.5/deepspeed/moe``: ``layer``, ``experts``, ``sharded_moe``) names the parts of an
MoE layer. Our names are those of transformers. ``config.describe`` returns the settings.

Shape suffixes: D model width, E experts, S slots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynmoe.backbones import hub
from dynmoe.backbones.weights import align, shortened
from dynmoe.errors import ConfigError, DataError

LANGUAGE = "language_model."

# Buffers of older transformers that are computed anew; our copy of the FFN before the experts.
DROPPED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$|\.mlp\.origin\.")
TOWER_LAYER = re.compile(r"\.encoder\.layers\.(\d+)\.")

Tensors = Sequence[Tensor]


def to_dynmoe(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return official weights under our names: ``vision.``, ``projector.``, ``language_model.``.

    ``settings`` are those of ``config.describe``. The image tower, which is frozen in training and
    which the official code reads from elsewhere, may be absent; its layers after the one that is
    read are left out. Tensors keep their dtype; some are views of the official ones.

    Raises:
        DataError: naming all names that are missing or unknown, or values that we cannot hold.
    """
    vision = f"{NAMES[settings['family']].body}.image_tower.image_tower.vision_model."
    every = [(piece.official, piece.ours, piece.to_ours) for piece in _pieces(settings)]
    state, _, others = align(state, {name for names, _, _ in every for name in names})
    if others:
        raise DataError(f"the weights do not fit the configuration; unknown: {shortened(others)}")
    unread = _unread([name for name in state if name.startswith(vision)], settings)
    read = {name: tensor for name, tensor in state.items() if name not in unread}
    return _convert(read, every, vision, "vision.model.")


def to_official(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return our weights under official names: the inverse of ``to_dynmoe``.

    Raises:
        DataError: naming all names that are missing or unknown, or values that the official model
            cannot hold.
    """
    vision = f"{NAMES[settings['family']].body}.image_tower.image_tower.vision_model."
    every = [(piece.ours, piece.official, piece.to_official) for piece in _pieces(settings)]
    return _convert(state, every, "vision.model.", vision)


class _Piece(NamedTuple):
    """Tensors that are converted together."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors] = list
    to_official: Callable[[Tensors], Tensors] = list


def _convert(
    state: Mapping[str, Tensor],
    pieces: Sequence[tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]],
    vision_from: str,
    vision_to: str,
) -> dict[str, Tensor]:
    kept = [name for name in state if not DROPPED.search(name)]
    vision = [name for name in kept if name.startswith(vision_from)]
    expected = dict.fromkeys(name for names, _, _ in pieces for name in names)
    missing = [name for name in expected if name not in state]
    unknown = [name for name in kept if name not in expected and not name.startswith(vision_from)]
    wrong = {"missing": missing, "unknown": unknown}
    if problems := [f"{word}: {shortened(names)}" for word, names in wrong.items() if names]:
        raise DataError(f"the weights do not fit the configuration; {'; '.join(problems)}")
    converted = {vision_to + name.removeprefix(vision_from): state[name] for name in vision}
    for names, targets, function in pieces:
        try:
            made = function([state[name] for name in names])
        except ValueError as error:
            raise DataError(f"{names[0]}: {error}") from None
        if len(made) != len(targets):
            raise DataError(f"{names[0]}: the configuration has another number of experts")
        converted.update(zip(targets, made, strict=True))
    return converted


def _unread(vision: Sequence[str], settings: Mapping[str, Any]) -> set[str]:
    """Return the names of the image tower's layers after the one that is read.

    That layer is counted from the end. A tower without its last norm ends with it already:
    ``to_official`` wrote it.
    """
    if not any(".post_layernorm." in name for name in vision):
        return set()
    layers = {name: int(found[1]) for name in vision if (found := TOWER_LAYER.search(name))}
    last = max(layers.values(), default=0) + 1 + settings["vision"]["layer"]
    return {name for name in vision if layers.get(name, 0) > last or ".post_layernorm." in name}


def _pieces(settings: Mapping[str, Any]) -> Iterator[_Piece]:
    family, moe = NAMES[settings["family"]], settings["moe"]
    options = settings["language_model"]["options"]
    depth = options["num_hidden_layers"]
    for ours, (official, leaves) in family.modules.items():
        for i in range(depth if "{i}" in ours else 1):
            yield from _renamed(official.format(i=i), LANGUAGE + ours.format(i=i), leaves)
    for i in range(depth):
        official, ours = family.block.format(i=i), LANGUAGE + BLOCK.format(i=i)
        yield from _qkv(family, i, BOTH if options.get("use_qkv_bias", True) else WEIGHT)
        if i in moe["layers"]:
            yield from _moe_layer(family, f"{official}.mlp.deepspeed_moe", f"{ours}.mlp", moe)
            continue
        for layer in family.ffn:
            names = f"{official}.mlp.{layer.official}", f"{ours}.mlp.{layer.dense}"
            yield from _renamed(*names, family.leaves)
    if not family.head_bias:
        head = LANGUAGE + "lm_head"
        yield _Piece(
            ("lm_head.weight",),
            (f"{head}.weight", f"{head}.bias"),
            lambda weight: [*weight, weight[0].new_zeros(len(weight[0]))],
            _drop_bias,
        )
    projector = f"{family.body}.mm_projector.image_spatial_proj"
    places = {"0": ""} if settings["projector"] == "linear" else {"0": ".0", "2": ".2"}
    for index, place in places.items():
        yield from _renamed(f"{projector}{place}", f"projector.{index}", BOTH)


def _renamed(official: str, ours: str, leaves: tuple[str, ...]) -> Iterator[_Piece]:
    for leaf in leaves:
        yield _Piece((f"{official}.{leaf}",), (f"{ours}.{leaf}",))


def _qkv(family: FamilyNames, i: int, leaves: tuple[str, ...]) -> Iterator[_Piece]:
    names = [name.format(i=i) for name in QKV]
    if family.fused_qkv is None:
        for name in names:
            yield from _renamed(name, LANGUAGE + name, leaves)
        return
    for leaf in leaves:
        yield _Piece(
            (f"{family.fused_qkv.format(i=i)}.{leaf}",),
            tuple(f"{LANGUAGE}{name}.{leaf}" for name in names),
            lambda fused: fused[0].chunk(3),
            lambda parts: [torch.cat(list(parts))],
        )


def _moe_layer(
    family: FamilyNames, official: str, ours: str, moe: Mapping[str, Any]
) -> Iterator[_Piece]:
    slots = range(moe["max_experts"])
    gate, active = f"{official}.gate.wg", f"{ours}.active_E"
    if moe["name"] == "topk":
        yield _Piece(
            (f"{gate}.weight",),
            (f"{ours}.router.weight", active),
            lambda weight: [*weight, torch.ones(len(weight[0]), dtype=torch.bool)],
            _drop_active,
        )
    else:
        parameters = "sim_matrix", "gates", "experts_mask", "temperature"
        yield _Piece(
            tuple(f"{gate}.{name}" for name in parameters),
            (
                *(f"{ours}.router.directions.{slot}" for slot in slots),
                *(f"{ours}.router.thresholds.{slot}" for slot in slots),
                active,
            ),
            _unstack_gate,
            _stack_gate,
        )
    for slot in slots:
        for layer in family.ffn:
            theirs = f"{official}.experts.deepspeed_experts.{slot}.{layer.official}"
            yield from _renamed(
                theirs, f"{ours}.experts.slots.{slot}.{layer.expert}", family.leaves
            )


def _unstack_gate(gate: Tensors) -> Tensors:
    """``GAMoEGateT``'s columns [D, S], thresholds [S], mask [S] and log-temperature [1]."""
    directions_DS, thresholds_S, mask_S, temperature = gate
    if temperature.any():
        raise ValueError(f"expected a temperature of 1, found exp({temperature.item():g})")
    active_S = mask_S != 0
    if not active_S.any() or (mask_S[active_S] != 1).any():
        raise ValueError(f"expected a mask of zeros and ones, found {mask_S.tolist()}")
    return [*directions_DS.unbind(1), *thresholds_S.unbind(), active_S]


def _stack_gate(gate: Tensors) -> Tensors:
    *vectors, active_S = gate
    directions, thresholds = vectors[: len(active_S)], vectors[len(active_S) :]
    thresholds_S = torch.stack(thresholds)
    zero = thresholds_S.new_zeros(1)
    return [torch.stack(directions, 1), thresholds_S, active_S.to(thresholds_S.dtype), zero]


def _drop_active(router: Tensors) -> Tensors:
    weight_ED, active_E = router
    if not active_E.all():
        raise ValueError("expected a fixed pool, found slots without an expert")
    return [weight_ED]


def _drop_bias(head: Tensors) -> Tensors:
    weight, bias = head
    if bias.any():
        raise ValueError("expected a zero bias, as the official head has none")
    return [weight]


# Names of the parts of the three language models.

BLOCK = "model.layers.{i}"
QKV = (f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj", f"{BLOCK}.self_attn.v_proj")
WEIGHT, BOTH = ("weight",), ("weight", "bias")


class FFNLinear(NamedTuple):
    """The names of a linear layer of an FFN: official, ours in a dense block, ours in an expert."""

    official: str
    dense: str
    expert: str


@dataclass(frozen=True)
class FamilyNames:
    """A language model by MoE-LLaVA's names and by those of transformers. ``{i}``: the block."""

    body: str
    """The official module that holds the image tower and the projector."""
    block: str
    modules: Mapping[str, tuple[str, tuple[str, ...]]]
    """Our name: the official one, and the parameters of the module. FFNs, queries, keys and values
    are separate."""
    ffn: tuple[FFNLinear, ...]
    leaves: tuple[str, ...] = WEIGHT
    """The parameters of a linear layer of an FFN."""
    fused_qkv: str | None = None
    """The linear layer of queries, keys and values, in this order, if they share one."""
    head_bias: bool = True
    """False: transformers gives the head a bias, the official model does not."""


def _same(leaves: tuple[str, ...], *names: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {name: (name, leaves) for name in names}


def _gated(*official: str) -> tuple[FFNLinear, ...]:
    ours = ("gate", "up", "down")
    return tuple(
        FFNLinear(theirs, f"{name}_proj", name) for theirs, name in zip(official, ours, strict=True)
    )


NAMES: dict[str, FamilyNames] = {
    # stablelm/modeling_stablelm_epoch.py
    "stablelm": FamilyNames(
        body="model",
        block=BLOCK,
        modules={
            **_same(WEIGHT, "model.embed_tokens", "lm_head", f"{BLOCK}.self_attn.o_proj"),
            **_same(BOTH, f"{BLOCK}.input_layernorm", f"{BLOCK}.post_attention_layernorm"),
            **_same(BOTH, "model.norm"),
        },
        ffn=_gated("gate_proj", "up_proj", "down_proj"),
    ),
    # qwen/modeling_qwen.py: the first Qwen, whose mathematics up to ``seq_length``
    # tokens is Qwen2's. Its FFN is c_proj(w1(x) * silu(w2(x))).
    "qwen": FamilyNames(
        body="transformer",
        block="transformer.h.{i}",
        modules={
            "model.embed_tokens": ("transformer.wte", WEIGHT),
            f"{BLOCK}.input_layernorm": ("transformer.h.{i}.ln_1", WEIGHT),
            f"{BLOCK}.self_attn.o_proj": ("transformer.h.{i}.attn.c_proj", WEIGHT),
            f"{BLOCK}.post_attention_layernorm": ("transformer.h.{i}.ln_2", WEIGHT),
            "model.norm": ("transformer.ln_f", WEIGHT),
            "lm_head": ("lm_head", WEIGHT),
        },
        ffn=_gated("w2", "w1", "c_proj"),
        fused_qkv="transformer.h.{i}.attn.c_attn",
    ),
    # phi/modeling_phi.py; the head is that of llava_phi_moe.py.
    "phi": FamilyNames(
        body="model",
        block=BLOCK,
        modules={
            **_same(WEIGHT, "model.embed_tokens"),
            **_same(BOTH, f"{BLOCK}.input_layernorm", f"{BLOCK}.self_attn.dense"),
            **_same(BOTH, "model.final_layernorm"),
        },
        ffn=(FFNLinear("fc1", "fc1", "0"), FFNLinear("fc2", "fc2", "2")),
        leaves=BOTH,
        head_bias=False,
    ),
}


# Image towers: CLIPs by OpenAI or in a folder. NOTE: MoE-LLaVA's SigLIP is not supported: the
# official code takes the first patch for a class token, which SigLIP lacks, and drops it.

# OpenAI's CLIPs: pixels of an image and of a patch.
CLIPS = {
    "clip-vit-large-patch14-336": (336, 14),
    "clip-vit-large-patch14": (224, 14),
    "clip-vit-base-patch16": (224, 16),
    "clip-vit-base-patch32": (224, 32),
}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def tower(name: str, folder: str | None) -> dict[str, Any]:
    """Return the keys of ``backbone.vision`` for the ``mm_image_tower`` of a config.json.

    ``name`` is a name on the hub, or a path that ends with one. ``folder`` holds the tower's
    config.json, preprocessor_config.json and weights instead: no network.

    Raises:
        ConfigError: a folder that holds no CLIP, or an unknown tower without a folder.
    """
    if folder is not None:
        return {"model": name, **_of_folder(folder)}
    last = Path(name).name
    if last not in CLIPS:
        raise ConfigError(
            f"mm_image_tower={name}: expected one of OpenAI's {', '.join(CLIPS)}. Another CLIP is "
            "read from its folder: vision=FOLDER with config.json, preprocessor_config.json and "
            "weights"
        )
    px, patch_px = CLIPS[last]
    sizes = {"image_size": px, "patch_size": patch_px}
    return {"model": f"openai/{last}", "path": None, **sizes, "mean": MEAN, "std": STD}


def _of_folder(folder: str) -> dict[str, Any]:
    path = str(Path(folder).expanduser().resolve())
    whole = hub.configuration(None, path, None, {}, "vision")
    if whole.model_type not in ("clip", "clip_vision_model"):
        raise ConfigError(f"vision={folder}: expected a CLIP, found a '{whole.model_type}'")
    config = getattr(whole, "vision_config", whole)
    file = Path(path, "preprocessor_config.json")
    images = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        "path": path,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "mean": images.get("image_mean", MEAN),
        "std": images.get("image_std", STD),
    }

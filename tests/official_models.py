"""Tiny models of MoE-LLaVA and DynMoE-LLaVA: config.json and weights under the published names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("stablelm", "qwen", "phi")
DENSE = 0
VOCAB, WIDTH, HIDDEN, HEADS, DEPTH, EXPERTS, PATCHES = 40, 16, 24, 2, 3, 4, 12
MOE_LAYERS = [0, 2]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "stablelm": {
        "intermediate_size": HIDDEN,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "use_qkv_bias": True,
        "norm_eps": 1e-3,
        "rope_theta": 5000,
        "rope_pct": 0.5,
    },
    "qwen": {
        "intermediate_size": 2 * HIDDEN,
        "kv_channels": WIDTH // HEADS,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-3,
        "rotary_emb_base": 5000.0,
        "rotary_pct": 1.0,
        "no_bias": True,
    },
    "phi": {
        "intermediate_size": HIDDEN,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.5,
    },
}


def config_of(family: str, top_k: int) -> dict[str, Any]:
    """``top_k`` -1: DynMoE; ``DENSE``: MoE-LLaVA's second stage."""
    moe = {
        "moe_layers_idx": MOE_LAYERS,
        "num_experts": [EXPERTS] * len(MOE_LAYERS),
        "top_k_experts": top_k,
        "router_aux_loss_coef": 0.01,
        "eval_capacity_factor": 2.0,
        "use_residual": False,
        "ep_size": 1,
    }
    return {
        "model_type": f"llava_{family}" if top_k == DENSE else f"moe_llava_{family}",
        **SIZES,
        **CONFIGS[family],
        "tie_word_embeddings": False,
        "mm_image_tower": "openai/clip-vit-large-patch14-336",
        "mm_video_tower": None,
        "mm_hidden_size": PATCHES,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        **({} if top_k == DENSE else {"moe": moe}),
    }


def shapes(family: str, top_k: int, tower: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as the official modules register them."""
    body, blocks = ("transformer", "h") if family == "qwen" else ("model", "layers")
    kv = WIDTH // HEADS * CONFIGS[family].get("num_key_value_heads", HEADS)
    norm = _rms if family == "qwen" else _norm
    words = "wte" if family == "qwen" else "embed_tokens"
    last = {"stablelm": "norm", "qwen": "ln_f", "phi": "final_layernorm"}[family]
    yield f"{body}.{words}.weight", (VOCAB, WIDTH)
    yield from norm(f"{body}.{last}")
    yield "lm_head.weight", (VOCAB, WIDTH)
    for i in range(DEPTH):
        block = f"{body}.{blocks}.{i}"
        if family == "qwen":
            yield from norm(f"{block}.ln_1")
            yield from norm(f"{block}.ln_2")
            yield from _linear(f"{block}.attn.c_attn", WIDTH, 3 * WIDTH, bias=True)
            yield from _linear(f"{block}.attn.c_proj", WIDTH, WIDTH, bias=False)
        else:
            yield from norm(f"{block}.input_layernorm")
            for name, out in {"q_proj": WIDTH, "k_proj": kv, "v_proj": kv}.items():
                yield from _linear(f"{block}.self_attn.{name}", WIDTH, out, bias=True)
        if family == "stablelm":
            yield from norm(f"{block}.post_attention_layernorm")
            yield from _linear(f"{block}.self_attn.o_proj", WIDTH, WIDTH, bias=False)
        if family == "phi":
            yield from _linear(f"{block}.self_attn.dense", WIDTH, WIDTH, bias=True)
        if i not in MOE_LAYERS or top_k == DENSE:
            yield from _ffn(family, f"{block}.mlp")
            continue
        moe = f"{block}.mlp.deepspeed_moe"
        for expert in range(EXPERTS):
            yield from _ffn(family, f"{moe}.experts.deepspeed_experts.{expert}")
        if top_k == -1:
            yield f"{moe}.gate.wg.sim_matrix", (WIDTH, EXPERTS)
            yield f"{moe}.gate.wg.gates", (EXPERTS,)
            yield f"{moe}.gate.wg.experts_mask", (EXPERTS,)
            yield f"{moe}.gate.wg.temperature", (1,)
        else:
            yield from _linear(f"{moe}.gate.wg", WIDTH, EXPERTS, bias=False)
    for layer, width in {"0": PATCHES, "2": WIDTH}.items():
        yield from _linear(f"{body}.mm_projector.image_spatial_proj.{layer}", width, WIDTH, True)
    if tower:
        vision = f"{body}.image_tower.image_tower.vision_model"
        yield f"{vision}.embeddings.class_embedding", (PATCHES,)
        for i in range(3):
            yield from _linear(f"{vision}.encoder.layers.{i}.mlp.fc1", PATCHES, PATCHES, True)
        yield from _norm(f"{vision}.post_layernorm")


def weights(family: str, top_k: int, tower: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(family, top_k, tower):
        words = name.endswith(("wte.weight", "embed_tokens.weight"))
        state[name] = torch.randn(shape, generator=generator) * (1.0 if words else 0.3)
        if len(shape) == 1 and name.endswith("weight"):  # of a norm
            state[name] += 1
        if name.endswith("experts_mask"):  # another number of experts in every layer
            state[name] = (torch.arange(EXPERTS) != (1 if ".0." in name else 3)).float()
        if name.endswith("temperature"):
            state[name] = torch.zeros(1)
    return state


def _linear(name: str, width: int, out: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (WIDTH,)
    yield f"{name}.bias", (WIDTH,)


def _rms(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (WIDTH,)


def _ffn(family: str, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    up, down = {
        "stablelm": (("gate_proj", "up_proj"), "down_proj"),
        "qwen": (("w1", "w2"), "c_proj"),
        "phi": (("fc1",), "fc2"),
    }[family]
    for layer in up:
        yield from _linear(f"{name}.{layer}", WIDTH, HIDDEN, bias=family == "phi")
    yield from _linear(f"{name}.{down}", HIDDEN, WIDTH, bias=family == "phi")

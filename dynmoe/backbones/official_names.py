"""What MoE-LLaVA and DynMoE-LLaVA call the parts of their three language models, and we do.

Sources: ``language_model`` of github.com/PKU-YuanGroup/MoE-LLaVA, in ``moellava/model``; that of
github.com/LINs-lab/DynMoE uses the same models. Ours are transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = "model.layers.{i}"
QKV = (f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj", f"{BLOCK}.self_attn.v_proj")
WEIGHT, BOTH = ("weight",), ("weight", "bias")


class Linear(NamedTuple):
    """A linear layer of an FFN by its three names: theirs, ours in a dense block, in an expert."""

    official: str
    dense: str
    expert: str


@dataclass(frozen=True)
class Family:
    """A language model by MoE-LLaVA's names and by those of transformers. ``{i}``: the block."""

    body: str
    """Where theirs keeps the image tower and the projector."""
    block: str
    modules: Mapping[str, tuple[str, tuple[str, ...]]]
    """Ours: theirs, and what the module holds. Without FFNs, queries, keys and values."""
    ffn: tuple[Linear, ...]
    leaves: tuple[str, ...] = WEIGHT
    """What a linear layer of an FFN holds."""
    fused_qkv: str | None = None
    """Queries, keys and values in one linear layer, in this order."""
    head_bias: bool = True
    """False: transformers gives the head a bias which theirs has not."""


def _same(leaves: tuple[str, ...], *names: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {name: (name, leaves) for name in names}


FAMILIES: dict[str, Family] = {
    # stablelm/modeling_stablelm_epoch.py
    "stablelm": Family(
        body="model",
        block=BLOCK,
        modules={
            **_same(WEIGHT, "model.embed_tokens", "lm_head", f"{BLOCK}.self_attn.o_proj"),
            **_same(BOTH, f"{BLOCK}.input_layernorm", f"{BLOCK}.post_attention_layernorm"),
            **_same(BOTH, "model.norm"),
        },
        ffn=(
            Linear("gate_proj", "gate_proj", "gate"),
            Linear("up_proj", "up_proj", "up"),
            Linear("down_proj", "down_proj", "down"),
        ),
    ),
    # qwen/modeling_qwen.py: the first Qwen, whose mathematics up to ``seq_length``
    # tokens is Qwen2's. Its FFN is c_proj(w1(x) * silu(w2(x))).
    "qwen": Family(
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
        ffn=(
            Linear("w2", "gate_proj", "gate"),
            Linear("w1", "up_proj", "up"),
            Linear("c_proj", "down_proj", "down"),
        ),
        fused_qkv="transformer.h.{i}.attn.c_attn",
    ),
    # phi/modeling_phi.py; the head is that of llava_phi_moe.py.
    "phi": Family(
        body="model",
        block=BLOCK,
        modules={
            **_same(WEIGHT, "model.embed_tokens"),
            **_same(BOTH, f"{BLOCK}.input_layernorm", f"{BLOCK}.self_attn.dense"),
            **_same(BOTH, "model.final_layernorm"),
        },
        ffn=(Linear("fc1", "fc1", "0"), Linear("fc2", "fc2", "2")),
        leaves=BOTH,
        head_bias=False,
    ),
}

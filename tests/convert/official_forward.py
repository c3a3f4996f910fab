"""The official forward pass at evaluation, written down token by token from the published code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def logits(family: str, state: State, config: dict[str, Any], ids: Tensor) -> Tensor:
    """Return logits [N, vocabulary] of one text [N]."""
    body = "transformer" if family == "qwen" else "model"
    words = {"qwen": "wte"}.get(family, "embed_tokens")
    last = {"stablelm": "norm", "qwen": "ln_f", "phi": "final_layernorm"}[family]
    x = state[f"{body}.{words}.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        block = f"{body}.{'h' if family == 'qwen' else 'layers'}.{i}"
        if family == "phi":  # attention and FFN side by side
            h = norm(family, state, f"{block}.input_layernorm", x)
            x = (
                attention(family, state, block, config, h)
                + mlp(family, state, block, config, h)
                + x
            )
            continue
        first, second = (
            ("ln_1", "ln_2")
            if family == "qwen"
            else ("input_layernorm", "post_attention_layernorm")
        )
        h = norm(family, state, f"{block}.{first}", x)
        x = x + attention(family, state, block, config, h)
        x = x + mlp(family, state, block, config, norm(family, state, f"{block}.{second}", x))
    return norm(family, state, f"{body}.{last}", x) @ state["lm_head.weight"].T


def norm(family: str, state: State, name: str, x: Tensor) -> Tensor:
    if family == "qwen":
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * state[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-3)


def attention(family: str, state: State, block: str, config: dict[str, Any], x: Tensor) -> Tensor:
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    if family == "qwen":
        q, k, v = linear(state, f"{block}.attn.c_attn", x).split(config["hidden_size"], dim=1)
        rotated, base, out = size, config["rotary_emb_base"], f"{block}.attn.c_proj"
    else:
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (linear(state, f"{block}.self_attn.{name}", x) for name in names)
        share = config["rope_pct" if family == "stablelm" else "partial_rotary_factor"]
        rotated, base = int(share * size), config["rope_theta"]
        out = f"{block}.self_attn.{'o_proj' if family == 'stablelm' else 'dense'}"
    q, k, v = (part.view(len(x), -1, size) for part in (q, k, v))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    q, k = rotate(q, rotated, base), rotate(k, rotated, base)
    found = []
    for n in range(len(x)):
        per_head = []
        for head in range(heads):
            weight = (k[: n + 1, head] @ q[n, head] / size**0.5).softmax(0)
            per_head.append(weight @ v[: n + 1, head])
        found.append(torch.cat(per_head))
    return linear(state, out, torch.stack(found))


def rotate(x: Tensor, rotated: int, base: float) -> Tensor:
    """The first ``rotated`` numbers of every head, in two halves."""
    half = rotated // 2
    angle = torch.arange(len(x))[:, None] / base ** (torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x.split([half, half, x.shape[-1] - rotated], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def mlp(family: str, state: State, block: str, config: dict[str, Any], x: Tensor) -> Tensor:
    moe = f"{block}.mlp.deepspeed_moe"
    if not any(name.startswith(moe) for name in state):
        return ffn(family, state, f"{block}.mlp", x)
    gate: Callable[..., dict[int, float]]
    gate = top2 if config["moe"]["top_k_experts"] == 2 else top_any
    rows = []
    for token in x:
        chosen = gate(state, f"{moe}.gate.wg", token)
        experts = {e: f"{moe}.experts.deepspeed_experts.{e}" for e in chosen}
        rows.append(sum(chosen[e] * ffn(family, state, experts[e], token) for e in chosen))
    return torch.stack(rows)  # type: ignore[arg-type]


def ffn(family: str, state: State, name: str, x: Tensor) -> Tensor:
    if family == "phi":
        hidden = F.gelu(linear(state, f"{name}.fc1", x), approximate="tanh")
        return linear(state, f"{name}.fc2", hidden)
    if family == "qwen":
        hidden = linear(state, f"{name}.w1", x) * F.silu(linear(state, f"{name}.w2", x))
        return linear(state, f"{name}.c_proj", hidden)
    hidden = F.silu(linear(state, f"{name}.gate_proj", x)) * linear(state, f"{name}.up_proj", x)
    return linear(state, f"{name}.down_proj", hidden)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def top2(state: State, name: str, token: Tensor) -> dict[int, float]:
    """``top2gating`` without its noise and with room for all tokens: weights by expert."""
    gates = (state[f"{name}.weight"] @ token).softmax(0).tolist()
    first, second = sorted(range(len(gates)), key=lambda e: -gates[e])[:2]
    total = gates[first] + gates[second]
    return {first: gates[first] / total, second: gates[second] / total}


def top_any(state: State, name: str, token: Tensor) -> dict[int, float]:
    """``GAMoEGateT`` and ``topanygating_opt``: equal weights, by expert."""
    scale = state[f"{name}.temperature"].exp()
    columns = F.normalize(state[f"{name}.sim_matrix"], dim=0)
    score = torch.sigmoid(F.normalize(token, dim=0) @ columns * scale)
    score = (score * state[f"{name}.experts_mask"]).tolist()
    threshold = torch.sigmoid(state[f"{name}.gates"] * scale).tolist()
    chosen = [e for e in range(len(score)) if score[e] > threshold[e]]
    if not chosen:
        chosen = [max(range(len(score)), key=score.__getitem__)]
    return dict.fromkeys(chosen, 1 / len(chosen))

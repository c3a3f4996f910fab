"""Models that are mixtures already: their experts as ours, under their own router or another."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dynmoe.backbones.families import FAMILIES, UNFIT
from dynmoe.backbones.mixtures import own_router
from dynmoe.backbones.surgery import add_moe_layers, is_mixture
from dynmoe.backbones.text import TextClassifier, build_text_classifier
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    MoELayer,
    TopAnyRouter,
    TopKRouter,
    mask_padding,
    moe_layers,
    record_routing,
)
from dynmoe.metrics import efficiency

SIZES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 40},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
}
LOCAL = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}
NARROW = {**ROUTED, "moe_intermediate_size": 8}
HEADED = {**NARROW, "head_dim": 8}
DEEPSEEK = {
    **{**SIZES, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
LATENT = {
    **{**DEEPSEEK, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**LOCAL, "head_dim": 8},
    "minimax": {**LOCAL, "head_dim": 8, "layer_types": ["full_attention"] * 3},
    "olmoe": ROUTED,
    "flex_olmo": ROUTED,
    "mellum": HEADED,
    "qwen3_moe": {**HEADED, "norm_topk_prob": True},
    "qwen2_moe": {**NARROW, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
    "qwen3_next": {
        **{**HEADED, "shared_expert_intermediate_size": 8},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        **{
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention"] + ["full_attention"] * 2,
        },
    },
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 8},
    "jamba": {
        **{**ROUTED, "mamba_d_state": 4, "mamba_expand": 1, "expert_layer_offset": 0},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "routed_scaling_factor": 3.0},
    "deepseek_v3": {**LATENT, "q_lora_rank": 8},
    "dots1": {**DEEPSEEK, "head_dim": 8},
    "glm4_moe": {**DEEPSEEK, "head_dim": 8},
    "ernie4_5_moe": {
        **{**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "head_dim": 8},
        "moe_num_shared_experts": 1,
    },
    "phimoe": LOCAL,
}
OWN = [name for name in MODELS if FAMILIES[name].weights]


def decoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**MODELS[name], **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def keep(model: nn.Module, router: Any = own_router, **kwargs: Any) -> nn.Module:
    options = {"max_experts": 4, "layers": "all", "init": "keep", **kwargs}
    options = {"num_experts": 4, **options}
    add_moe_layers(model, router=router, **options)
    return model


def tokens(lengths: tuple[int, ...] = (7, 4, 5), width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", OWN)
def test_own_routing_stays_the_function_of_the_model(name: str) -> None:
    """Values, all gradients and greedy answers; padding routes nowhere."""
    native = decoder(name)
    ours = keep(copy.deepcopy(native))
    layers = moe_layers(ours)
    assert layers and all(isinstance(layer.router, TopKRouter) for layer in layers.values())
    batch = tokens()
    real = batch["attention_mask"].bool()
    with mask_padding(ours, real):
        found = ours(**batch).logits[real]
    expected = native(**batch).logits[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    theirs = dict(native.named_parameters())
    seen = 0
    for path, layer in layers.items():
        place = path.removesuffix(".moe")
        gate_up = theirs[f"{place}.experts.gate_up_proj"].grad
        down = theirs[f"{place}.experts.down_proj"].grad
        router = theirs[f"{place}.{FAMILIES[name].router}.weight"].grad
        torch.testing.assert_close(layer.router.weight.grad, router, atol=1e-4, rtol=1e-4)
        for slot, expert in enumerate(layer.experts.slots):
            if expert.down.weight.grad is None:
                assert not gate_up[slot].any()
                continue
            seen += 1
            torch.testing.assert_close(
                expert.gate_up.weight.grad, gate_up[slot], atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(expert.down.weight.grad, down[slot], atol=1e-4, rtol=1e-4)
    assert seen
    kept = {n: p for n, p in ours.named_parameters() if n in theirs}
    assert kept.keys() >= {n for n in theirs if "self_attn" in n or "norm" in n}
    for path, parameter in kept.items():
        torch.testing.assert_close(parameter.grad, theirs[path].grad, atol=1e-4, rtol=1e-4)

    prompt = {
        "input_ids": batch["input_ids"][:, :4],
        "attention_mask": batch["attention_mask"][:, :4],
    }
    said = [m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (native, ours)]
    assert torch.equal(*said)

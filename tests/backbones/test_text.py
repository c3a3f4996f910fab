"""Text classifiers with MoE layers: dense at the start, and padding changes nothing."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.text import TextClassifier, build_text_classifier
from dynmoe.layers import (
    AverageKeyRouter,
    TopAnyRouter,
    TopKRouter,
    moe_layers,
)
from dynmoe.layers.ffn import read_ffn

WIDE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
SIZES = {**WIDE, "intermediate_size": 32}
GROUPED = {**SIZES, "num_key_value_heads": 1}
HEADED = {**GROUPED, "head_dim": 8}
DISENTANGLED = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert", "mpnet"], SIZES),
    "electra": {**SIZES, "embedding_size": 16},
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED,
    "distilbert": {**WIDE, "hidden_dim": 32},
    "gpt2": {**WIDE, "n_inner": 32},
    "gpt_neo": {**WIDE, "intermediate_size": 32, "attention_layers": ["global", "local"]},
    **dict.fromkeys(["gpt_neox", "phi"], SIZES),
    **dict.fromkeys(["gemma", "llama", "mistral", "qwen3"], HEADED),
    **dict.fromkeys(["qwen2", "smollm3", "stablelm"], GROUPED),
}
GATED = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "stablelm", "gemma"}
NO_DROPOUT = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
NO_DROPOUT["gpt2"] = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)


def classifier(architecture: str, options: Any = None, **kwargs: Any) -> TextClassifier:
    torch.manual_seed(0)
    model = build_text_classifier(
        None,
        3,
        vocab_size=40,
        pad_token_id=0,
        architecture=architecture,
        options={**MODELS[architecture], **(options or {})},
        **kwargs,
    )
    for name, parameter in model.named_parameters():  # biases start at 0: they would hide errors
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


def add(model: nn.Module, router: Any, num_experts: int = 4, **kwargs: Any) -> nn.Module:
    options = {"max_experts": num_experts, "layers": "all", "init": "copy", **kwargs}
    add_moe_layers(model, router=router, num_experts=num_experts, **options)
    return model


def tokens(lengths: tuple[int, ...] = (7, 4, 5), width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_copies_start_at_the_dense_function(name: str) -> None:
    """As long as every token has an expert."""
    dense = classifier(name)
    expected = dense(tokens())
    for router in (partial(TopKRouter, top_k=2), TopAnyRouter):
        sparse = add(copy.deepcopy(dense), router)
        assert len(moe_layers(sparse)) == 2
        for layer in moe_layers(sparse).values():
            for threshold in getattr(layer.router, "thresholds", []):
                nn.init.constant_(threshold, -10.0)
            assert (read_ffn(layer.experts.slots[0]) is None) == (name in GATED)
        torch.testing.assert_close(sparse(tokens()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["cluster", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_all_parts_together_are_the_dense_function(name: str, init: str) -> None:
    dense = classifier(name)
    expected = dense(tokens())
    before = sum(p.numel() for p in dense.parameters())
    add(dense, partial(AverageKeyRouter, top_k=8), 8, init=init)
    assert sum(p.numel() for p in dense.parameters()) == before
    torch.testing.assert_close(dense(tokens()), expected, atol=1e-5, rtol=0)

"""Every type of model that can have MoE layers: dense at the start, padding, parts, generation."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from dynmoe.backbones import hub
from dynmoe.backbones.forms import Whole
from dynmoe.backbones.surgery import FORMS, REFUSED, add_moe_layers
from dynmoe.backbones.text import build_text_classifier
from dynmoe.errors import ConfigError
from dynmoe.layers import AverageKeyRouter, TopKRouter, mask_padding, moe_layers

# One of each form, and of each code around it. The others are behind the marker.
QUICK = (
    *("apertus", "bert", "biogpt", "bitnet", "bloom", "cohere", "ctrl", "deberta-v2", "distilbert"),
    *("esm", "eurobert", "falcon", "falcon_h1", "gemma2", "gemma3n_text", "glm4", "gpt2", "gptj"),
    *("granite", "gte", "lfm2", "llama", "modernbert", "moshi", "mpt", "nemotron", "nomic_bert"),
    *("olmo3", "opt", "phi", "phi3", "recurrent_gemma", "roberta-prelayernorm", "seed_oss"),
    *("stablelm", "starcoder2"),
)
HEADS = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
DECODERS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
ROWS = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow, id=name) for name in FORMS
]


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {**tiny(name), **options}
    if name in DECODERS:
        config = hub.configuration(None, None, name, options)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = build_text_classifier(None, 3, architecture=name, options=options).model
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # biases start at 0: they would hide errors
            nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim > 1:  # answers would be one word, and FFNs without a say
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def add(model: nn.Module, router: Any, num_experts: int = 4, **kwargs: Any) -> nn.Module:
    options = {"max_experts": num_experts, "layers": "all", "init": "copy", **kwargs}
    add_moe_layers(model, router=router, num_experts=num_experts, **options)
    return model


def read(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of texts, of their words where it is a language model."""
    with mask_padding(model, mask.bool()):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits if logits.ndim == 2 else logits * mask[..., None]


@pytest.mark.parametrize("name", ROWS)
def test_a_model_with_moe_layers(name: str) -> None:
    top_2 = partial(TopKRouter, top_k=2)
    dense = build(name)
    # Before any call: some keep a state of the last text.
    copies, fresh = (add(copy.deepcopy(dense), top_2, init=init) for init in ("copy", "fresh"))
    parts = copy.deepcopy(dense)
    mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
    ids = torch.randint(5, 40, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    expected = read(dense, ids, mask)

    found = read(copies, ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    layers = moe_layers(copies)
    assert len(layers) == 2
    found.square().sum().backward()
    for layer in layers.values():
        grads = [p.grad for mlp in layer.experts.slots for p in mlp.parameters()]
        assert sum(grad is not None and bool(grad.any()) for grad in grads) >= len(grads) / 2

    if isinstance(FORMS[name], Whole):
        with pytest.raises(ConfigError, match=r"moe.init.*no parts.*moe.init=copy"):
            add(parts, top_2, init="random")
    elif name != "apertus":
        router = partial(AverageKeyRouter, top_k=4, weights_sum="k")
        found = read(add(parts, router, init="random"), ids, mask)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    bare = read(fresh, ids[:, :4], mask[:, :4])
    padded = read(fresh, F.pad(ids[:, :4], (0, 2)), F.pad(mask[:, :4], (0, 2)))
    assert not torch.allclose(bare, expected[:, : bare.shape[1]], atol=1e-3)
    padded = padded if padded.ndim == 2 else padded[:, :4]
    torch.testing.assert_close(padded, bare, atol=1e-5, rtol=1e-5)

    if name in DECODERS:
        torch.testing.assert_close(generated(fresh, ids[:1]), greedy(fresh, ids[:1]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("doge", {"is_moe": True}, r"^backbone.options.is_moe: expected False.*mixtures already"),
        ("bloom", {"slow_but_exact": True}, r"^backbone.options.slow_but_exact: expected False"),
    ],
)
def test_options_that_change_the_ffn_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        add(build(name, **options), partial(TopKRouter, top_k=2))


def test_parameters_beside_the_matrices_are_never_lost() -> None:
    model = build("llama")
    for block in model.model.layers:
        block.mlp.norm = nn.LayerNorm(32)
    with pytest.raises(ConfigError, match=r"LlamaMLP has parameters beside.*norm.weight"):
        add(model, partial(TopKRouter, top_k=2))


def test_output_biases_are_no_experts_part() -> None:
    """Top-1's weights below 1 scale no bias; a dropout after the FFN keeps its rate."""
    for name, options in (("llama", {"mlp_bias": True}), ("seed_oss", {"residual_dropout": 0.25})):
        model = add(build(name, **options), partial(TopKRouter, top_k=1), 2)
        mlp = model.model.layers[0].mlp
        expert = mlp.moe.experts.slots[0]
        assert expert.down.bias is None and not expert.training
        assert (expert.gate.bias is None) == (name == "seed_oss")
        if name == "llama":
            x = torch.randn(5, 16)
            torch.testing.assert_close(mlp(x) - mlp.moe(x), mlp.output.bias.expand(5, 16))
        else:
            assert mlp.dropout.p == 0.25 and not mlp.dropout.training


def test_the_page_lists_them_all() -> None:
    """docs/models.md: every type, whether it has both heads, and every refusal."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("## timm")[0]
    works, refused = page.split("Refused, and why:")
    types = re.sub(r"^\|.*?\|(?= )", "", works, flags=re.M)
    names = re.findall(r"([\w-]+)( \([CS][^)]*\))?(?=, | \|)", types)
    marks = {name: mark[2:3] for name, mark in names if name in FORMS}
    classifiers, causal = (set(heads) for heads in HEADS)
    assert marks == {
        name: "" if name in classifiers & causal else "S" if name in classifiers else "C"
        for name in FORMS
    }
    rows = re.findall(r"^\| ([\w, -]+) \| (.+) \|$", refused, re.M)
    assert {
        reason: kinds.replace(",", "") for kinds, reason in rows if reason in REFUSED
    } == REFUSED


def generated(model: Any, ids: Tensor, steps: int = 3) -> Tensor:
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": steps, "do_sample": False, "use_cache": True}
    rows: Tensor = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)
    return rows


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, steps: int = 3) -> Tensor:
    """Without a cache: the whole is read again for every token."""
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids

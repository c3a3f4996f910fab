"""The formulas for text classifiers against PyTorch's FLOP counter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from dynmoe.backbones.surgery import FORMS, add_moe_layers
from dynmoe.backbones.text import build_text_classifier
from dynmoe.layers import AverageKeyRouter, CosineTopKRouter, TopKRouter, moe_layers
from dynmoe.metrics.efficiency import activated, count, flops, total
from dynmoe.runtime import set_fused_attention

TOKENS = 7
MOES: dict[str, tuple[Any, str]] = {
    "top-2": (partial(TopKRouter, top_k=2), "copy"),
    "emoe": (partial(AverageKeyRouter, top_k=2, weights_sum="k"), "cluster"),
    "emoe_learn": (partial(CosineTopKRouter, top_k=2, weights_sum="k"), "random"),
}


def text_classifier(name: str, **kwargs: Any) -> nn.Module:
    model = build_text_classifier(
        None, 3, 40, 0, architecture=name, options=tiny(name), **kwargs
    ).eval()
    set_fused_attention(model, False)  # PyTorch's counter does not know the fused one of CPUs
    return model


def check(model: nn.Module) -> None:
    batches = []
    for size in (1, 3):
        ids = torch.full((size, TOKENS), 5)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    costs = count(model, batches[0])
    assert total(costs) == sum(p.numel() for p in model.parameters())
    layers = moe_layers(model)
    k = dict.fromkeys(layers, 2.0)
    experts = {name: len(layer.live) for name, layer in layers.items()}
    totals = []
    for batch in batches:
        with FlopCounterMode(display=False) as counter:
            model(batch)
        totals.append(counter.get_total_flops())
    # DeBERTa has products of positions alone, once a batch.
    assert 2 * flops(costs, experts, k) == totals[1] - totals[0]
    assert (flops(costs, experts, k) == totals[0]) == ("deberta" not in model.config.model_type)
    assert activated(costs, experts, k) <= total(costs)


@pytest.fixture(autouse=True)
def no_padding():  # type: ignore[no-untyped-def]
    """At "highest" no row is computed in vain (`grouped.row_multiple`)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


# One of each way to write a block; the others are variants of these.
QUICK = {"bert", "deberta-v2", "distilbert", "gpt2", "phi", "phi3", "llama"}
# Falcon's attention is fused as it is built, which PyTorch's counter does not know on CPUs; XMOD's
# computation depends on its data (languages), and is not counted.
HAVE_ONE = FORMS.keys() & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
CLASSIFIERS = sorted(HAVE_ONE - {"falcon", "xmod"})


@pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in CLASSIFIERS],
)
def test_flops_of_known_architectures(name: str) -> None:
    model = text_classifier(name)
    check(model)
    router, init = MOES["emoe"]
    add_moe_layers(model, router=router, num_experts=4, max_experts=4, layers=[0, 1], init=init)
    check(model)


@pytest.mark.parametrize("moe", MOES)
def test_flops_with_moe_layers(moe: str) -> None:
    """Of each router; FFNs of other forms are above."""
    model = text_classifier("bert")
    router, init = MOES[moe]
    add_moe_layers(model, router=router, num_experts=4, max_experts=4, layers=[1], init=init)
    check(model)


def test_flops_with_adapters() -> None:
    pytest.importorskip("peft")
    check(text_classifier("bert", lora={"r": 2}))


def test_flops_with_recomputed_blocks() -> None:
    check(text_classifier("bert", grad_checkpointing=True))


def test_the_price_of_fused_attention_is_that_of_plain_products() -> None:
    model = text_classifier("bert")
    sample = {"input_ids": torch.full((1, TOKENS), 5)}
    plain = count(model, sample)
    set_fused_attention(model, True)
    assert count(model, sample) == plain and plain["flops"] is not None

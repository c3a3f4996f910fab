"""Soft MoE: golden values of a port, the paper's equations, and its place in blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from golden_cases import cases
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.vision import build_vit
from dynmoe.errors import ConfigError
from dynmoe.layers import SoftMoELayer, SoftSlots, TopKRouter, mask_padding
from dynmoe.metrics.efficiency import activated, count, flops, total
from dynmoe.runtime import set_fused_attention

B, N, DIM, EXPERTS, SLOTS = 2, 5, 6, 3, 2


def port(case: Any) -> SoftMoELayer:
    values = {name: torch.tensor(value) for name, value in case["parameters"].items()}
    hidden, dim = values["experts.experts.0.0.weight"].shape
    mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
    make = partial(SoftSlots, slots_per_expert=case["slots_per_expert"], norm="rms")
    layer = SoftMoELayer(mlp, dim, make, case["num_experts"])
    layer.router.slots_EPD.data = values["slot_embeds"]
    layer.router.token_gain_D.data = values["norm.gamma"]
    layer.router.slot_gain_D.data = values["slot_norm.gamma"]
    for e, slot in enumerate(layer.experts.slots):
        for ours, theirs in (("0", "0"), ("2", "3")):
            for kind in ("weight", "bias"):
                value = values[f"experts.experts.{e}.{theirs}.{kind}"]
                slot.get_submodule(ours).get_parameter(kind).data = value
    return layer


@pytest.mark.parametrize("case", cases("softmoe"), ids=lambda case: case["name"])
def test_layer_is_the_port(case: Any) -> None:
    """But for padding, which gets a uniform mixture there and 0 here."""
    layer, x_BND = port(case), torch.tensor(case["x_BND"])
    mask = case["mask_BN"]
    real_BN = torch.ones(x_BND.shape[:2]).bool() if mask is None else torch.tensor(mask).bool()
    token_mask = None if mask is None else real_BN
    _, dispatch_BNS, combine_BNS = layer.router(x_BND, token_mask)
    for ours, key in ((dispatch_BNS, "dispatch_BNES"), (combine_BNS, "combine_BNES")):
        theirs = torch.tensor(case[key]).flatten(2)
        torch.testing.assert_close(ours[real_BN], theirs[real_BN], atol=1e-5, rtol=0)
    y_BND = layer(x_BND, token_mask)
    want = torch.tensor(case["out_BND"])
    torch.testing.assert_close(y_BND[real_BN], want[real_BN], atol=1e-5, rtol=1e-5)
    assert not y_BND[~real_BN].any()


def layer(**options: Any) -> SoftMoELayer:
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
    make = partial(SoftSlots, slots_per_expert=SLOTS)
    return SoftMoELayer(mlp, DIM, make, EXPERTS, **{"init": "fresh", **options})


@pytest.fixture
def x_BND() -> Tensor:
    return torch.randn(B, N, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recompute", [False, True])
def test_papers_equations(recompute: bool, x_BND: Tensor) -> None:
    made = layer(recompute=recompute)
    made.router.scale.data.fill_(2.5)
    slots_SD = F.normalize(made.router.slots_EPD, dim=2).flatten(0, 1)
    want = []
    for x_ND in x_BND:
        logits_NS = 2.5 * F.normalize(x_ND, dim=1) @ slots_SD.t()
        mixed_SD = logits_NS.softmax(0).t() @ x_ND
        out_SD = torch.stack([made.experts.slots[s // SLOTS](m) for s, m in enumerate(mixed_SD)])
        want.append(logits_NS.softmax(1) @ out_SD)
    y_BND = made(x_BND)
    torch.testing.assert_close(y_BND, torch.stack(want))
    y_BND.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


def test_padding_changes_nothing(x_BND: Tensor) -> None:
    made = layer(shared_experts=1)
    want = made(x_BND)
    junk = 9 * torch.randn(B, 3, DIM)
    junk[0, 0] = torch.nan
    padded = torch.cat([x_BND, junk], 1)
    real_BN = torch.arange(N + 3).expand(B, -1) < N
    with mask_padding(nn.Sequential(made), real_BN):
        y_BND = made(padded)
    torch.testing.assert_close(y_BND[:, :N], want)
    assert not y_BND[:, N:].any()
    torch.testing.assert_close(made(padded.view(-1, DIM), real_BN), y_BND.view(-1, DIM))
    made(padded, real_BN & False).sum().backward()  # sequences of padding
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_rows_of_unknown_sequences_are_refused(x_BND: Tensor) -> None:
    with pytest.raises(ValueError, match=r"token_mask \[B, N\]"):
        layer()(x_BND.view(-1, DIM))


def test_mixing_is_fp32_under_autocast(x_BND: Tensor) -> None:
    made = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made.router(x_BND)
    assert all(torch.equal(a, b) for a, b in zip(cast, made.router(x_BND), strict=True))
    made.to(torch.bfloat16)
    assert made(x_BND.bfloat16()).dtype == torch.bfloat16


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"patch_size": 7, "embed_dim": 8, "depth": 2, "num_heads": 2}
    backbone = build_vit("vit_tiny_patch16_224", 5, 1, 28, options=sizes)
    set_fused_attention(backbone, False)
    settings: Any = {"router": SoftSlots, "num_experts": 4, "max_experts": 4, "layers": "all"}
    add_moe_layers(backbone, **{**settings, "init": "copy", **options})
    return backbone


def test_in_a_block_with_costs_counted() -> None:
    backbone, images = vit(shared_experts=1).eval(), torch.randn(3, 1, 28, 28)
    assert isinstance(backbone.blocks[1].mlp, SoftMoELayer)
    costs = count(backbone, images[:1])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(images)
    assert flops(costs, {}, {}) == counter.get_total_flops() / 3
    size = sum(p.numel() for p in backbone.parameters())
    assert total(costs) == activated(costs, {}, {}) == size
    program = torch.export.export(backbone, (images,))
    torch.testing.assert_close(program.module()(images), backbone(images))


def test_causal_models_are_refused() -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 9}
    settings: Any = {"num_experts": 2, "max_experts": 2, "layers": "all", "init": "copy"}
    for make in (
        lambda: LlamaModel(LlamaConfig(**sizes, num_attention_heads=2)),
        lambda: BertModel(BertConfig(**sizes, num_attention_heads=2, is_decoder=True)),
    ):
        with pytest.raises(ConfigError, match="causal"):
            add_moe_layers(make(), router=SoftSlots, **settings)  # type: ignore[no-untyped-call]
        add_moe_layers(make(), router=TopKRouter, **settings)  # type: ignore[no-untyped-call]
    bert: Any = BertModel(BertConfig(**sizes, num_attention_heads=2))
    add_moe_layers(bert, router=SoftSlots, **settings)
    assert bert(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="slots_per_expert is 0"):
        SoftSlots(DIM, EXPERTS, slots_per_expert=0)
    with pytest.raises(TypeError, match="expected SoftSlots, found TopKRouter"):
        SoftMoELayer(nn.Linear(DIM, DIM), DIM, TopKRouter, 3)  # type: ignore[arg-type]

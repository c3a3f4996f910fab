"""Tokens that are not finite, and batches without a token, leave layer and records sound."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dynmoe.layers import (
    AverageKeyRouter,
    CosineTopKRouter,
    MoELayer,
    TopAnyRouter,
    TopKRouter,
    record_routing,
)
from dynmoe.layers.moe import Routed

DIM = 8
ROUTERS = {
    "top_any": TopAnyRouter,
    "top_any, gradient to all": partial(TopAnyRouter, gate_grad="all"),
    "top_any, tutel": partial(TopAnyRouter, combine="tutel", aux="gshard"),
    "top_any, deepspeed": partial(TopAnyRouter, balance_weight=1.0, efficiency_weight=1.0),
    "topk": TopKRouter,
    "topk with capacity": partial(TopKRouter, capacity_factor=1.0, min_capacity=4),
    "gmoe": CosineTopKRouter,
    "emoe": partial(AverageKeyRouter, top_k=2),
}
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "norm overflows": 3e38}


class Custom(nn.Module):
    """An FFN off the fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def make_layer(name: str, custom: bool = False) -> MoELayer:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
    return MoELayer(Custom() if custom else chain, DIM, ROUTERS[name], 4, init="fresh")


def record(layer: MoELayer, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routed]:
    torch.manual_seed(1)
    with record_routing(layer) as tape:
        y = layer(x, mask)
    return y, tape[""][0]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_tokens_that_are_not_finite_count_nowhere(name: str, training: bool, bad: str) -> None:
    """Outputs, counts, losses and gradients are those of the other tokens, as with padding."""
    layer = make_layer(name).train(training)
    x = torch.randn(2, 10, DIM, requires_grad=True)
    spoilt = x.detach().clone()
    spoilt[0, 3, 1] = BAD[bad]
    spoilt.requires_grad_()
    good = torch.ones(2, 10, dtype=torch.bool)
    good[0, 3] = False
    expected_y, expected = record(layer, x, good)
    y, found = record(layer, spoilt)
    torch.testing.assert_close(y, expected_y)
    assert not y[0, 3].any() and found.token_mask.equal(good)
    assert found.mask.equal(expected.mask)
    for mine, its in zip(found.stats, expected.stats, strict=True):
        torch.testing.assert_close(mine, its)
    torch.testing.assert_close(found.aux, expected.aux)
    inputs = [*layer.parameters()]
    grads = torch.autograd.grad(y.sum() + found.aux, [spoilt, *inputs], allow_unused=True)
    expected_grads = torch.autograd.grad(
        expected_y.sum() + expected.aux, [x, *inputs], allow_unused=True
    )
    torch.testing.assert_close(grads, expected_grads)


def test_a_new_expert_never_points_nowhere() -> None:
    layer = make_layer("top_any")
    layer.remove_expert(2)
    x = torch.randn(64, DIM)
    x[3] = float("nan")
    _, routed = record(layer, x)
    layer.add_expert(2, routed.stats.unserved_D)
    assert layer.router.directions[2].isfinite().all()
    layer.remove_expert(2)
    with pytest.raises(ValueError, match="direction is not finite"):
        layer.add_expert(2, torch.full((DIM,), float("inf")))
    layer.add_expert(2, torch.full((DIM,), 1e30))  # its square overflows
    torch.testing.assert_close(layer.router.directions[2].norm().detach(), torch.tensor(1.0))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("shape", [(0, DIM), (2, 0, DIM)])
def test_no_token(name: str, training: bool, custom: bool, shape: tuple[int, ...]) -> None:
    layer = make_layer(name, custom).train(training)
    x = torch.zeros(shape, requires_grad=True)
    assert layer(x).shape == shape
    y, routed = record(layer, x)
    assert y.shape == shape and routed.mask.shape == (*shape[:-1], 4)
    assert routed.aux.item() == 0
    assert not any(part.any() for part in routed.stats)
    (y.sum() + routed.aux + 0 * x.sum()).backward()
    for p in layer.router.parameters():  # a rank without tokens has the gradients that others have
        assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize("name", ["top_any", "topk", "gmoe"])
def test_ranks_with_and_without_tokens_agree_on_the_parameters_of_a_loss(name: str) -> None:
    reached = []
    for tokens in (0, 12):
        layer = make_layer(name)
        _, routed = record(layer, torch.randn(tokens, DIM))
        routed.aux.backward()
        reached.append([name for name, p in layer.named_parameters() if p.grad is not None])
    assert reached[0] == reached[1] != []


@pytest.mark.parametrize("name", ROUTERS)
def test_only_padding(name: str) -> None:
    layer = make_layer(name)
    y, routed = record(layer, torch.randn(3, 5, DIM), torch.zeros(3, 5, dtype=torch.bool))
    assert not y.any() and routed.aux.item() == 0
    assert not any(part.any() for part in routed.stats)

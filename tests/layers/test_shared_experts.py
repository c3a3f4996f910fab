"""Experts that serve every token, beside those of any router."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.errors import ConfigError
from dynmoe.layers import MoELayer, TopAnyRouter, TopKRouter, record_routing
from dynmoe.metrics.routing import RoutingMeter

DIM = 6


@pytest.fixture
def x_BND() -> Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(0))


def layer(init: Any = "fresh", router: Any = TopKRouter, **options: Any) -> MoELayer:
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
    return MoELayer(mlp, DIM, router, 4, init=init, **options)


class OutputSecond(nn.Module):
    """As Llama's published code lists its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(DIM, 8), nn.Linear(8, DIM), nn.Linear(DIM, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def test_a_copy_starts_at_zero_whatever_the_order_of_its_layers(x_BND: Tensor) -> None:
    made = MoELayer(OutputSecond(), DIM, TopKRouter, 4, shared_experts=1)
    assert made.shared[0](x_BND).eq(0).all()


def test_outputs_are_added(x_BND: Tensor) -> None:
    both = layer(shared_experts=2)
    alone = layer()
    alone.load_state_dict(both.state_dict(), strict=False)
    want = alone(x_BND) + both.shared[0](x_BND) + both.shared[1](x_BND)
    torch.testing.assert_close(both(x_BND), want)
    assert not torch.allclose(both.shared[0](x_BND), both.shared[1](x_BND))
    torch.testing.assert_close(both.compact()(x_BND), want)
    both(x_BND).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in both.shared.parameters())


def test_padding_and_tokens_that_are_not_finite_come_out_as_0(x_BND: Tensor) -> None:
    x_BND[0, 0, 0] = torch.nan
    real_BN = torch.ones(2, 5, dtype=torch.bool)
    real_BN[1, 3:] = False
    y_BND = layer(shared_experts=1)(x_BND, real_BN)
    assert not y_BND[0, 0].any() and not y_BND[1, 3:].any() and y_BND[1, :3].any()
    y_BND.sum().backward()


@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_trained_ffns_keep_their_output(init: Any, x_BND: Tensor) -> None:
    mlp = layer(init="copy").experts.slots[0]
    made = MoELayer(mlp, DIM, TopKRouter, 4, init=init, shared_experts=1)
    assert torch.allclose(made(x_BND), mlp(x_BND), atol=1e-6) == (init == "copy")
    made(x_BND).square().sum().backward()
    last: Any = made.shared[0][2]  # type: ignore[index]
    assert last.weight.grad.any()


def test_an_ffn_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe.shared_experts.*moe.init=fresh"):
        MoELayer(nn.Tanh(), DIM, TopKRouter, 2, shared_experts=1)


def test_k_counts_routed_experts(x_BND: Tensor) -> None:
    made = layer(router=partial(TopAnyRouter), shared_experts=1)
    meter = RoutingMeter(model := nn.Sequential(made))
    with record_routing(model) as tape:
        model(x_BND)
    meter.update("dev", tape)
    record = meter.records(["dev"], lambda x: x)[0]
    assert record["shared_experts"] == 1
    assert sum(record["load"]) == round(record["mean_k"] * 10)

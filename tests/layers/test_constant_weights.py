"""Within ``constant_weights`` layers compute the same, and make what they need of weights once."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.layers import (
    AverageKeyRouter,
    MoELayer,
    TopAnyRouter,
    TopKRouter,
    constant_weights,
    experts,
    grouped,
    record_routing,
)
from dynmoe.layers.ffn import GatedFFN

D, H = 16, 24


def made(router: Any) -> MoELayer:
    torch.manual_seed(0)
    mlp = GatedFFN(nn.Linear(D, H), nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D), 0.0)
    layer = MoELayer(mlp, D, router, 4, init="fresh")
    for p in layer.experts.parameters():
        p.data.normal_(0, 0.2)
    return layer


ROUTERS = [TopAnyRouter, partial(TopKRouter, top_k=2), partial(AverageKeyRouter, top_k=2)]


def low(layer: MoELayer, x_TD: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD: Tensor = layer(x_TD)
    return y_TD


@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_and_gradients_are_the_same(router: Any) -> None:
    layer = made(router)
    x_TD = torch.randn(40, D)
    parameters = list(layer.parameters())

    def grads() -> list[Tensor | None]:
        with record_routing(layer):
            y_TD = low(layer, x_TD) + low(layer, x_TD.flip(0)).flip(0)
        return list(torch.autograd.grad(y_TD.float().sin().sum(), parameters, allow_unused=True))

    expected = grads()
    with constant_weights(layer):
        got = grads()
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == torch.float32 and a.equal(b))  # type: ignore[arg-type]
    layer.eval()
    with torch.no_grad():
        expected_TD = low(layer, x_TD)
        with constant_weights(layer):
            assert low(layer, x_TD).equal(expected_TD) and low(layer, x_TD).equal(expected_TD)


def test_weights_are_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_TD = made(partial(TopKRouter, top_k=4)), torch.randn(9, D)
    casts: list[tuple[int, ...]] = []
    to = Tensor.to

    def counted(self: Tensor, *args: Any, **named: Any) -> Tensor:
        if args == (torch.bfloat16,) and self.ndim == 2 and len(self) != 9:
            casts.append(tuple(self.shape))
        return to(self, *args, **named)

    monkeypatch.setattr(Tensor, "to", counted)
    with constant_weights(layer):
        for _ in range(3):
            low(layer, x_TD).sum().backward()
    assert len(casts) == 4 * 3
    low(layer, x_TD)
    assert len(casts) == 2 * 4 * 3


def test_weights_cast_in_inference_mode_serve_a_training_step() -> None:
    layer, x_TD = made(partial(TopKRouter, top_k=4)), torch.randn(9, D)
    with constant_weights(layer):
        with torch.inference_mode():
            expected_TD = low(layer, x_TD).clone()
        y_TD = low(layer, x_TD)
        y_TD.sum().backward()
    assert y_TD.equal(expected_TD)
    assert all(p.grad is not None for p in layer.experts.parameters())


def test_experts_that_an_optimizer_moved_are_cast_again() -> None:
    """As LBFGS does, which computes the loss of a step several times."""
    layer, x_TD = made(partial(TopKRouter, top_k=4)), torch.randn(9, D)
    optimizer = torch.optim.SGD(layer.experts.parameters(), lr=1.0)
    with constant_weights(layer):
        before_TD = low(layer, x_TD)
        before_TD.sum().backward()
        optimizer.step()
        after_TD = low(layer, x_TD)
    assert after_TD.equal(low(layer, x_TD)) and not after_TD.equal(before_TD)


@pytest.mark.parametrize("router", ROUTERS)
def test_afterwards_new_weights_count(router: Any) -> None:
    layer, x_TD = made(router).eval(), torch.randn(9, D)
    with torch.no_grad():
        with constant_weights(layer):
            before = low(layer, x_TD)
            copied = copy.deepcopy(layer)  # belongs to no block
            for p in copied.parameters():
                p.mul_(-1.5)
            inner = low(copied, x_TD)
            with constant_weights(layer):  # as an average of weights is evaluated
                layer.load_state_dict(copied.state_dict())
                assert low(layer, x_TD).equal(inner)
                for p in layer.parameters():
                    p.div_(-1.5)
            torch.testing.assert_close(low(layer, x_TD), before)
        for p in layer.parameters():
            p.mul_(-1.5)
        torch.testing.assert_close(low(layer, x_TD), inner)
        assert layer.router.kept is None and layer.experts.kept is None


def test_auxiliary_loss_is_computed_for_whoever_records() -> None:
    layer, x_TD = made(TopAnyRouter).eval(), torch.randn(9, D)
    calls: list[Any] = []
    aux = layer.router._aux  # type: ignore[operator]
    layer.router._aux = lambda *args: calls.append(1) or aux(*args)  # type: ignore[assignment]
    layer(x_TD)
    assert not calls
    with record_routing(layer) as tape:
        layer(x_TD)
    (recorded,) = tape[""]
    assert len(calls) == 1 and recorded.aux > 0
    assert layer.router(x_TD, layer.live).aux.equal(recorded.aux)


def test_uneven_loads_are_not_padded() -> None:
    assert grouped.stacks_pay([10, 20, 12, 18]) and not grouped.stacks_pay([0, 0, 7, 0])
    assert not grouped.stacks_pay([65, 64, 63, 65])


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stacked_weights_compute_the_same(
    bias: tuple[bool, bool, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    parts = [
        nn.Linear(*size, each) for size, each in zip([(D, H)] * 2 + [(H, D)], bias, strict=True)
    ]
    mlp = GatedFFN(parts[0], parts[1], nn.SiLU(), parts[2], 0.3)
    layer = MoELayer(mlp, D, TopAnyRouter, 4, init="fresh").eval()
    for p in layer.experts.parameters():
        p.data.normal_(0, 0.3)
    layer.to(dtype)
    calls: list[int] = []
    monkeypatch.setattr(
        experts, "stacked_ffn", lambda *args: calls.append(1) or grouped.stacked_ffn(*args)
    )
    mask_TE = torch.tensor([True, False, True]).repeat(20)[:50]
    tolerance = {"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    with torch.no_grad(), constant_weights(layer, stack=True):
        for tokens in (50, 400):  # small loads, large ones
            x_TD = torch.randn(tokens, D, dtype=dtype)
            got = layer(x_TD, mask_TE[:tokens] if tokens == 50 else None)
            layer.experts.stack = False
            expected = layer(x_TD, mask_TE[:tokens] if tokens == 50 else None)
            layer.experts.stack = True
            torch.testing.assert_close(got, expected, **tolerance)
    assert len(calls) == 1
    layer.experts.backend = "per_expert"  # a backend that was named is the one that computes
    with torch.no_grad(), constant_weights(layer, stack=True):
        layer(torch.randn(50, D, dtype=dtype))
    layer.experts.backend = "auto"
    with constant_weights(layer, stack=True):
        layer(torch.randn(50, D, dtype=dtype)).sum().backward()  # gradients take the other path
    assert len(calls) == 1 and not layer.experts.stack

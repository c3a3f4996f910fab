"""The sparse dispatch equals the naive loop, in values and in all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynmoe.layers import dispatch
from dynmoe.layers.experts import Experts, naive_forward
from dynmoe.layers.routers import Routing

DIM = 6


def make_experts(num_slots: int, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, 9), nn.GELU(), nn.Linear(9, DIM)).to(dtype)
    experts = Experts(mlp, num_slots, "fresh")
    for p in experts.parameters():  # biases of a fresh FFN are 0; make them matter
        p.data.add_(torch.randn_like(p) * 0.3)
    return experts


def make_routing(mask_TE: torch.Tensor) -> Routing:
    torch.manual_seed(1)
    weights_TE = (torch.rand(mask_TE.shape, dtype=torch.float64) * mask_TE).requires_grad_()
    return Routing(
        weights_TE, mask_TE, weights_TE.detach(), ~mask_TE.any(1), torch.zeros(()), mask_TE
    )


def random_mask(tokens: int, experts: int, share: float) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(2)) < share


MASKS = {
    "random": random_mask(17, 5, 0.4),
    "one token": random_mask(1, 5, 0.6),
    "one expert": random_mask(9, 1, 0.5),
    "64 experts": random_mask(30, 64, 0.05),
    "every pair": torch.ones(7, 3, dtype=torch.bool),
    "no pair": torch.zeros(7, 3, dtype=torch.bool),
    "an empty expert and an unrouted token": torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0]]).bool(),
    "all tokens to one expert": torch.tensor([[0, 1, 0]] * 8).bool(),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_naive_loop(name: str) -> None:
    mask_TE = MASKS[name]
    live = tuple(range(mask_TE.shape[1]))
    experts, routing = make_experts(len(live)), make_routing(mask_TE)
    x_TD = torch.randn(len(mask_TE), DIM, dtype=torch.float64, requires_grad=True)
    inputs = [x_TD, routing.weights_TE, *experts.parameters()]

    def value_and_gradients(forward):  # type: ignore[no-untyped-def]
        y_TD = forward(x_TD, routing, live)
        return y_TD, torch.autograd.grad((y_TD.sin()).sum(), inputs, allow_unused=True)

    y, gradients = value_and_gradients(experts)
    y_naive, gradients_naive = value_and_gradients(lambda *a: naive_forward(experts, *a))
    torch.testing.assert_close(y, y_naive)
    for got, expected in zip(gradients, gradients_naive, strict=True):
        # An expert without tokens has no gradient at all, not a zero one.
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_live_slots_need_not_be_the_first_ones() -> None:
    experts, routing = make_experts(6), make_routing(random_mask(11, 3, 0.5))
    x_TD = torch.randn(11, DIM, dtype=torch.float64)
    torch.testing.assert_close(
        experts(x_TD, routing, (1, 3, 5)), naive_forward(experts, x_TD, routing, (1, 3, 5))
    )


@pytest.mark.parametrize("rounded", [False, True])
def test_gradcheck_of_gather_and_combine(rounded: bool) -> None:
    p = dispatch.pairs(random_mask(6, 4, 0.5), rounded)
    x_TD = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights_TE = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: dispatch.combine(dispatch.gather(x, p).sin(), w, p), (x_TD, weights_TE)
    )


def test_few_sizes() -> None:
    sizes = [dispatch.few_sizes(n) for n in range(4097)]
    assert sizes[:10] == [0, 8, 8, 8, 8, 8, 8, 8, 8, 16]
    assert all(n <= size < n + max(8, n / 16) for n, size in enumerate(sizes))
    assert sorted({size for size in sizes if 512 < size <= 1024}) == list(range(544, 1025, 32))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_pairs_name_every_routed_pair_once(name: str, rounded: bool) -> None:
    mask_TE = MASKS[name]
    p = dispatch.pairs(mask_TE, rounded)
    expected = [(t, e) for t in range(len(mask_TE)) for e in range(mask_TE.shape[1])]
    expected = [(t, e) for t, e in expected if mask_TE[t, e]]
    assert list(zip(p.token_P.tolist(), p.expert_P.tolist(), strict=True)) == expected
    assert p.start_T.tolist() == [sum(t < u for t, _ in expected) for u in range(len(mask_TE))]
    counts = mask_TE.sum(0).tolist()
    assert p.counts == ([dispatch.few_sizes(n) for n in counts] if rounded else counts)
    assert p.end_E.tolist() == torch.tensor(p.counts).cumsum(0).tolist()
    assert p.token_R[p.row_P].equal(p.token_P)
    assert len(set(p.row_P.tolist())) == len(expected)
    for (_, e), row in zip(expected, p.row_P.tolist(), strict=True):
        assert p.end_E[e] - p.counts[e] <= row < p.end_E[e]


def test_cost_is_one_row_per_pair() -> None:
    """Every expert sees exactly the tokens routed to it: no padding, no masked dense compute."""
    mask_TE = random_mask(40, 4, 0.3)
    experts = make_experts(4)
    seen = []
    for slot in experts.slots:
        slot.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    experts(torch.randn(40, DIM, dtype=torch.float64), make_routing(mask_TE), range(4))
    assert seen == mask_TE.sum(0).tolist()


def test_bf16_autocast_keeps_values_close() -> None:
    experts, mask_TE = make_experts(4, torch.float32), random_mask(20, 4, 0.5)
    routing = make_routing(mask_TE)
    x_TD = torch.randn(20, DIM)
    y = experts(x_TD, routing, range(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = experts(x_TD, routing, range(4))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, atol=0.05, rtol=0.05)

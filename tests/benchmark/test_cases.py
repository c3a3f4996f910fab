"""All cases compute the same function of the same routing; what they keep is counted exactly."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dynmoe.benchmark.layer import DRAWS, RIVALS, build_cases, fit_thresholds, stack, zipf_loads
from dynmoe.benchmark.options import LAYER_CASES, Shape, parse_shape
from dynmoe.benchmark.timing import PassMemory, peak_and_kept
from dynmoe.layers import Experts, Routing, TopAnyRouter
from dynmoe.layers.experts import naive_forward

CPU = torch.device("cpu")
TOKENS, DIM, HIDDEN, EXPERTS = 19, 6, 10, 5
MASKS = {
    "random": torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3)) < 0.4,
    "every pair": torch.ones(TOKENS, EXPERTS, dtype=torch.bool),
    "one expert for all": torch.tensor([[0, 0, 1, 0, 0]] * TOKENS).bool(),
}


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)).double()
    pool = Experts(mlp, EXPERTS)
    for p in pool.parameters():
        p.data.copy_(torch.randn_like(p))
    return pool


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", ["experts", "recompute", *RIVALS])
def test_equals_naive_loop_over_tokens(case: str, mask: str, experts: Experts) -> None:
    """Values, and the gradients of tokens, weights and every expert parameter, in fp64."""
    mask_TE, live = MASKS[mask], range(EXPERTS)
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    weights_TE = (torch.rand(TOKENS, EXPERTS, dtype=torch.float64) * mask_TE).requires_grad_()
    routing = Routing(
        weights_TE, mask_TE, weights_TE.detach(), ~mask_TE.any(1), torch.zeros(()), mask_TE
    )

    if case in RIVALS:
        ffn = stack(experts)
        y_TD, parameters = RIVALS[case](x_TD, weights_TE, mask_TE, ffn), list(ffn)
    else:
        experts.recompute = case == "recompute"
        y_TD, parameters = experts(x_TD, routing, live), list(experts.parameters())
    want_TD = naive_forward(experts, x_TD, routing, live)
    torch.testing.assert_close(y_TD, want_TD)

    def gradients(y_TD: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                y_TD.cos().sum(), [x_TD, weights_TE, *parameters], materialize_grads=True
            )
        )

    got = gradients(y_TD, parameters)
    want = gradients(want_TD, list(experts.parameters()))
    if case in RIVALS:  # of W1, b1, W2, b2 for each slot in turn
        want[2:] = [torch.stack(want[2 + i :: 4]) for i in range(4)]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "amp"])
def test_every_case_runs_in_every_precision(dtype: str) -> None:
    cases = build_cases(Shape("tiny", 24, 8, 16, 4), 2.0, list(LAYER_CASES), dtype, CPU)
    assert list(cases) == list(LAYER_CASES)
    for name, case in cases.items():
        assert case.pairs == pytest.approx(48, rel=0.3), name
        grads = case()
        assert grads[0] is not None and grads[0].isfinite().all(), name


def test_every_case_goes_through_the_same_draws() -> None:
    """The first has the k that was asked for; the loads of the others are their own."""
    cases = build_cases(Shape("tiny", 64, 8, 16, 4), 2.0, ["experts", "padded"], "fp32", CPU)
    seen: dict[str, list[int]] = {}
    for name in ("experts", "padded"):
        compute, counts = cases[name].compute, seen.setdefault(name, [])
        cases[name].compute = lambda d, compute=compute, counts=counts: (
            counts.append(int(d.routing.mask_TE.sum())) or compute(d)
        )
        for _ in range(DRAWS + 1):
            cases[name]()
    counts = seen["experts"]
    assert counts == seen["padded"]
    assert counts[0] == counts[DRAWS] == 128
    assert len(set(counts)) > 1
    assert cases["experts"].pairs == sum(counts[:DRAWS]) / DRAWS
    assert len(cases["limit"].draws[0].x_TD) == round(cases["experts"].pairs)


@pytest.mark.parametrize("k", [0.5, 1.0, 1.5, 4.0, 7.9, 8.0])
def test_fitted_thresholds_give_zipf_loads(k: float) -> None:
    torch.manual_seed(0)
    router, x_TD = TopAnyRouter(16, 8), torch.randn(64, 16)
    fit_thresholds(router, range(8), x_TD, k)
    load_E = router(x_TD, range(8)).mask_TE.sum(0)
    assert load_E.tolist() == zipf_loads(64, 8, k).tolist()
    assert load_E.sum() == round(64 * k)
    assert load_E.max() <= 64
    assert (load_E.diff() <= 1).all()  # popularity falls; rounding may turn a step around


def test_zipf_loads_are_proportional_to_rank() -> None:
    load_E = zipf_loads(10_000, 4, 1.0)
    share_E = torch.tensor([r**-0.8 for r in (1, 2, 3, 4)])
    torch.testing.assert_close(load_E / 10_000, share_E / share_E.sum(), atol=1e-4, rtol=0)


def test_memory_of_a_dense_ffn_is_exact() -> None:
    """Kept: pre-activation, activation, output. Peak: when both gradients of the hidden layer
    stand beside them, and the output is still held."""
    rows, dim, hidden = 100, 64, 256
    mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
    x = torch.randn(rows, dim, requires_grad=True)
    grad = torch.randn(rows, dim)
    memory = peak_and_kept(
        lambda: (mlp(x),), lambda y: torch.autograd.grad(y, [x, *mlp.parameters()], [grad]), CPU
    )
    assert memory == PassMemory(
        kept=4 * (2 * rows * hidden + rows * dim), output=4 * rows * dim, peak=memory.peak
    )
    assert memory.peak >= memory.kept + 4 * rows * hidden


@pytest.mark.parametrize("case", ["experts", "recompute"])
def test_kept_bytes_grow_with_the_tokens(case: str) -> None:
    def kept(tokens: int) -> int:
        cases = build_cases(Shape("t", tokens, 16, 64, 4), 1.5, [case], "fp32", CPU)
        timed, first = cases[case], cases[case].draws[0]
        return peak_and_kept(
            partial(timed.forward, first), partial(timed.backward, first), CPU
        ).kept

    assert kept(256) <= 2.05 * kept(128)


def test_shapes() -> None:
    assert parse_shape("a") == ("a", 6304, 384, 1536, 8)
    assert parse_shape("64,16,32,4") == ("64,16,32,4", 64, 16, 32, 4)

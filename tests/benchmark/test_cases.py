"""All cases compute the same function of the same routing; what they keep is counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.benchmark.cases import LAYER_CASES, Shape, parse_shape
from dynmoe.benchmark.layer import (
    DRAWS,
    HF_LIMIT,
    Draw,
    Work,
    absent,
    build_cases,
    fit_thresholds,
    zipf_loads,
)
from dynmoe.benchmark.rivals import HF, RIVALS, stack, transformers_experts
from dynmoe.benchmark.timing import PassMemory, peak_and_kept
from dynmoe.layers import Experts, Routing, TopAnyRouter
from dynmoe.layers.experts import naive_forward
from dynmoe.layers.ffn import GatedFFN

CPU = torch.device("cpu")
TOKENS, DIM, HIDDEN, EXPERTS = 19, 8, 12, 5  # grouped_mm wants rows of 16 bytes
MASKS = {
    "random": torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3)) < 0.4,
    "every pair": torch.ones(TOKENS, EXPERTS, dtype=torch.bool),
    "one expert for all": torch.tensor([[0, 0, 1, 0, 0]] * TOKENS).bool(),
}


@pytest.fixture(params=["mlp", "gated"])
def experts(request: pytest.FixtureRequest) -> Experts:
    torch.manual_seed(0)
    if request.param == "mlp":
        mlp: nn.Module = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
    else:
        gate, up = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        mlp = GatedFFN(gate, up, nn.SiLU(), nn.Linear(HIDDEN, DIM, bias=False), 0.0)
    pool = Experts(mlp.double(), EXPERTS)
    for p in pool.parameters():
        p.data.copy_(torch.randn_like(p))
    return pool


def routing_of(mask_TE: Tensor) -> Routing:
    weights_TE = (torch.rand(TOKENS, EXPERTS, dtype=torch.float64) * mask_TE).requires_grad_()
    return Routing(
        weights_TE, mask_TE, weights_TE.detach(), ~mask_TE.any(1), torch.zeros(()), mask_TE
    )


def check_gradients(
    y_TD: Tensor, want_TD: Tensor, inputs: list[Tensor], stacked: Sequence[Tensor], experts: Experts
) -> None:
    """Of the inputs, and of the stacked weights of all experts beside those of the slots."""
    near = None if y_TD.dtype == torch.double else 1e-4

    def close(got: Any, want: Any) -> None:
        torch.testing.assert_close(got, want, rtol=near, atol=near)

    close(y_TD, want_TD)

    def gradients(y_TD: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        return list(
            torch.autograd.grad(y_TD.cos().sum(), [*inputs, *parameters], materialize_grads=True)
        )

    n = len(inputs)
    got, want = gradients(y_TD, stacked), gradients(want_TD, list(experts.parameters()))
    close(got[:n], want[:n])
    if len(stacked) != len(want[n:]):
        for p, grad in zip(experts.parameters(), want[n:], strict=True):
            p.data = grad
        want[n:] = stack(experts).parameters
    close(got[n:], want[n:])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", ["experts", "recompute", *RIVALS])
def test_equals_naive_loop_over_tokens(case: str, mask: str, experts: Experts) -> None:
    """Values, and the gradients of tokens, weights and every expert parameter, in fp64."""
    routing, live = routing_of(MASKS[mask]), range(EXPERTS)
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    if case in RIVALS:
        ffn = stack(experts)
        y_TD = RIVALS[case](x_TD, routing.weights_TE, routing.mask_TE, ffn)
        parameters = ffn.parameters
    else:
        experts.recompute = case == "recompute"
        y_TD, parameters = experts(x_TD, routing, live), list(experts.parameters())
    want_TD = naive_forward(experts, x_TD, routing, live)
    check_gradients(y_TD, want_TD, [x_TD, routing.weights_TE], parameters, experts)


@pytest.mark.parametrize("experts", ["gated"], indirect=True)
@pytest.mark.parametrize("case", HF)
def test_experts_of_transformers_equal_naive_loop(case: str, experts: Experts) -> None:
    experts = experts.float()  # PyTorch's grouped_mm has no fp64
    index_TK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :2]
    routing = routing_of(torch.zeros(TOKENS, EXPERTS).scatter(1, index_TK, 1.0).bool())
    x_TD = torch.randn(TOKENS, DIM, requires_grad=True)
    module = transformers_experts(stack(experts), HF[case])
    y_TD = module(x_TD, index_TK, routing.weights_TE.float().gather(1, index_TK))
    want_TD = naive_forward(experts, x_TD, routing, range(EXPERTS))
    parameters = list(module.parameters())
    check_gradients(y_TD, want_TD, [x_TD, routing.weights_TE], parameters, experts)


def tiny(
    k: float, tokens: int = 64, ffn: str = "mlp", mode: str = "train", dtype: str = "fp32"
) -> Work:
    return Work(Shape("tiny", tokens, 8, 16, 4), ffn, k, mode, dtype)


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("ffn", ["mlp", "gated"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "amp"])
def test_every_case_runs_in_every_precision(dtype: str, ffn: str, mode: str) -> None:
    work = tiny(2.0, 24, ffn=ffn, mode=mode, dtype=dtype)
    cases = build_cases(work, list(LAYER_CASES), CPU)
    assert list(cases) == [case for case in LAYER_CASES if case not in absent(work)]
    for name, case in cases.items():
        assert case.pairs == pytest.approx(48, rel=0.3), name
        (first, *_) = case()
        assert first is not None and first.isfinite().all(), name
        assert first.requires_grad is False and first.is_inference() == (mode == "inference")


def test_absent_cases_and_flops() -> None:
    gated = tiny(2.0, ffn="gated")
    assert absent(gated) == set()
    assert absent(tiny(2.0, ffn="gated", mode="inference")) == {"recompute"}
    assert absent(tiny(1.5)) == {"top_k", "top_k experts", *HF}
    pairs = HF_LIMIT // (4 * 3 * 8 * 16)
    assert absent(gated._replace(k=1.0, shape=gated.shape._replace(tokens=pairs))) == set()
    many = gated.shape._replace(tokens=pairs + 1)
    assert absent(gated._replace(k=1.0, shape=many)) == {"hf batched_mm"}
    assert gated.flops_per_pair == 3 * (2 * 3 * 8 * 16)  # forward, and backward twice
    assert tiny(2.0).flops_per_pair == 3 * (2 * 2 * 8 * 16)
    assert tiny(2.0, mode="inference").flops_per_pair == 2 * 2 * 8 * 16


def test_every_case_goes_through_the_same_draws() -> None:
    """The first has the k that was asked for; the loads of the others are their own."""
    cases = build_cases(tiny(2.0, tokens=512), ["experts", "padded"], CPU)
    seen: dict[str, list[int]] = {}
    for name in ("experts", "padded"):
        compute, counts = cases[name].compute, seen.setdefault(name, [])

        def counted(d: Draw, compute: Any = compute, counts: list[int] = counts) -> Any:
            counts.append(int(d.routing.mask_TE.sum()))
            return compute(d)

        cases[name].compute = counted
        for _ in range(DRAWS + 1):
            cases[name]()
    counts = seen["experts"]
    assert counts == seen["padded"]
    assert counts[0] == counts[DRAWS] == 1024
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
        cases = build_cases(tiny(1.5, tokens), [case], CPU)
        timed, first = cases[case], cases[case].draws[0]
        return peak_and_kept(
            partial(timed.forward, first), partial(timed.backward, first), CPU
        ).kept

    assert kept(256) <= 2.05 * kept(128)


def test_shapes() -> None:
    assert parse_shape("a") == ("a", 6304, 384, 1536, 8)
    assert parse_shape("64,16,32,4") == ("64,16,32,4", 64, 16, 32, 4)

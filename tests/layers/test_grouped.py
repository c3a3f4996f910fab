"""Every path through the experts equals the naive loop over tokens, in values and all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe.errors import ConfigError
from dynmoe.layers import dispatch, grouped
from dynmoe.layers.experts import Experts, naive_forward
from dynmoe.layers.ffn import GatedFFN, PackedGatedFFN, find_layout, read_ffns
from dynmoe.layers.routers import Routing

D, H = 8, 16
PATHS = ["per expert", "rounded up", "grouped_mm", "any module"]


class Doubled(nn.Module):
    """An FFN that ``find_layout`` does not know."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.mlp(x)


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Choose the path by name; returns the FFN to make experts of."""

    yield partial(choose_path, monkeypatch)


def choose_path(patch: pytest.MonkeyPatch, path: str, mlp: nn.Module) -> nn.Module:
    patch.setattr(grouped, "uses_grouped_mm", lambda *a: path == "grouped_mm")
    patch.setattr("dynmoe.layers.experts.compiles_shapes", lambda x: path == "rounded up")
    return Doubled(mlp) if path == "any module" else mlp


def sequential(act: nn.Module, bias: bool = True, hidden: int = H) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, hidden, bias), act, nn.Linear(hidden, D, bias))


def make_experts(mlp: nn.Module, num: int, dtype: torch.dtype, recompute: bool = False) -> Experts:
    torch.manual_seed(0)
    experts = Experts(mlp, num, "fresh", recompute).to(dtype)
    for p in experts.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return experts


def make_routing(mask_TE: Tensor, dtype: torch.dtype) -> Routing:
    generator = torch.Generator().manual_seed(1)
    weights_TE = torch.rand(mask_TE.shape, generator=generator, dtype=dtype) * mask_TE
    weights_TE.requires_grad_()
    return Routing(
        weights_TE, mask_TE, weights_TE.detach(), ~mask_TE.any(1), torch.zeros(()), mask_TE
    )


def random_mask(tokens: int, experts: int, share: float, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator) < share


class Result(NamedTuple):
    y_TD: Tensor
    grads: list[Tensor | None]


def run(experts: Experts, routing: Routing, x_TD: Tensor, naive: bool = False) -> Result:
    live = tuple(range(routing.mask_TE.shape[1]))
    x_TD = x_TD.clone().requires_grad_()
    y_TD = naive_forward(experts, x_TD, routing, live) if naive else experts(x_TD, routing, live)
    inputs = [x_TD, routing.weights_TE, *experts.parameters()]
    grads = torch.autograd.grad(y_TD.double().sin().sum(), inputs, allow_unused=True)
    return Result(y_TD, list(grads))


def assert_same(got: Result, expected: Result, **tolerance: float) -> None:
    torch.testing.assert_close(got.y_TD, expected.y_TD, **tolerance)
    for g, e in zip(got.grads, expected.grads, strict=True):
        assert (g is None) == (e is None)  # an expert without tokens has no gradient, not zeros
        if g is not None and e is not None:
            torch.testing.assert_close(g, e, **tolerance)


def gated(act: nn.Module, bias: bool) -> nn.Module:
    down = nn.Linear(H, D, bias)
    return GatedFFN(nn.Linear(D, H, bias), nn.Linear(D, H, bias), act, down, dropout=0.0)


def packed(act: nn.Module, bias: bool, gate_first: bool) -> nn.Module:
    down = nn.Linear(H, D, bias)
    return PackedGatedFFN(nn.Linear(D, 2 * H, bias), act, down, 0.0, gate_first)


FFNS = {
    "gelu": lambda: sequential(nn.GELU()),
    "gelu_tanh": lambda: sequential(nn.GELU(approximate="tanh")),
    "relu": lambda: sequential(nn.ReLU()),
    "silu": lambda: sequential(nn.SiLU()),
    "no bias": lambda: sequential(nn.GELU(), bias=False),
    "gated": lambda: gated(nn.SiLU(), bias=False),
    "gated gelu, bias": lambda: gated(nn.GELU(), bias=True),
    "packed": lambda: packed(nn.SiLU(), bias=False, gate_first=True),
    "packed, bias": lambda: packed(nn.ReLU(), bias=True, gate_first=False),
    "timm's, apart": lambda: SwiGLU(D, H, bias=(True, False)),
    "timm's, packed": lambda: GluMlp(D, 2 * H, act_layer=nn.SiLU, bias=(False, True)),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("path", PATHS)
def test_equals_naive(path: str, ffn: str, recompute: bool, take) -> None:  # type: ignore[no-untyped-def]
    dtype = torch.float32 if path == "grouped_mm" else torch.float64  # which it does not know
    mlp = take(path, FFNS[ffn]())
    assert (find_layout(mlp) is None) == (path == "any module")
    experts = make_experts(mlp, 5, dtype, recompute)
    mask_TE = random_mask(37, 5, 0.4)
    mask_TE[:, 3] = False
    mask_TE[5] = False
    x_TD = torch.randn(37, D, dtype=dtype)
    routing = make_routing(mask_TE, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    expected = run(experts, routing, x_TD, naive=True)
    assert_same(run(experts, routing, x_TD), expected, **tolerance)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 40),
    experts=st.sampled_from([1, 2, 5, 64]),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    ffn=st.sampled_from(["gelu", "gated", "packed, bias"]),
    seed=st.integers(0, 10**6),
)
def test_any_routing_equals_naive(
    path: str, tokens: int, experts: int, share: float, ffn: str, seed: int
) -> None:
    dtype = torch.float32 if path == "grouped_mm" else torch.float64
    with pytest.MonkeyPatch.context() as patch:
        pool = make_experts(choose_path(patch, path, FFNS[ffn]()), experts, dtype)
        routing = make_routing(random_mask(tokens, experts, share, seed), dtype)
        x_TD = torch.randn(tokens, D, dtype=dtype)
        tolerance = {"rtol": 2e-5, "atol": 2e-5 if dtype == torch.float32 else 1e-12}
        assert_same(run(pool, routing, x_TD), run(pool, routing, x_TD, naive=True), **tolerance)


@pytest.mark.parametrize("ffn", ["gelu", "gated", "packed, bias"])
@pytest.mark.parametrize("path", PATHS)
def test_bf16_is_as_close_to_fp64_as_the_naive_loop(path: str, ffn: str, take) -> None:  # type: ignore[no-untyped-def]
    """1e-3 on top of what rounding to bf16 costs the naive loop itself, by relative norm."""
    mlp = take(path, FFNS[ffn]())
    exact = make_experts(mlp, 4, torch.float64)
    low = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    mask_TE = random_mask(60, 4, 0.5)
    x_TD = torch.randn(60, D).bfloat16()
    low_routing = make_routing(mask_TE, torch.bfloat16)
    weights_TE = low_routing.weights_TE.detach().double().requires_grad_()
    truth = run(exact, low_routing._replace(weights_TE=weights_TE), x_TD.double(), naive=True)
    ours, naive = run(low, low_routing, x_TD), run(low, low_routing, x_TD, naive=True)

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    for a, b, c in zip(
        [ours.y_TD, *ours.grads],
        [naive.y_TD, *naive.grads],
        [truth.y_TD, *truth.grads],
        strict=True,
    ):
        assert a is not None and b is not None and c is not None and a.dtype == torch.bfloat16
        # grouped_mm has no bias: product and sum are rounded one after the other.
        factor = 1.5 if path == "grouped_mm" and "bias" in ffn else 1.1
        assert error(a.detach(), c) <= factor * error(b.detach(), c) + 1e-3


@pytest.mark.parametrize("ffn", ["gelu", "gated", "packed, bias"])
@pytest.mark.parametrize("path", PATHS)
def test_autocast_computes_in_bf16_and_gives_fp32_gradients(path: str, ffn: str, take) -> None:  # type: ignore[no-untyped-def]
    experts = make_experts(take(path, FFNS[ffn]()), 4, torch.float32)
    routing, x_TD = make_routing(random_mask(20, 4, 0.5), torch.float32), torch.randn(20, D)
    full = run(experts, routing, x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(experts, routing, x_TD)
    assert low.y_TD.dtype == torch.bfloat16
    for a, b in zip([low.y_TD, *low.grads], [full.y_TD, *full.grads], strict=True):
        assert a is not None and b is not None
        assert (a.float() - b).norm() < 0.06 * b.norm()
    assert all(g is not None and g.dtype == torch.float32 for g in low.grads)


@pytest.mark.parametrize("path", ["per expert", "rounded up", "grouped_mm"])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_drawn_once_for_both_passes(path: str, recompute: bool, take) -> None:  # type: ignore[no-untyped-def]
    """With all-ones weights the dropped units show: the gradient is that of the units kept."""
    mlp = take(path, nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, D)))
    experts = make_experts(mlp, 1, torch.float32, recompute)
    routing = make_routing(torch.ones(6, 1).bool(), torch.float32)
    x_TD = torch.rand(6, D)
    torch.manual_seed(3)
    got = run(experts, routing, x_TD)
    torch.manual_seed(3)
    rows = x_TD[torch.zeros(8 - 6).long()] if path == "rounded up" else x_TD[:0]
    fc1, _, _, fc2 = experts.slots[0]
    padded_TD = torch.cat([x_TD, rows]).requires_grad_()
    act = torch.native_dropout(fc1(padded_TD).relu(), 0.5, True)[0]
    y_TD = fc2(act)[:6] * routing.weights_TE
    expected = torch.autograd.grad(y_TD.double().sin().sum(), [padded_TD, fc1.weight, fc2.weight])
    torch.testing.assert_close(got.y_TD, y_TD)
    torch.testing.assert_close(got.grads[0], expected[0][:6])
    torch.testing.assert_close(got.grads[2], expected[1])
    torch.testing.assert_close(got.grads[4], expected[2])
    experts.eval()
    assert run(experts, routing, x_TD).y_TD.equal(run(experts, routing, x_TD).y_TD)


def test_frozen_parts_get_no_gradient() -> None:
    experts = make_experts(sequential(nn.GELU()), 3, torch.float64)
    experts.slots[1].requires_grad_(False)
    routing = make_routing(random_mask(9, 3, 0.7), torch.float64)
    x_TD = torch.randn(9, D, dtype=torch.float64)  # itself without gradient
    experts(x_TD, routing, range(3)).sum().backward()
    assert all(p.grad is None for p in experts.slots[1].parameters())
    assert all(p.grad is not None for p in experts.slots[2].parameters())


def test_one_layer_used_twice_before_backward() -> None:
    experts = make_experts(sequential(nn.GELU()), 3, torch.float64)
    first, second = (make_routing(random_mask(9, 3, 0.5, s), torch.float64) for s in (5, 6))
    x_TD = torch.randn(9, D, dtype=torch.float64)

    def grads(forward) -> list[Tensor]:  # type: ignore[no-untyped-def]
        y_TD = forward(forward(x_TD, first), second)
        return list(torch.autograd.grad(y_TD.sum(), list(experts.parameters())))

    got = grads(lambda x, r: experts(x, r, range(3)))
    expected = grads(lambda x, r: naive_forward(experts, x, r, range(3)))
    torch.testing.assert_close(got, expected)


class Recorded(TorchDispatchMode):
    """Names of the operations, and the largest tensor they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


SYNCHRONISING = (
    "nonzero.default",
    "_local_scalar_dense",
    "masked_select",
    "item",
    "equal",
    "unique",
)


@pytest.mark.parametrize("path", ["per expert", "rounded up", "grouped_mm"])
def test_one_host_synchronisation_a_layer(path: str, take) -> None:  # type: ignore[no-untyped-def]
    """``tolist`` reads all counts in one copy; nothing after it asks the device for a size."""
    experts = make_experts(take(path, sequential(nn.GELU())), 4, torch.float32)
    routing = make_routing(random_mask(50, 4, 0.5), torch.float32)
    with Recorded() as recorded:
        result = run(experts, routing, torch.randn(50, D))
    assert result.y_TD.shape == (50, D)
    asked = [n for n in recorded.names if any(word in n for word in SYNCHRONISING)]
    assert not asked  # tolist() itself is one copy to the host, below these operations
    assert sum("nonzero_static" in name for name in recorded.names) == 1


def test_no_tensor_of_all_tokens_times_all_experts_times_width() -> None:
    tokens, num = 200, 16
    experts = make_experts(sequential(nn.GELU()), num, torch.float32)
    routing = make_routing(random_mask(tokens, num, 1 / num), torch.float32)
    with Recorded() as recorded:
        run(experts, routing, torch.randn(tokens, D))
    assert recorded.largest <= max(routing.mask_TE.sum() * H, tokens * num)


class Own(nn.Module):
    """A gated FFN as people write it, and one step more."""

    def __init__(self, more: Callable[[nn.Module, Tensor], Tensor] = lambda mlp, x: x) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(D, H)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.more(self, F.silu(self.w1(x)) * self.w3(x)))


KNOWN = {
    "own": (Own, ("w1", "w3"), "w2", 0, "silu", (None, None)),
    "square": (lambda: sequential(nn.ReLU(), hidden=D), ("0",), "2", None, "relu", (None, None)),
    "timm": (lambda: Mlp(D, H, drop=0.2), ("fc1",), "fc2", None, "gelu", ("drop1", "drop2")),
    "two dropouts": (
        lambda: nn.Sequential(
            *sequential(nn.GELU())[:2], nn.Dropout(), nn.Linear(H, D), nn.Dropout()
        ),
        *(("0",), "3", None, "gelu", ("2", "4")),
    ),
    "glu": (
        lambda: GluMlp(D, 2 * H, act_layer=nn.GELU, gate_last=False),
        *(("fc1",), "fc2", 0, "gelu", ("drop1", "drop2")),
    ),
}
UNKNOWN = {
    "norm": lambda: Mlp(D, H, norm_layer=nn.LayerNorm),
    "norm, gated": lambda: SwiGLU(D, H, norm_layer=nn.LayerNorm),
    "tanh": lambda: Mlp(D, H, act_layer=nn.Tanh),
    "no second layer": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU()),
    "dropout of the rows": lambda: nn.Sequential(nn.Dropout(0.1), *sequential(nn.GELU())),
    "dropout twice": lambda: nn.Sequential(
        *sequential(nn.GELU()), nn.Dropout(0.5), nn.Dropout(0.3)
    ),
    "functional dropout": lambda: Own(lambda mlp, x: F.dropout(x, 0.5, mlp.training)),
    "in evaluation alone": lambda: Own(lambda mlp, x: x if mlp.training else 2 * x),
    "clip": lambda: Own(lambda mlp, x: x.clamp(-7, 7)),
    "scale": lambda: Own(lambda mlp, x: 0.5 * x),
    "detached": lambda: Own(lambda mlp, x: x.detach()),
    "half a gradient": lambda: Own(lambda mlp, x: x / 2 + (x / 2).detach()),
    "its own parameter": lambda: parametrised(Own()),
    "replaced forward": lambda: replaced(Mlp(D, H)),
    "hook": lambda: hooked(Mlp(D, H)),
    "adapter": lambda: adapted(Mlp(D, H)),
}


def parametrised(mlp: nn.Module) -> nn.Module:
    mlp.scale = nn.Parameter(torch.ones(()))
    return mlp


def replaced(mlp: Mlp) -> nn.Module:
    mlp.fc1.forward = lambda x: x  # type: ignore[method-assign]
    return mlp


def hooked(mlp: Mlp) -> nn.Module:
    mlp.fc1.register_forward_hook(lambda *a: None)
    return mlp


def adapted(mlp: Mlp) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(mlp.fc1) and mlp


@pytest.mark.parametrize("name", KNOWN)
def test_layout_is_found_by_what_an_ffn_computes(name: str) -> None:
    make, *expected = KNOWN[name]
    mlp = make()
    torch.nn.init.zeros_(next(reversed(list(mlp.parameters()))))  # values do not matter
    torch.manual_seed(0)
    before = torch.get_rng_state()
    layout = find_layout(mlp)
    assert torch.get_rng_state().equal(before) and mlp.training
    assert layout is not None and list(layout[2:]) == expected
    on_meta = find_layout(mlp.to("meta"))
    assert on_meta == layout


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_layout_of_what_computes_more(name: str) -> None:
    assert find_layout(UNKNOWN[name]()) is None


@pytest.mark.parametrize("change", [replaced, hooked, adapted])
def test_what_a_slot_became_later_is_called(change: Callable[[Any], nn.Module]) -> None:
    experts = make_experts(Mlp(D, H), 3, torch.float64)
    layout = experts.layout
    assert layout is not None and read_ffns(list(experts.slots), layout) is not None
    experts.slots[1].drop1.p = 0.5
    assert read_ffns(list(experts.slots), layout) is None  # one rate for all
    assert read_ffns(list(experts.eval().slots), layout).hidden_dropout == 0.0  # type: ignore[union-attr]
    change(experts.slots[2])
    assert read_ffns(list(experts.slots), layout) is None
    if change is not replaced:
        routing = make_routing(random_mask(9, 3, 0.6), torch.float64)
        x_TD = torch.randn(9, D, dtype=torch.float64)
        assert_same(run(experts, routing, x_TD), run(experts, routing, x_TD, naive=True))


def test_experts_that_are_not_alike_are_called_one_by_one() -> None:
    experts = make_experts(sequential(nn.GELU()), 3, torch.float64)
    experts.slots[1][1] = nn.ReLU()
    routing, x_TD = make_routing(random_mask(9, 3, 0.6), torch.float64), torch.randn(9, D).double()
    assert_same(run(experts, routing, x_TD), run(experts, routing, x_TD, naive=True))


def times(factor: float) -> nn.Module:
    """``Own`` with a number that its class alone does not tell."""
    mlp = Own()
    mlp.more = lambda _, x: factor * x
    return mlp


@pytest.mark.parametrize(
    "given",
    [
        lambda: [sequential(nn.GELU()), sequential(nn.GELU("tanh"))],
        lambda: [
            PackedGatedFFN(nn.Linear(D, 2 * H), nn.SiLU(), nn.Linear(H, D), 0.0, gate_first)
            for gate_first in (True, False)
        ],
        lambda: [times(1.0), times(0.5)],
    ],
)
def test_given_experts_of_one_class_that_differ_are_called(given: Callable[[], Any]) -> None:
    experts = Experts(given(), 2).double()
    assert experts.layout is None
    routing, x_TD = make_routing(random_mask(9, 2, 0.6), torch.float64), torch.randn(9, D).double()
    assert_same(run(experts, routing, x_TD), run(experts, routing, x_TD, naive=True))


def test_given_experts_that_compute_the_same_are_grouped() -> None:
    assert Experts([times(1.0), times(1.0)], 3).layout == find_layout(Own())


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_of_all_neurons_leaves_no_gradient(recompute: bool) -> None:
    mlp = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(1.0), nn.Linear(H, D))
    experts = make_experts(mlp, 1, torch.float32, recompute)
    routing, x_TD = make_routing(torch.ones(6, 1).bool(), torch.float32), torch.rand(6, D)
    assert_same(run(experts, routing, x_TD), run(experts, routing, x_TD, naive=True))


@pytest.mark.parametrize("path", PATHS)
def test_spare_rows_do_not_carry_another_tokens_infinity(path: str, take) -> None:  # type: ignore[no-untyped-def]
    experts = make_experts(take(path, sequential(nn.GELU())), 2, torch.float32)
    mask_TE = torch.tensor([[False, False], [True, False], [False, True], [False, True]])
    x_TD = torch.randn(4, D)
    x_TD[0] = float("nan")
    result = run(experts, make_routing(mask_TE, torch.float32), x_TD)
    assert all(g is not None and g.isfinite().all() for g in result.grads)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("path", PATHS)
def test_a_pass_without_pairs_can_go_backward(path: str, tokens: int, take) -> None:  # type: ignore[no-untyped-def]
    experts = make_experts(take(path, sequential(nn.GELU())), 2, torch.float32)
    x_TD = torch.randn(tokens, D, requires_grad=True)
    routing = make_routing(torch.zeros(tokens, 2).bool(), torch.float32)
    y_TD = experts(x_TD, routing, range(2))
    assert y_TD.equal(torch.zeros(tokens, D))
    y_TD.sum().backward()
    assert x_TD.grad is not None and x_TD.grad.eq(0).all()
    assert all(p.grad is None for p in experts.parameters())


def test_rows_are_rounded_where_every_shape_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = torch.zeros(1, 1)
    for precision in ("highest", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
        assert grouped.compiles_shapes(x_TD) == (precision == "medium")
        assert not grouped.compiles_shapes(x_TD.double())
        assert grouped.compiles_shapes(x_TD.bfloat16())
        assert not grouped.compiles_shapes(x_TD.to("meta"))


def test_rows_without_a_pair_change_nothing() -> None:
    """Even if token 0, which fills them, is routed nowhere."""
    mask_TE = random_mask(11, 3, 0.5)
    mask_TE[0] = False
    p = dispatch.pairs(mask_TE, 8)
    out_RD = torch.randn(len(p.token_R), D, requires_grad=True)
    y_TD = dispatch.combine(out_RD, torch.ones(11, 3), p)
    assert y_TD[0].eq(0).all()
    (grad_RD,) = torch.autograd.grad(y_TD.sum(), out_RD)
    assert grad_RD.sum(1).ne(0).sum() == mask_TE.sum()


@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_of_several_experts_change_nothing(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [3, 0, 4, 9, 2, 2, 0]
    assert grouped._chunks(counts, 8) == [
        (slice(0, 7), [0, 2], [3, 4]),
        (slice(7, 16), [3], [9]),
        (slice(16, 20), [4, 5], [2, 2]),
    ]
    routing = make_routing(random_mask(40, 8, 0.3), torch.float64)
    x_TD = torch.randn(40, D, dtype=torch.float64)
    experts = make_experts(sequential(nn.GELU()), 8, torch.float64, recompute)
    expected = run(experts, routing, x_TD, naive=True)
    for rows in (0, 20, 1000):
        monkeypatch.setattr(grouped, "CHUNK", rows * H * 8)
        assert_same(run(experts, routing, x_TD), expected)


@pytest.mark.parametrize("ffn", ["gelu", "gated", "packed, bias"])
def test_backends_compute_the_same(ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = FFNS[ffn]()
    routing, x_TD = make_routing(random_mask(30, 3, 0.5), torch.float32), torch.randn(30, D)
    calls: list[str] = []
    for name in ("_PerExpert", "_GroupedMM"):
        function = getattr(grouped, name)
        apply = lambda *args, n=name, f=function.apply: calls.append(n) or f(*args)  # noqa: E731
        monkeypatch.setattr(function, "apply", apply)
    results = {}
    for backend in ("auto", "loop", "per_expert", "grouped_mm"):
        pool = Experts(mlp, 3, backend=backend)
        results[backend] = run(pool, routing, x_TD)
    assert calls == ["_PerExpert", "_PerExpert", "_GroupedMM"]
    for result in results.values():
        assert_same(result, results["loop"], rtol=1e-4, atol=1e-4)


def test_backends_refuse_what_they_cannot_do() -> None:
    for backend in ("per_expert", "grouped_mm"):
        with pytest.raises(ConfigError, match=rf"moe.backend={backend}.*Set moe.backend=auto"):
            Experts(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)), 2, backend=backend)
    pool = Experts(sequential(nn.GELU()), 2, backend="grouped_mm").double()
    routing = make_routing(torch.ones(3, 2).bool(), torch.float64)
    with pytest.raises(ValueError, match=r"grouped_mm.*float64.*moe.backend=auto"):
        pool(torch.randn(3, D, dtype=torch.float64), routing, range(2))

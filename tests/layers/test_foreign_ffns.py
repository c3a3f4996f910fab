"""FFNs of other forms: refused if they do not map D to D, else called as their modules say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dynmoe.backbones.forms import linear
from dynmoe.errors import ConfigError
from dynmoe.layers import AverageKeyRouter, CosineTopKRouter, MoELayer, TopAnyRouter
from dynmoe.layers.ffn import GatedFFN, read_ffns

DIM = 16


def chain(*widths: int, bias: bool = True) -> nn.Sequential:
    first, hidden, last = widths
    return nn.Sequential(nn.Linear(first, hidden, bias), nn.GELU(), nn.Linear(hidden, last, bias))


class Own(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(DIM, DIM), change
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.on_host = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.on_host += 1
        return self.change(self.linear(x))


def gated(out: int) -> nn.Module:
    up, down = nn.Linear(DIM, 24), nn.Linear(24, out)
    return GatedFFN(nn.Linear(DIM, 24), up, nn.SiLU(), down, 0.1)


def needs_data(x: Tensor) -> Tensor:
    return x * float(x.abs().max() + 1)


WRONG = {
    "fewer outputs": (lambda: chain(DIM, 32, 8), r"rows \[N, 16\].*\[3, 8\] of \[3, 16\]"),
    "more outputs": (lambda: chain(DIM, 32, 24), r"\[3, 24\] of \[3, 16\]"),
    "other inputs": (lambda: chain(32, 32, DIM), r"refuses rows \[3, 16\]"),
    "timm's": (lambda: Mlp(DIM, 32, 8), r"\[3, 8\] of \[3, 16\]"),
    "gated": (lambda: gated(8), r"\[3, 8\] of \[3, 16\]"),
    "gated, timm's": (lambda: GluMlp(DIM, 32, 8), r"\[3, 8\] of \[3, 16\]"),
    "convolution": (lambda: nn.Conv1d(3, 5, 1), r"\[5, 16\] of \[3, 16\]"),
    "fewer rows": (lambda: Own(lambda x: x[:1]), r"\[1, 16\] of \[3, 16\]"),
    "one row": (lambda: Own(lambda x: x.mean(0)), r"\[16\] of \[3, 16\]"),
    "a tuple": (lambda: Own(lambda x: (x, x)), "a tuple of"),
    "another dtype": (lambda: Own(Tensor.double), "keeps the dtype.*float64 of torch.float32"),
    "needs data": (lambda: Own(lambda x: needs_data(x)[:, :8]), r"\[3, 8\] of \[3, 16\]"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ffn_that_does_not_map_d_to_d_is_refused(name: str, device: str) -> None:
    make, message = WRONG[name]
    if device == "meta" and name == "needs data":
        pytest.skip("nothing to be known without data")
    with torch.device(device):
        mlp = make()
    with pytest.raises(ValueError, match=message):
        MoELayer(mlp, DIM, TopAnyRouter, 2)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: chain(DIM, 32, DIM),
    "bf16": lambda: chain(DIM, 32, DIM).bfloat16(),
    "two types": lambda: nn.Sequential(nn.LayerNorm(DIM), chain(DIM, 32, DIM).bfloat16()),
    "without bias, dropout": lambda: nn.Sequential(*chain(DIM, 8, DIM, bias=False), nn.Dropout()),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(DIM), chain(DIM, 32, DIM)),
    "gated": lambda: gated(DIM),
    "gated, timm's": lambda: SwiGLU(DIM, 32),
    "own": lambda: Own(Tensor.tanh),
    "needs data": lambda: Own(needs_data),
    "identity": nn.Identity,
    "parametrized": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(DIM, 8)), nn.GELU(), nn.Linear(8, DIM)
    ),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_check_changes_nothing(name: str, device: str) -> None:
    with torch.device(device):
        mlp = RIGHT[name]().train()
    before = {key: value.clone() for key, value in mlp.state_dict().items()}
    torch.manual_seed(3)
    with torch.random.fork_rng():
        TopAnyRouter(DIM, 2)
        expected = torch.rand(3)
    layer = MoELayer(mlp, DIM, TopAnyRouter, 2)
    assert torch.rand(3).equal(expected)  # the router's draws alone
    assert mlp.training and getattr(mlp, "on_host", 0) == 0
    if device == "cpu":
        for key, value in mlp.state_dict().items():
            assert torch.equal(value, before[key])
        if name not in ("bf16", "two types"):
            assert layer(torch.randn(5, DIM)).shape == (5, DIM)


def test_lazy_ffn_stays_lazy_and_is_checked_as_it_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlp = nn.Sequential(nn.LazyLinear(32), nn.GELU(), nn.LazyLinear(8))
    layer = MoELayer(mlp, DIM, TopAnyRouter, 2)
    assert isinstance(layer.experts.slots[0][0], nn.LazyLinear)
    with pytest.raises(ValueError, match=r"rows \[N, 16\]"):
        layer(torch.randn(9, DIM))


def test_matrices_exchanged_later_are_checked_as_they_are_read() -> None:
    layer = MoELayer(chain(DIM, 32, DIM), DIM, TopAnyRouter, 2)
    for slot in layer.experts.slots:
        slot[2] = nn.Linear(32, 24)
    with pytest.raises(ValueError, match=r"from 16 to 16 columns.*\[24, 32\].*\[32, 16\]"):
        layer(torch.randn(9, DIM))


# Weights that only their modules know how to use.


class Int8(Tensor):
    """A quantised weight, as torchao makes them: it knows ``linear`` alone."""

    codes: Tensor
    scale_O1: Tensor

    @staticmethod
    def __new__(cls, weight_OI: Tensor) -> Int8:
        self: Int8 = Tensor._make_wrapper_subclass(cls, weight_OI.shape, dtype=weight_OI.dtype)
        self.scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        self.codes = (weight_OI / self.scale_O1).round().to(torch.int8)
        return self

    def dequantize(self) -> Tensor:
        return self.codes * self.scale_O1

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return args[0]
        raise NotImplementedError(f"Int8 knows linear alone, not {func}")


def quantised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = Int8(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


class LowRank(nn.Module):
    """An adapter around a linear layer, with the attributes that peft's has."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.in_features, 2, bias=False)
        self.b = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def adapted(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LowRank):
                setattr(module, name, LowRank(child))
    return model


CHANGES = {
    "quantised": quantised,
    "adapted": adapted,
    "parametrized": lambda model: [
        parametrizations.spectral_norm(m) for m in list(model.modules()) if type(m) is nn.Linear
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "router", [TopAnyRouter, CosineTopKRouter, partial(AverageKeyRouter, top_k=2)]
)
def test_linear_layers_that_became_something_else(change: str, router: Any) -> None:
    """Experts and routers compute what their modules compute, not what the weights look like."""
    torch.manual_seed(0)
    layer = MoELayer(chain(DIM, 32, DIM), DIM, router, 3, init="fresh").eval()
    x_TD = torch.randn(20, DIM)
    plain = layer(x_TD)
    CHANGES[change](layer)
    layer.eval()
    layout = layer.experts.layout
    assert layout is not None and read_ffns([layer.experts.slots[0]], layout) is None
    with torch.no_grad():
        found = layer(x_TD)
        routing = layer.router(x_TD, layer.live)
        expected = torch.zeros_like(found)
        for e, slot in enumerate(layer.live):
            out_TD = layer.experts.slots[slot](x_TD)
            expected += (routing.weights_TE * routing.mask_TE)[:, e, None] * out_TD
    torch.testing.assert_close(found, expected)
    if router is CosineTopKRouter:
        projected = nn.functional.normalize(layer.router.project(x_TD), dim=1)
        embeddings = nn.functional.normalize(layer.router.embeddings, dim=1)
        torch.testing.assert_close(layer.router.logits(x_TD), projected @ embeddings.t() * 2)
    if change == "quantised" and not isinstance(layer.router, AverageKeyRouter):
        assert 0 < (found - plain).norm() < 0.02 * plain.norm()
    elif change == "adapted":
        assert (found - plain).norm() > 0.02 * plain.norm()


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_be_read_wrongly_is_refused(change: str) -> None:
    """Shares of an FFN, and blocks whose linear layers are copied, are made of plain weights."""
    mlp = chain(DIM, 32, DIM, bias=False)
    CHANGES[change](mlp)
    with pytest.raises(ConfigError, match=r"moe.init=random.*plain linear"):
        MoELayer(mlp, DIM, TopAnyRouter, 4, init="random")
    for layer in (mlp[0], mlp[2]):
        with pytest.raises(ConfigError, match=r"plain linear layers.*Merge adapters"):
            linear(layer, bias=False)

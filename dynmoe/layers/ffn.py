"""FFNs whose products can be grouped over experts, recognised by what they compute.

Such an FFN is ``outer(dropout(hidden))``, then dropout. ``hidden`` is the activation of one product
of the rows (two matrices), or the activation of one half of the products times the other half
(gated: gate and up apart, or in one matrix). Biases may be missing.

Shape suffixes: N rows, D model width, H hidden width, I all inner products: H, or 2H if gated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten

PLAIN = (nn.Parameter, Tensor, type(None))
OF_ALL_MODULES = vars(nn.Module()).keys()


class Activation(NamedTuple):
    """An elementwise function and its derivative times a gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]
    """``backward(grad, x, grad_input=out)``"""


ACTIVATIONS = {
    "gelu": Activation(aten.gelu, aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(aten.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")
    ),
    "relu": Activation(aten.relu, partial(aten.threshold_backward, threshold=0)),
    "silu": Activation(aten.silu, aten.silu_backward),
}


class GatedFFN(nn.Module):
    """``down(dropout(act(gate(x)) * up(x)))`` (Shazeer, arXiv 2002.05202)."""

    def __init__(
        self, gate: nn.Module, up: nn.Module, act: nn.Module, down: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.gate, self.up, self.act, self.down = gate, up, act, down
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


class PackedGatedFFN(nn.Module):
    """``down(dropout(act(g) * u))``, where ``gate_up`` makes both, [N, 2 H].

    They are its halves, (g, u) if ``gate_first``, else (u, g).
    """

    def __init__(
        self,
        gate_up: nn.Module,
        act: nn.Module,
        down: nn.Module,
        dropout: float,
        gate_first: bool = True,
    ) -> None:
        super().__init__()
        self.gate_up, self.act, self.down = gate_up, act, down
        self.dropout = nn.Dropout(dropout)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.gate_up(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.down(self.dropout(self.act(gate) * up))

    def extra_repr(self) -> str:
        return f"gate_first={self.gate_first}"


class Layout(NamedTuple):
    """Where the FFNs of one form keep their parts, by the names of their children."""

    of: type[nn.Module]
    children: tuple[tuple[str, type[nn.Module]], ...]
    inner: tuple[str, ...]
    """Linear layers of the rows: one, or gate and up."""
    outer: str
    gate: int | None
    """The half of the inner products that is activated; None where nothing is gated."""
    activation: str
    """A key of ``ACTIVATIONS``."""
    dropouts: tuple[str | None, str | None]
    """Before and after ``outer``."""


def keys(mlp: nn.Module, layout: Layout | None = None) -> slice:
    """Return the rows of an FFN's first matrix that its activation takes: the gate's alone.

    Without a ``layout`` the classes of packed FFNs that it knows by name tell.
    """
    known: Any = mlp
    if layout is not None:
        if layout.gate is None or len(layout.inner) == 2:
            return slice(None)
        outer: Any = mlp.get_submodule(layout.outer)
        first, half = layout.gate == 0, outer.in_features
    elif isinstance(mlp, PackedGatedFFN):
        first, half = known.gate_first, known.down.in_features
    elif (type(mlp).__module__, type(mlp).__qualname__) == ("timm.layers.mlp", "GluMlp"):
        first, half = not known.gate_last, known.fc2.in_features
    else:
        return slice(None)
    return slice(half) if first else slice(half, None)


class FFNs(NamedTuple):
    """The numbers of FFNs of one layout, for the products of one forward pass."""

    layout: Layout
    weights: list[Tensor | None]
    """For each FFN: weight and bias of its inner layers, then of the outer one."""
    hidden_dropout: float
    output_dropout: float


def read_ffns(mlps: Sequence[nn.Module], layout: Layout) -> FFNs | None:
    """Return the weights of FFNs as they are now; None if one is no longer what ``layout`` says."""
    # NOTE: in every forward. Nothing tells when a hook, an adapter or a parametrization is put on a
    # module, FSDP exchanges weights around each forward, and dropouts follow train() and eval().
    weights = []
    for mlp in mlps:
        children = mlp._modules
        if type(mlp) is not layout.of or len(children) != len(layout.children) or _changed(mlp):
            return None
        for name, of in layout.children:
            child = children.get(name)
            if type(child) is not of or _changed(child):
                return None
        for name in (*layout.inner, layout.outer):
            linear: Any = children[name]
            own = linear._parameters  # faster than attributes; FSDP puts plain ones there
            if "weight" not in own or "bias" not in own:
                own = {"weight": linear.weight, "bias": linear.bias}
            weight, bias = own["weight"], own["bias"]
            if type(weight) not in PLAIN or type(bias) not in PLAIN:
                return None
            weights += [weight, bias]
    rates = []
    for dropout in layout.dropouts:
        places: list[Any] = [mlp._modules[dropout] for mlp in mlps] if dropout else []
        found: set[float] = {child.p if child.training else 0.0 for child in places}
        if len(found) > 1:
            return None
        rates.append(found.pop() if found else 0.0)
    return FFNs(layout, weights, *rates)


def find_layout(mlp: nn.Module) -> Layout | None:
    """Return the layout of an FFN of a known form, None if ``mlp`` is anything else.

    Known is every module of two or three plain linear layers, at most one activation of
    ``ACTIVATIONS``, dropouts and identities that computes what a layout says, and its gradients. It
    is tried on a few rows, in training and in evaluation, with small layers in place of its own: so
    ``nn.Sequential`` and the FFNs of timm and transformers are known without a list of their names.
    Norms, hooks, adapters, parametrizations and quantised weights make it something else. Nothing
    of ``mlp`` is called and no random number is drawn.
    """
    children: dict[str, Any] = {n: child for n, child in mlp._modules.items() if child is not None}
    linears = [name for name, child in children.items() if type(child) is nn.Linear]
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    rest = [c for c in children.values() if type(c) not in (nn.Linear, nn.Dropout, nn.Identity)]
    if (
        len(linears) not in (2, 3)
        or len(rest) > 1
        or len(children) != len(mlp._modules)
        or mlp._parameters
        or mlp._buffers
        or any([*c.parameters(), *c.buffers()] for c in rest)
        or any(_changed(module) for module in mlp.modules())
        or not all(is_plain_linear(children[name]) for name in linears)
    ):
        return None
    types = tuple((name, type(child)) for name, child in children.items())
    places = [
        (before, after)
        for before, after in product((None, *dropouts), repeat=2)
        if {before, after} >= set(dropouts) and (before is None or before != after)
    ]
    for *inner, outer in permutations(linears):
        hidden = children[outer].in_features
        outputs = [children[name].out_features for name in inner]
        gates: tuple[int | None, ...] = {
            (hidden,): (None,),
            (2 * hidden,): (0, 1),
            (hidden, hidden): (0,),
        }.get(tuple(outputs), ())
        if not gates:
            continue
        with torch.inference_mode(False):
            trial = _Trial(mlp, children, inner, outer, packed=gates == (0, 1))
            for gate, activation, dropped in product(gates, ACTIVATIONS, places):
                layout = Layout(type(mlp), types, tuple(inner), outer, gate, activation, dropped)
                if trial.agrees(layout):
                    return layout
    return None


def common_layout(mlps: Sequence[nn.Module]) -> Layout | None:
    """Return the layout of FFNs that all have the same, None if there is none."""
    layout, build = find_layout(mlps[0]), _build(mlps[0])
    same = layout is not None and all(
        _equal(_build(mlp), build) or find_layout(mlp) == layout for mlp in mlps[1:]
    )
    return layout if same else None


def _build(mlp: nn.Module) -> list[Any]:
    """The modules of an FFN with all that they keep beside tensors and modules."""
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if k not in OF_ALL_MODULES})
        for name, module in mlp.named_modules()
    ]


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # arrays do not tell in one word
        return False


class _Trial:
    """A small copy of an FFN: fp64, on the CPU, and with marks in the place of dropouts."""

    def __init__(
        self,
        mlp: nn.Module,
        children: Mapping[str, Any],
        inner: Sequence[str],
        outer: str,
        packed: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        dim, hidden = 6, 10
        self.children: dict[str, Any] = {}
        for number, (name, child) in enumerate(children.items()):
            if type(child) is nn.Linear:
                inputs, outputs = (hidden, dim) if name == outer else (dim, hidden * (1 + packed))
                linear = nn.Linear(1, 1, bias=False, device="meta")
                linear.weight = nn.Parameter(draw(outputs, inputs))
                linear.bias = nn.Parameter(draw(outputs)) if child.bias is not None else None
                self.children[name] = linear
            elif type(child) is nn.Dropout:
                self.children[name] = _Mark(number + 2)
            else:
                self.children[name] = copy.deepcopy(child)
        # Of all sizes: functions that differ far from 0 alone, as a clip does, are told apart.
        sizes = torch.logspace(-3, 3, 8, dtype=torch.float64, device="cpu")[:, None]
        self.rows, self.grad = draw(8, dim) * sizes, draw(8, dim)
        self.rows.requires_grad_()
        linears = [self.children[name] for name in (*inner, outer)]
        self.inputs = [self.rows, *(p for each in linears for p in each.parameters())]
        small = copy.copy(mlp)
        small.__dict__["_modules"] = self.children
        self.outputs: list[Tensor] = []
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                self.outputs = [small.train(mode)(self.rows) for mode in (True, False)]
        except Exception:  # whatever a foreign module raises
            self.outputs = []

    def agrees(self, layout: Layout) -> bool:
        """Whether the copy computes what the layout says, in training and in evaluation."""
        with torch.no_grad():
            expected_ND = self._expected(layout)
            bound_N1 = 1e-9 * expected_ND.abs().amax(1, keepdim=True)
            same = bool(self.outputs) and all(
                isinstance(out, Tensor)
                and out.shape == expected_ND.shape
                and bool(((out - expected_ND).abs() <= bound_N1).all())
                for out in self.outputs
            )
        return same and self._agrees_in_gradients(layout)

    def _expected(self, layout: Layout) -> Tensor:
        before, after = (name and self.children[name] for name in layout.dropouts)
        hidden_NH = torch.cat([self._linear(name, self.rows) for name in layout.inner], 1)
        activation = ACTIVATIONS[layout.activation].forward
        if layout.gate is None:
            hidden_NH = activation(hidden_NH)
        else:
            gate_NH, up_NH = halves(hidden_NH, layout.gate)
            hidden_NH = activation(gate_NH) * up_NH
        expected_ND = self._linear(layout.outer, before(hidden_NH) if before else hidden_NH)
        return after(expected_ND) if after else expected_ND

    def _agrees_in_gradients(self, layout: Layout) -> bool:
        """Whether no part is detached, or has a backward pass of its own."""
        with torch.enable_grad():
            outputs = (self._expected(layout), *self.outputs)
        try:
            expected, *found = (
                torch.autograd.grad(out, self.inputs, self.grad, retain_graph=True)
                for out in outputs
            )
        except Exception:  # whatever a foreign module raises
            return False
        return all(
            bool(((a - b).abs() <= 1e-9 * b.abs().max()).all())
            for grads in found
            for a, b in zip(grads, expected, strict=True)
        )

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        linear = self.children[name]
        return F.linear(rows, linear.weight, linear.bias)


class _Mark(nn.Module):
    """In the place of a dropout: a function that no other and no linear layer can undo."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.number * x).sin()


def activated(pre_NI: Tensor, layout: Layout) -> Tensor:
    """Return the hidden activations of the inner products, [N, H]."""
    forward = ACTIVATIONS[layout.activation].forward
    if layout.gate is None:
        return forward(pre_NI)
    gate_NH, up_NH = halves(pre_NI, layout.gate)
    return forward(gate_NH).mul_(up_NH)


def halves(pre_NI: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    """Return the half that is activated and the one it is multiplied with, views of [N, H]."""
    pair = pre_NI.chunk(2, 1)
    return pair[gate], pair[1 - gate]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes ``F.linear`` of plain tensors, which may then be read directly.

    Not so: subclasses (adapters, parametrizations), hooks, and weights of a subclass of tensors
    (quantised by torchao or bitsandbytes, ``DTensor``).
    """
    return (
        type(module) is nn.Linear
        and not _changed(module)
        and all(type(w) in PLAIN for w in (module.weight, module.bias))
    )


def _changed(module: Any) -> bool:
    """Whether calling the module does more than its class says."""
    state = module.__dict__
    return "forward" in state or bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )

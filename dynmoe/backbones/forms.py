"""Forms of FFNs: where a Transformer block keeps one, and how an MoE layer takes its place.

Shape suffixes: D model width, I and O inputs and outputs of a matrix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Protocol

from torch import Tensor, nn

from dynmoe.errors import ConfigError
from dynmoe.layers.ffn import GatedFFN, PackedGatedFFN, is_plain_linear

# Activations of transformers by class name, as PyTorch's own, which the fast path knows.
ACTIVATIONS = {
    "GELUActivation": lambda: nn.GELU(),
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "FastGELUActivation": lambda: nn.GELU("tanh"),
    "BloomGelu": lambda: nn.GELU("tanh"),
    "SiLUActivation": lambda: nn.SiLU(),
}


class Form(Protocol):
    """One way to build an FFN into a block."""

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        """Make a module ``[N, D] -> [N, D]`` of the block's FFN, with the block's weights.

        ``dropout``: the ``expert_dropout`` of ``add_moe_layers``.

        Raises:
            AttributeError: the block has no such FFN.
            ConfigError: it has one from which no expert can be made.
        """

    def put(self, block: Any, layer: nn.Module) -> None:
        """Put an MoE layer of such experts into the block."""

    def modules(self, block: Any) -> list[nn.Module]:
        """Return the modules that hold the FFN's parameters, or the MoE layer's in its place."""


# NOTE: weights of experts that sum to less than 1 must not scale the output bias down, nor sums of
# parts count it once for each of them: where a form does not say otherwise, the block keeps it.


@dataclass(frozen=True)
class Chain:
    """Linear, activation, linear, by their paths in the block.

    Experts have no output bias: the block adds it once. Where ``place`` is given the layer takes
    the place of this module, which holds no more than the first two; else that of ``first``. Where
    ``whole`` is given, the module that holds all three and no more, the layer takes its place, and
    experts have output biases of their own.
    """

    first: str
    activation: str | type[nn.Module]
    """Its path, or its class where the code of ``place`` applies it."""
    second: str
    place: str | None = None
    dropout: str | None = None
    """Between the activation and the second linear layer: a module or a rate (``rate``)."""
    whole: str | None = None

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        replaced = self.whole or self.place
        if replaced is not None:
            _check_no_more(block, replaced, (self.first, self.activation, self.second))
        first = linear(block.get_submodule(self.first), bias=True)
        second = linear(block.get_submodule(self.second), bias=self.whole is not None)
        parts = [first, activation_of(block, self.activation)]
        if dropout is not None or self.dropout is not None:
            parts.append(nn.Dropout(rate(block, self.dropout) if dropout is None else dropout))
        return nn.Sequential(*parts, second)

    def put(self, block: Any, layer: nn.Module) -> None:
        if self.whole is not None:
            block.set_submodule(self.whole, layer)
            return
        bias_D = block.get_submodule(self.second).bias
        block.set_submodule(self.second, nn.Identity() if bias_D is None else Bias(bias_D))
        if isinstance(self.activation, str):
            block.set_submodule(self.activation, nn.Identity())
        if self.dropout is not None:
            _no_dropout(block, self.dropout)
        block.set_submodule(self.place or self.first, layer)

    def modules(self, block: Any) -> list[nn.Module]:
        paths = [self.whole] if self.whole is not None else [self.place or self.first, self.second]
        return [block.get_submodule(path) for path in paths]


@dataclass(frozen=True)
class Gated:
    """``down(dropout(act(gate(x)) * up(x)))``, by paths in the block, as in Llama's ``block.mlp``.

    The layer takes the place of ``place``. Experts have no output bias: where there is one, or a
    dropout ``after`` it, the place gets a sequence of the layer (``moe``) and these.
    """

    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str | type[nn.Module] = "mlp.act_fn"
    place: str = "mlp"
    dropout: str | None = None
    after: str | None = None

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        _check_no_more(block, self.place, (self.gate, self.up, self.activation, self.down))
        p = rate(block, self.dropout) if dropout is None else dropout
        gate, up = (block.get_submodule(path) for path in (self.gate, self.up))
        return GatedFFN(gate, up, activation_of(block, self.activation), _inner(block, self), p)

    def put(self, block: Any, layer: nn.Module) -> None:
        _put_in_place(block, self, layer)

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.get_submodule(self.place)]


@dataclass(frozen=True)
class Packed:
    """The same with gate and up in one matrix, whose first half the activation takes."""

    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.activation_fn"
    place: str = "mlp"
    dropout: str | None = None
    after: str | None = None
    gate_first: bool = True

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        _check_no_more(block, self.place, (self.gate_up, self.activation, self.down))
        p = rate(block, self.dropout) if dropout is None else dropout
        gate_up, act = block.get_submodule(self.gate_up), activation_of(block, self.activation)
        return PackedGatedFFN(gate_up, act, _inner(block, self), p, self.gate_first)

    def put(self, block: Any, layer: nn.Module) -> None:
        _put_in_place(block, self, layer)

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.get_submodule(self.place)]


@dataclass(frozen=True)
class Whole:
    """A module with all it holds, norms, multipliers and output biases included."""

    place: str

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        mlp: nn.Module = block.get_submodule(self.place)
        if dropout is not None:
            raise ConfigError(
                f"moe.expert_dropout: {type(mlp).__name__} becomes experts as it is, and has no "
                f"dropout that could be set, found {dropout}. Set moe.expert_dropout=null."
            )
        return mlp

    def put(self, block: Any, layer: nn.Module) -> None:
        block.set_submodule(self.place, layer)

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.get_submodule(self.place)]


# timm's FFNs (timm/layers/mlp.py) in parts, by class. All may have a norm over hidden neurons.
TIMM_PARTS: dict[str, Form] = {
    "Mlp": Chain("mlp.fc1", "mlp.act", "mlp.fc2", dropout="mlp.drop1"),
    "GluMlp": Packed("mlp.fc1", "mlp.fc2", "mlp.act", dropout="mlp.drop1", after="mlp.drop2"),
    "SwiGLU": Gated(
        "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2", "mlp.act", dropout="mlp.drop1", after="mlp.drop2"
    ),
}
TIMM_WHOLE = (*TIMM_PARTS, "GeGluMlp")
TIMM_OTHERS = {
    "DiffParallelScalingBlock": "its FFN and its attention share a matrix",
    "MixerBlock": "it has two FFNs, one of them across tokens",
    "ParallelScalingBlock": "its FFN and its attention share a matrix",
    "ParallelThingsBlock": "it has two FFNs side by side",
}


@dataclass(frozen=True)
class Timm:
    """timm's ``block.mlp``, whole: experts keep their output biases, as GMoE's do. Or in parts."""

    parts: bool = False

    def expert(self, block: Any, dropout: float | None) -> nn.Module:
        if reason := TIMM_OTHERS.get(type(block).__name__):
            raise AttributeError(reason)
        mlp: nn.Module = block.mlp
        kind = type(mlp).__name__
        if self.parts:
            return self._parts(mlp).expert(block, dropout)
        if kind not in TIMM_WHOLE:
            raise AttributeError(f"its mlp is a {kind}, known are {', '.join(TIMM_WHOLE)}")
        if dropout is not None:
            mlp.drop1 = nn.Dropout(dropout)  # drop2, after the last layer, stays as it is
        return mlp

    def put(self, block: Any, layer: nn.Module) -> None:
        if self.parts:
            self._parts(block.mlp).put(block, layer)
        else:
            block.mlp = layer

    def modules(self, block: Any) -> list[nn.Module]:
        return [block.mlp]

    def _parts(self, mlp: Any) -> Form:
        form = TIMM_PARTS.get(type(mlp).__name__)
        norm = getattr(mlp, "norm", None)
        if form is None or type(norm) is not nn.Identity:
            norms = "" if norm is None else f" with a {type(norm).__name__} inside"
            raise ConfigError(
                "moe.init: expected an FFN of linear layers, activation and dropout alone for "
                f"experts that are parts of it, found {type(mlp).__name__}{norms}. Set "
                "moe.init=copy."
            )
        gate_first = not getattr(mlp, "gate_last", False)
        return replace(form, gate_first=gate_first) if isinstance(form, Packed) else form


def _check_no_more(block: nn.Module, place: str, paths: Sequence[str | type[nn.Module]]) -> None:
    """Refuse a module to be replaced that has parameters beside those of ``paths``."""
    parts = [block.get_submodule(path) for path in paths if isinstance(path, str)]
    known = {id(p) for part in parts for p in part.parameters()}
    replaced = block.get_submodule(place)
    more = [name for name, p in replaced.named_parameters() if id(p) not in known]
    if more:
        raise ConfigError(
            f"backbone: {type(replaced).__name__} has parameters beside its linear layers "
            f"({', '.join(more[:3])}), which experts would lack. Set moe=dense."
        )


def _inner(block: Any, form: Gated | Packed) -> nn.Module:
    """The last linear layer, without its bias."""
    down: nn.Module = block.get_submodule(form.down)
    return down if down.bias is None else linear(down, bias=False)


def _put_in_place(block: Any, form: Gated | Packed, layer: nn.Module) -> None:
    bias_D = block.get_submodule(form.down).bias
    parts: dict[str, nn.Module] = {"moe": layer}
    if bias_D is not None:
        parts["output"] = Bias(bias_D)
    if form.after is not None:
        parts["dropout"] = nn.Dropout(rate(block, form.after))
    block.set_submodule(form.place, layer if len(parts) == 1 else nn.Sequential(OrderedDict(parts)))


class Bias(nn.Module):
    """The output bias of an FFN that became an MoE layer."""

    def __init__(self, bias_D: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias_D.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


# Classes beside nn.Linear with its weights and its forward: by name, transposed or not.
LIKE_LINEAR = {"Conv1D": True, "FalconLinear": False}


def linear(layer: Any, bias: bool) -> nn.Linear:
    """Make an ``nn.Linear`` of the weights of one, or of GPT-2's transposed ``Conv1D``.

    Raises:
        ConfigError: it is neither, so that its weights alone do not say what it computes.
    """
    weight_OI = layer.weight.detach()
    transposed = LIKE_LINEAR.get(type(layer).__name__)
    if transposed:
        weight_OI = weight_OI.t().contiguous()
    elif transposed is None and not is_plain_linear(layer):
        raise ConfigError(
            f"backbone: an MoE layer needs plain linear layers in the FFN it replaces, found "
            f"{type(layer).__name__} with weights of type {type(layer.weight).__name__}. Merge "
            "adapters, remove parametrizations and hooks, and load weights that are not quantised."
        )
    made = nn.Linear(weight_OI.shape[1], len(weight_OI), bias=False, device="meta")
    made.weight = nn.Parameter(weight_OI)
    if bias:
        made.bias = layer.bias
    return made


def activation_of(block: nn.Module, activation: str | type[nn.Module]) -> nn.Module:
    """Return PyTorch's own activation where it computes the same, else the block's."""
    if not isinstance(activation, str):
        return activation()
    module = block.get_submodule(activation)
    maker = ACTIVATIONS.get(type(module).__name__)
    return module if maker is None else maker()


def rate(block: nn.Module, path: str | None) -> float:
    """Return the rate of a dropout: a module's, or a number that the block's code reads."""
    found: Any = 0.0 if path is None else attrgetter(path)(block)
    return float(getattr(found, "p", found))


def _no_dropout(block: nn.Module, path: str) -> None:
    """Take a dropout, which experts have now, out of the block."""
    if isinstance(attrgetter(path)(block), nn.Module):
        block.set_submodule(path, nn.Identity())
    else:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, 0.0)

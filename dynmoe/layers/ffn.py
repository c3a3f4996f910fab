"""FFNs whose products can be grouped over experts: their matrices, biases and activation.

Shape suffixes: N rows, D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

aten = torch.ops.aten

# Classes whose forward applies their children in order. By name: the layers need torch alone.
CHAINS = (("torch.nn.modules.container", "Sequential"), ("timm.layers.mlp", "Mlp"))
PACKED = ("timm.layers.mlp", "GluMlp")
PLAIN = (nn.Parameter, Tensor, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Activation(NamedTuple):
    """An elementwise function and its derivative times a gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]
    """``backward(grad, x, grad_input=out)``"""


ACTIVATIONS = {
    (nn.GELU, "none"): Activation(aten.gelu, aten.gelu_backward),
    (nn.GELU, "tanh"): Activation(
        partial(aten.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")
    ),
    (nn.ReLU, None): Activation(aten.relu, partial(aten.threshold_backward, threshold=0)),
    (nn.SiLU, None): Activation(aten.silu, aten.silu_backward),
}


class FFN(NamedTuple):
    """``w2 dropout(activation(w1 x + b1)) + b2``, then dropout. Biases may be missing."""

    w1_HD: Tensor
    b1_H: Tensor | None
    w2_DH: Tensor
    b2_D: Tensor | None
    activation: Activation
    hidden_dropout: float
    output_dropout: float

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for FFNs that differ in the values of their weights alone."""
        biases = self.b1_H is None, self.b2_D is None
        return self.w1_HD.shape, self.w2_DH.shape, biases, *self[4:]


def read_ffn(mlp: nn.Module) -> FFN | None:
    """Return the parts of an FFN of two plain linear layers, None if ``mlp`` is anything else.

    Known are timm's ``Mlp``, and ``nn.Sequential`` of Linear, activation, [Dropout], Linear,
    [Dropout], with GELU, ReLU or SiLU. Hooks, adapters, parametrizations and quantised weights make
    it something else.
    """
    # NOTE: read anew in every forward. Nothing says when a hook, an adapter or a parametrization
    # was put on a module, FSDP exchanges the weights around each forward, and a dropout follows
    # train() and eval(): a check that an earlier answer still holds would visit the same modules.
    if (type(mlp).__module__, type(mlp).__qualname__) not in CHAINS or _has_hooks(mlp):
        return None
    layers: list[Any] = []
    dropouts: list[float | None] = [None, None]
    for module in mlp.children():
        if _has_hooks(module):
            return None
        place = len(layers) - 2  # 0 after the activation, 1 after the second linear layer
        if type(module) is nn.Dropout and place in (0, 1) and dropouts[place] is None:
            dropouts[place] = module.p if module.training else 0.0
        elif type(module) is not nn.Identity:
            layers.append(module)
    if len(layers) != 3 or not all(is_plain_linear(layer) for layer in layers[::2]):
        return None
    fc1, act, fc2 = layers
    activation = ACTIVATIONS.get((type(act), getattr(act, "approximate", None)))
    if activation is None:
        return None
    return FFN(
        fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation, *(p or 0.0 for p in dropouts)
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes ``F.linear`` of plain tensors, which may then be read directly.

    Not so: subclasses (adapters, parametrizations), hooks, and weights of a subclass of tensors
    (quantised by torchao or bitsandbytes, ``DTensor``).
    """
    return (
        type(module) is nn.Linear
        and not _has_hooks(module)
        and all(type(w) in PLAIN for w in (module.weight, module.bias))
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    state = vars(module)
    return "forward" in state or any(state[name] for name in HOOKS)


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


def keys(mlp: nn.Module) -> slice:
    """Return the rows of an FFN's first matrix that its activation takes: the gate's alone."""
    known: Any = mlp
    if isinstance(mlp, PackedGatedFFN):
        first, half = known.gate_first, known.down.in_features
    elif (type(mlp).__module__, type(mlp).__qualname__) == PACKED:
        first, half = not known.gate_last, known.fc2.in_features
    else:
        return slice(None)
    return slice(half) if first else slice(half, None)

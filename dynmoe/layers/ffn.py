"""Recognise the FFNs whose products can be grouped over experts: Linear, activation, Linear.

Shape suffixes: D model width, H hidden width.
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
    """The parts of an FFN of two plain linear layers, None if ``mlp`` is anything else.

    Known are timm's ``Mlp``, and ``nn.Sequential`` of Linear, activation, [Dropout], Linear,
    [Dropout], with GELU, ReLU or SiLU. Hooks, adapters and parametrizations make it something else.
    """
    if (type(mlp).__module__, type(mlp).__qualname__) not in CHAINS or _has_hooks(mlp):
        return None
    layers: list[Any] = []
    dropouts: list[float | None] = [None, None]
    for module in mlp.children():
        if _has_hooks(module):
            return None
        place = len(layers) - 2
        if type(module) is nn.Dropout and place in (0, 1) and dropouts[place] is None:
            dropouts[place] = module.p if module.training else 0.0
        elif type(module) is not nn.Identity:
            layers.append(module)
    if [type(layer) for layer in layers[::2]] != [nn.Linear, nn.Linear] or len(layers) != 3:
        return None
    fc1, act, fc2 = layers
    activation = ACTIVATIONS.get((type(act), getattr(act, "approximate", None)))
    if activation is None:
        return None
    return FFN(
        fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation, *(p or 0.0 for p in dropouts)
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    state = vars(module)
    return "forward" in state or any(state[name] for name in HOOKS)

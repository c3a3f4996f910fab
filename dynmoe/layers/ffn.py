"""Recognise the FFNs whose products can be grouped over experts: Linear, activation, Linear.

Shape suffixes: D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

aten = torch.ops.aten

# Classes whose forward applies their children in order. By name: the layers need torch alone.
CHAINS = ("torch.nn.modules.container.Sequential", "timm.layers.mlp.Mlp")


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
    if not _is_chain(type(mlp)) or _has_hooks(mlp):
        return None
    layers: list[Any] = []
    dropouts = [0.0, 0.0]
    for module in mlp.children():
        if _has_hooks(module):
            return None
        if type(module) is nn.Dropout and 2 <= len(layers) <= 3:
            dropouts[len(layers) - 2] = module.p if module.training else 0.0
        elif type(module) is not nn.Identity:
            layers.append(module)
    if [type(layer) for layer in layers[::2]] != [nn.Linear, nn.Linear] or len(layers) != 3:
        return None
    fc1, act, fc2 = layers
    activation = ACTIVATIONS.get((type(act), getattr(act, "approximate", None)))
    if activation is None:
        return None
    return FFN(fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation, *dropouts)


@lru_cache
def _is_chain(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" in CHAINS


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)

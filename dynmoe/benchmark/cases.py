"""One routed layer, computed in every way: all cases do the same work on the same routing.

Shape suffixes: T tokens, E experts, P pairs, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dynmoe.benchmark.fit import fit_thresholds
from dynmoe.benchmark.memory import Outputs
from dynmoe.benchmark.plan import CASES, Shape
from dynmoe.benchmark.rivals import RIVALS, StackedFFN
from dynmoe.layers import Experts, MoELayer, Routing, TopAnyRouter, TopKRouter, record_routing

Precision = Literal["fp32", "bf16", "amp"]

DRAWS = 16
"""Batches of tokens. In training the loads of experts are new in every step, and on a CPU oneDNN
compiles a kernel for every new number of rows: one batch again and again would hide that."""


class Draw(NamedTuple):
    """One batch of tokens and what the fitted router makes of it; tokens and weights are leaves."""

    x_TD: Tensor
    routing: Routing


@dataclass
class Case:
    """A forward and a backward pass; each call takes the next draw and returns its gradients."""

    compute: Callable[[Draw], Outputs]
    """The output rows, then scalars such as the auxiliary loss."""
    parameters: list[Tensor]
    """What is differentiated besides the draw's tokens and weights."""
    draws: Sequence[Draw]
    pairs: float
    """FFN rows of useful work, the mean over the draws."""
    amp: bool

    def __post_init__(self) -> None:
        self.grad = torch.randn_like(self.draws[0].x_TD)
        self._next = cycle(self.draws)

    def forward(self, draw: Draw) -> Outputs:
        with torch.autocast(self.grad.device.type, torch.bfloat16, enabled=self.amp):
            return self.compute(draw)

    def backward(self, draw: Draw, outputs: Outputs) -> tuple[Tensor | None, ...]:
        inputs = [draw.x_TD, draw.routing.weights_TE, *self.parameters]
        grads = [self.grad, *(None for _ in outputs[1:])]
        return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    def __call__(self) -> tuple[Tensor | None, ...]:
        draw = next(self._next)
        return self.backward(draw, self.forward(draw))


def build_cases(
    shape: Shape, k: float, names: Sequence[str], precision: Precision, device: torch.device
) -> dict[str, Case]:
    """The named cases, and always ``limit``, in the order of ``plan.CASES``.

    The top-any router of ``layer`` is fitted to the first of ``DRAWS`` batches of tokens
    (``fit_thresholds``); the loads of the others fluctuate by themselves. The other cases get its
    masks and weights as they are. ``limit`` has as many rows as there are pairs on average, always:
    a dense FFN's shape is fixed. ``top_k`` routes with its own, freshly drawn, nearly balanced
    router, and exists for an integer k only. ``bf16`` holds everything in bf16, ``amp`` fp32
    weights under autocast.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    live = range(shape.experts)

    def on_device(module: nn.Module) -> nn.Module:
        return module.to(device, dtype)

    def tokens(rows: int) -> Tensor:
        return torch.randn(rows, shape.dim, device=device, dtype=dtype, requires_grad=True)

    mlp = nn.Sequential(
        nn.Linear(shape.dim, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.dim)
    )
    layer = MoELayer(mlp, shape.dim, TopAnyRouter, shape.experts, init="fresh")
    on_device(layer)
    assert isinstance(layer.router, TopAnyRouter)
    batches = [tokens(shape.tokens) for _ in range(DRAWS)]
    fit_thresholds(layer.router, live, batches[0], k)
    draws = [Draw(x_TD, _routing(layer.router, x_TD, live)) for x_TD in batches]
    pairs = fmean(int(draw.routing.mask_TE.sum()) for draw in draws)

    def case(
        compute: Callable[[Draw], Outputs],
        parameters: Sequence[Tensor],
        draws: Sequence[Draw] = draws,
        pairs: float = pairs,
    ) -> Case:
        return Case(compute, list(parameters), draws, pairs, amp=precision == "amp")

    def alone(experts: Experts) -> Case:
        return case(lambda d: (experts(d.x_TD, d.routing, live),), list(experts.parameters()))

    def limit() -> Case:
        on_device(mlp)
        rows = Draw(tokens(round(pairs)), draws[0].routing)
        return case(lambda d: (mlp(d.x_TD),), list(mlp.parameters()), [rows], round(pairs))

    def recompute() -> Case:
        experts = Experts(mlp, shape.experts, recompute=True)
        on_device(experts).load_state_dict(layer.experts.state_dict())
        return alone(experts)

    def top_k() -> Case:
        router = partial(TopKRouter, top_k=int(k))
        other = MoELayer(mlp, shape.dim, router, shape.experts, init="fresh")
        on_device(other)
        return case(
            partial(_with_aux, other), list(other.parameters()), pairs=int(k) * shape.tokens
        )

    def rival(name: str) -> Case:
        ffn, rows_of = stack(layer.experts), RIVALS[name]
        return case(lambda d: (rows_of(d.x_TD, d.routing.weights_TE, d.routing.mask_TE, ffn),), ffn)

    makers: dict[str, Callable[[], Case]] = {
        "limit": limit,
        "layer": lambda: case(partial(_with_aux, layer), list(layer.parameters())),
        "experts": lambda: alone(layer.experts),
        "recompute": recompute,
        "top_k": top_k,
        **{name: partial(rival, name) for name in RIVALS},
    }
    wanted = {"limit", *names} if float(k).is_integer() else {"limit", *names} - {"top_k"}
    return {name: makers[name]() for name in CASES if name in wanted}


def stack(experts: Experts) -> StackedFFN:
    """A pool of Linear-GELU-Linear in stacked leaf tensors, as the rivals take it."""
    layers = [list(slot.children()) for slot in experts.slots]
    each = [(fc1.weight, fc1.bias, fc2.weight, fc2.bias) for fc1, _, fc2 in layers]
    return StackedFFN(
        *(torch.stack(tensors).detach().requires_grad_() for tensors in zip(*each, strict=True))
    )


@torch.no_grad()
def _routing(router: TopAnyRouter, x_TD: Tensor, live: Sequence[int]) -> Routing:
    routing: Routing = router(x_TD, live)
    return routing._replace(weights_TE=routing.weights_TE.requires_grad_())


def _with_aux(layer: MoELayer, draw: Draw) -> Outputs:
    with record_routing(layer) as tape:
        y_TD = layer(draw.x_TD)
    (calls,) = tape.values()
    return y_TD, *(call.aux for call in calls)

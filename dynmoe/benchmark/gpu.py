"""``dynmoe-bench gpu``: is the path for GPUs right, before its speed is measured."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dynmoe.benchmark import results, timing
from dynmoe.benchmark.cases import Shape
from dynmoe.benchmark.layer import new_ffn
from dynmoe.benchmark.models import Loop
from dynmoe.benchmark.results import Column, Row
from dynmoe.errors import ConfigError
from dynmoe.layers import Experts, TopKRouter
from dynmoe.layers.grouped import uses_grouped_mm

COLUMNS = (
    Column("ffn", "ffn"),
    Column("path", "path"),
    *(Column(what, what, ".2e") for what in ("values", "gradients")),
    *(Column(f"loop's\n{what}", f"loop_{what}", ".2e") for what in ("values", "gradients")),
)
TITLE = "Relative errors of the experts in bf16, and of a loop over them, against fp32"


def check(shape: Shape, device: torch.device, output: results.Output) -> None:
    """Compare values and gradients of bf16 experts with a plain loop over them, print and write.

    Raises:
        ConfigError: the errors against fp32 are more than twice the loop's.
    """
    rows = [errors(shape, ffn, device) for ffn in ("mlp", "gated")]
    machine = timing.machine_facts(device, "bf16")
    with output.progress():
        output.add(rows, results.Conditions(machine, {}, shape._asdict()))
    output.show(*results.tables(rows, (), TITLE, COLUMNS))
    for row in rows:
        for what in ("values", "gradients"):
            if not row[what] <= 2 * row[f"loop_{what}"]:
                raise ConfigError(
                    f"{row['ffn']} experts by {row['path']}: the relative error of {what} is"
                    f" {row[what]:.2e}, a loop's {row[f'loop_{what}']:.2e}; expected at most twice"
                    " as much. Nothing was timed: please report it with the output above"
                )


def errors(shape: Shape, ffn: str, device: torch.device) -> Row:
    """Return the ``path`` that is taken, and norms of errors over norms of fp32's ``values`` and
    ``gradients`` (the largest of all tensors): of the experts and of the ``loop`` in bf16."""
    torch.manual_seed(0)
    live = range(shape.experts)
    half = Experts(new_ffn(shape, ffn), shape.experts, init="fresh").to(device, torch.bfloat16)
    exact = copy.deepcopy(half).float()
    x_TD, grad_TD = torch.randn(2, shape.tokens, shape.dim, device=device).bfloat16().float()
    router = TopKRouter(shape.dim, shape.experts, top_k=min(2, shape.experts)).to(device)
    with torch.no_grad():
        routing = router(x_TD, live)

    def passes(experts: Experts, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        x, weights = x_TD.to(dtype).requires_grad_(), routing.weights_TE.clone().requires_grad_()
        y_TD = experts(x, routing._replace(weights_TE=weights), live)
        inputs = [x, weights, *experts.parameters()]
        return y_TD, list(torch.autograd.grad(y_TD, inputs, grad_TD.to(y_TD.dtype)))

    want, want_grads = passes(Loop(exact), torch.float32)
    row: Row = {"ffn": ffn, "path": "a loop"}
    if uses_grouped_mm(x_TD.bfloat16(), shape.hidden):
        row["path"] = "grouped_mm"
    for name, experts in (("", half), ("loop_", Loop(half))):
        got, grads = passes(experts, torch.bfloat16)
        row[f"{name}values"] = _error(got, want)
        row[f"{name}gradients"] = max(map(_error, grads, want_grads))
    return row


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()

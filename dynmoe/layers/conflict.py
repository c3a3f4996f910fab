"""Token gradient conflict: a loss for tokens whose gradient opposes that of their expert's others.

STGC (arXiv 2406.19905), as its reviews tell it: no code was released. Pair (t, e) conflicts if the
cosine of its gradient with the mean over the expert's pairs is below a threshold. The loss is the
mean of ``-log softmax(-z_t)[e]`` over conflicting pairs, z the router's logits: it lowers z_te.

Gradients of pairs are there in the backward pass alone, and so is the loss. In the forward pass it
is a 0, through which the backward pass learns how the loss is weighed and scaled; one pass makes
all gradients.

Shape suffixes: T tokens, E living experts, C columns of the logits (E first), P pairs sorted by
token, R rows sorted by expert, D model width; N rows of one expert, I inputs and O outputs of a
linear layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dynmoe.errors import ConfigError
from dynmoe.layers.dispatch import Pairs, sum_by_token
from dynmoe.layers.experts import linears
from dynmoe.layers.routers import Router


class ConflictLoss:
    """The loss of one layer: its options, and what was found since ``take``.

    - ``weight``: of the loss, beta in the paper; 0 is no loss, and costs nothing.
    - ``threshold``: pairs with a cosine below it conflict, tau in the paper.
    - ``proxy``: which gradients are compared: those of the expert's ``output``; of the outputs of
      all its linear layers, as of their biases (``bias``); of all parameters of these layers
      (``full``). The last two call experts one after the other: slower, and ``recompute`` rests.
    - ``every``, ``start``: the loss counts in every so many optimizer steps, from step ``start``.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        threshold: float = 0.0,
        proxy: Literal["output", "bias", "full"] = "output",
        every: int = 1,
        start: int = 0,
    ) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"moe.conflict.weight: expected 0 or more, found {weight}")
        if not -1 <= threshold <= 1:
            raise ConfigError(
                f"moe.conflict.threshold: expected a cosine, -1 to 1, found {threshold}"
            )
        if proxy not in ("output", "bias", "full"):
            raise ConfigError(f"moe.conflict.proxy: expected output, bias or full, found {proxy!r}")
        if every < 1 or start < 0:
            raise ConfigError(
                f"moe.conflict: expected every of 1 or more and start of 0 or more, found "
                f"every={every}, start={start}"
            )
        self.weight = weight
        self.threshold = threshold
        self.proxy = proxy
        self.every = every
        self.start = start
        # Not a buffer: DDP would overwrite it with rank 0's at every forward.
        self._found_3: Tensor | None = None

    def check(self, router: Router, expert: nn.Module) -> None:
        """Refuse a router without logits, and a ``proxy`` that sees nothing of the expert.

        Raises:
            ConfigError: naming the key.
        """
        if not router.has_logits:
            raise ConfigError(
                f"moe.conflict.weight: expected 0 with a {type(router).__name__}, which has no "
                f"logits of its own, found {self.weight:g}. Set it to 0, or choose TopKRouter "
                "(moe=topk) or another router with logits"
            )
        if self.proxy != "output" and not linears(expert):
            raise ConfigError(
                f"moe.conflict.proxy: expected output for experts without linear layers, found "
                f"{self.proxy}. Set it to output"
            )

    def is_due(self, step: int) -> bool:
        """Whether the loss counts in the optimizer step after ``step`` others."""
        return step >= self.start and (step - self.start) % self.every == 0

    def add(self, found_3: Tensor) -> None:
        before = self._found_3
        self._found_3 = found_3 if before is None else before.to(found_3.device) + found_3

    def take(self, device: torch.device) -> Tensor:
        """Return the number of pairs and of conflicting ones and the sum of cosines, and forget
        them; float64."""
        found_3, self._found_3 = self._found_3, None
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=dtype, device=device) if found_3 is None else found_3.to(device)


class Conflict:
    """One call of a layer: finds the conflicts among its pairs in the backward pass.

    The gradients of the experts' outputs are all there is to see for ``proxy=output``. The others
    look at every linear layer of the experts, which are then called one by one: ``enter`` is before
    them, and so the last to get its gradient.
    """

    def __init__(self, of: ConflictLoss, logits_TC: Tensor) -> None:
        self.by_modules = of.proxy != "output"
        self.loss: Tensor | None = None
        """A scalar 0, whose gradient is that of the loss; fp32. None where no expert ran."""
        self._logits_TC = logits_TC
        # NOTE: not this object, which has the loss and so the graph: PyTorch frees no such cycle.
        self._seen = _Seen(of)

    def enter(self, x_TD: Tensor, p: Pairs, mask_TE: Tensor) -> Tensor:
        """Return ``x_TD``, the tokens that experts get, as they are."""
        if not self.by_modules:
            return x_TD
        x_TD = _Entered.apply(x_TD, self._logits_TC, p, mask_TE, self._seen)
        return x_TD

    @contextmanager
    def listening(self, experts: Sequence[nn.Module]) -> Iterator[None]:
        """Note what the linear layers of ``experts`` read, and their gradients."""
        hooks = []
        if self.by_modules:
            for expert in experts:
                noted: list[_Linear] = []
                self._seen.experts.append(noted)
                note = partial(_note, noted, self._seen.of.proxy)
                hooks += [each.register_forward_hook(note) for each in linears(expert)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def leave(self, out_RD: Tensor, p: Pairs, mask_TE: Tensor) -> Tensor:
        """Return ``out_RD``, the outputs of the pairs, as they are."""
        out_RD, self.loss = _Left.apply(out_RD, self._logits_TC, p, mask_TE, self._seen)
        return out_RD


class _Linear:
    """One linear layer of one expert: its input, and the gradient of its output."""

    def __init__(self, x_NI: Tensor | None, bias: bool) -> None:
        self.x_NI = x_NI
        self.bias = bias
        self.grad_NO: Tensor | None = None

    def take(self, grad_NO: Tensor) -> None:
        self.grad_NO = grad_NO


class _Seen:
    """What one call leaves for its backward pass."""

    def __init__(self, of: ConflictLoss) -> None:
        self.of = of
        self.experts: list[list[_Linear]] = []
        """Of the experts with rows, in their order."""
        self.factor: Tensor | None = None

    def found(self, cosine_P: Tensor, has_one_P: Tensor) -> Tensor:
        """Count the pairs; return which ones conflict."""
        flags_P = has_one_P & (cosine_P < self.of.threshold)
        cosine = torch.where(has_one_P, cosine_P, 0).sum()
        dtype = torch.float32 if cosine.device.type == "mps" else torch.float64
        self.of.add(torch.stack([has_one_P.sum(), flags_P.sum(), cosine]).to(dtype))
        return flags_P


def _note(noted: list[_Linear], proxy: str, module: nn.Module, args: Any, out: Tensor) -> None:
    x_NI = args[0].detach() if proxy == "full" else None
    noted.append(_Linear(x_NI, getattr(module, "bias", None) is not None))
    out.register_hook(noted[-1].take)


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_RD: Tensor, logits_TC: Tensor, p: Pairs, mask_TE: Tensor, seen: _Seen
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        real_P = mask_TE[p.token_P, p.expert_P]  # pairs computed for a gradient alone are none
        ctx.save_for_backward(logits_TC, p.end_E, p.token_P, p.expert_P, p.row_P, real_P)
        ctx.seen = seen
        return out_RD.view_as(out_RD), logits_TC.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_RD, factor = grads
        seen: _Seen = ctx.seen
        logits_TC, end_E, token_P, expert_P, row_P, real_P = ctx.saved_tensors
        if grad_RD is None or factor is None:  # the loss is not asked for
            return grad_RD, None, None, None, None
        if seen.of.proxy != "output":
            seen.factor = factor
            return grad_RD, None, None, None, None
        start_E = F.pad(end_E[:-1], (1, 0))
        cosine_P, has_one_P = cosines(grad_RD, start_E, expert_P, row_P)
        flags_P = seen.found(cosine_P, has_one_P & real_P)
        grad_TC = factor * gradient(logits_TC, token_P, expert_P, flags_P)
        return grad_RD, grad_TC, None, None, None


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, logits_TC: Tensor, p: Pairs, mask_TE: Tensor, seen: _Seen
    ) -> Tensor:
        real_P = mask_TE[p.token_P, p.expert_P]
        ctx.save_for_backward(logits_TC, p.token_P, p.expert_P, p.row_P, real_P)
        ctx.seen = seen
        return x_TD.view_as(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen: _Seen = ctx.seen
        if seen.factor is None:
            return grads[0], None, None, None, None
        logits_TC, token_P, expert_P, row_P, real_P = ctx.saved_tensors
        cosine_P = torch.cat([parameter_cosines(each) for each in seen.experts])[row_P]
        for each in itertools.chain.from_iterable(seen.experts):
            each.grad_NO = None  # [N, O] of every layer below would be kept to the end
        flags_P = seen.found(cosine_P, cosine_P.isfinite() & real_P)
        grad_TC = seen.factor * gradient(logits_TC, token_P, expert_P, flags_P)
        seen.factor = None
        return grads[0], grad_TC, None, None, None


def parameter_cosines(noted: Sequence[_Linear]) -> Tensor:
    """The cosine of each row's gradient with the mean of all, [N], fp32; NaN where one is 0.

    Of all parameters of the linear layers, or of their biases where the inputs are not known. The
    gradient of a matrix by a row is ``grad x^T``, and no such product is made: that of two rows is
    the product of their gradients times that of their inputs.
    """
    dot_N = square_N = square = torch.zeros(())
    for each in noted:
        if each.grad_NO is None:
            continue
        grad_NO = each.grad_NO.float()
        own_N = grad_NO.square().sum(1)
        if each.x_NI is None or each.bias:
            sum_O = grad_NO.sum(0)
            dot_N, square_N = dot_N + grad_NO @ sum_O, square_N + own_N
            square = square + sum_O.square().sum()
        if each.x_NI is not None:
            x_NI = each.x_NI.float()
            sum_OI = grad_NO.t() @ x_NI
            dot_N = dot_N + ((grad_NO @ sum_OI) * x_NI).sum(1)
            square_N = square_N + own_N * x_NI.square().sum(1)
            square = square + sum_OI.square().sum()
    return dot_N / (square_N.sqrt() * square.sqrt())


def cosines(
    grad_RD: Tensor, start_E: Tensor, expert_P: Tensor, row_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cosine of every pair's gradient with the mean of its expert's, fp32, [P], and
    which pairs have one: those whose gradients are neither 0 nor infinite."""
    grad_RD = grad_RD.float()
    rows_R = torch.arange(len(grad_RD), device=grad_RD.device)
    sum_ED = sum_by_token(grad_RD, rows_R, start_E)  # of the direction of the mean
    dot_P = (grad_RD @ sum_ED.t())[row_P, expert_P]
    norm_P = torch.linalg.vector_norm(grad_RD, dim=1)[row_P]
    norm_P = norm_P * torch.linalg.vector_norm(sum_ED, dim=1)[expert_P]
    cosine_P = dot_P / norm_P
    return cosine_P, (norm_P > 0) & cosine_P.isfinite()


def gradient(logits_TC: Tensor, token_P: Tensor, expert_P: Tensor, flags_P: Tensor) -> Tensor:
    """The gradient of the loss by the logits, [T, C]; 0 without a conflicting pair."""
    flags_TC = torch.zeros_like(logits_TC)
    flags_TC[token_P, expert_P] = flags_P.to(flags_TC.dtype)
    share_TC = (-logits_TC).softmax(1)
    number = flags_TC.sum().clamp(min=1)
    return (flags_TC - flags_TC.sum(1, keepdim=True) * share_TC) / number

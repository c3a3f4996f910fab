"""Products of many FFNs on one list of rows sorted by expert, at the cost of one dense FFN.

Kept for the backward pass are the tokens [T, D], the pre-activations [R, H] and, unless
``recompute``, the hidden activations [R, H]: as a dense FFN keeps. Nothing is computed, kept or
differentiated for an expert without rows.

Shape suffixes: T tokens, E living experts, R rows sorted by expert, N rows of one expert or chunk,
D model width, H hidden width, I and O inputs and outputs of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dynmoe.layers.dispatch import Pairs, sum_by_token
from dynmoe.layers.ffn import FFN, Activation

CHUNK = 8 * 2**20
"""Bytes of hidden activations that products of several experts are computed for together: few
operations where loads are small, and not more than the last cache of a CPU holds."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype if it is on, else that of ``x``; fp64 stays, as in PyTorch."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def row_multiple(x: Tensor) -> int:
    """Return the number that the rows of each expert are best rounded up to a multiple of.

    On a CPU, oneDNN compiles a kernel for every new shape, 1 to 3 ms each, and keeps the last 1024.
    Loads are new in every step, and a small product takes ten times as long the first time
    (docs/performance.md). Multiples of 8 make few shapes, and at most 7 rows of an expert are
    computed in vain. fp32 products at precision "highest" and fp64 go to a BLAS that compiles
    nothing.
    """
    if x.device.type != "cpu":
        return 1
    dtype, precision = compute_dtype(x), torch.get_float32_matmul_precision()
    blas = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    return 1 if blas else 8


def uses_grouped_mm(x: Tensor, hidden: int) -> bool:
    """Tell whether ``grouped_mm`` does the products, rather than one product per expert.

    PyTorch has one kernel for bf16 on SM 9 and 10, and a loop of products elsewhere.
    """
    return (
        x.device.type == "cuda"
        and compute_dtype(x) == torch.bfloat16
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and x.shape[1] % 8 == hidden % 8 == 0  # rows must start at multiples of 16 bytes
    )


class _Chunk(NamedTuple):
    """Rows of consecutive experts that are gathered and activated together."""

    rows: slice
    runs: list[tuple[int, slice]]
    """Its experts, and each one's slice of these rows."""


def _chunks(counts: Sequence[int], longest: int) -> list[_Chunk]:
    """Pack the experts with rows into chunks of at most ``longest`` rows, or of one expert."""
    groups: list[list[tuple[int, int, int]]] = []
    for e, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if count:
            if not groups or end - groups[-1][0][1] > longest:
                groups.append([])
            groups[-1].append((e, end - count, end))
    return [
        _Chunk(slice(start, group[-1][2]), [(e, slice(a - start, b - start)) for e, a, b in group])
        for group in groups
        for start in [group[0][1]]
    ]


class _Setting(NamedTuple):
    """How the products are done, the same for all experts of a call."""

    counts: list[int]
    chunks: list[_Chunk]
    hidden: int
    activation: Activation
    dropout: float
    keep_pre: bool
    keep_act: bool

    def activate(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activation and dropout; the dropout's mask."""
        act = self.activation.forward(pre)
        return torch.native_dropout(act, self.dropout, True) if self.dropout else (act, None)

    def activate_again(self, pre: Tensor, mask: Tensor | None) -> Tensor:
        act = self.activation.forward(pre)
        return act if mask is None else act.mul_(mask).div_(1 - self.dropout)

    def backward(self, grad: Tensor, pre: Tensor, mask: Tensor | None) -> Tensor:
        """Through dropout and activation, in place."""
        if mask is not None:
            grad.mul_(mask).div_(1 - self.dropout)
        return self.activation.backward(grad, pre, grad_input=grad)


def grouped_ffn(x_TD: Tensor, p: Pairs, ffns: Sequence[FFN], recompute: bool) -> Tensor:
    """Return the output of every row's expert on its token, [R, D], in ``compute_dtype``.

    ``ffns`` are the experts of ``p.counts``, equal but for their weights.
    """
    dtype = compute_dtype(x_TD)
    first = ffns[0]
    # NOTE: products write into slices of one tensor, whose shape must be right: PyTorch would
    # resize another slice, with a warning, and leave memory as it was in the output.
    hidden, dim = len(first.w1_HD), x_TD.shape[1]
    if (*first.w1_HD.shape, *first.w2_DH.shape) != (hidden, dim, dim, hidden):
        raise ValueError(
            f"expected FFNs from {dim} to {dim} columns, found matrices {list(first.w1_HD.shape)} "
            f"and {list(first.w2_DH.shape)}"
        )
    grouped = uses_grouped_mm(x_TD, hidden)
    keep = torch.is_grad_enabled()
    hidden_bytes = hidden * dtype.itemsize
    setting = _Setting(
        p.counts,
        _chunks(p.counts, sum(p.counts) if grouped else CHUNK // hidden_bytes),
        hidden,
        first.activation,
        first.hidden_dropout,
        keep,
        keep and not recompute,
    )
    # NOTE: everything is cast here, once and inside the graph, which casts gradients back to the
    # weights' fp32; autocast does not reach products that write into ``out``.
    with torch.autocast(x_TD.device.type, enabled=False):
        # Without rows no gradient: the weights stay out of the autograd graph, where DDP would
        # find them and give them a gradient of zeros.
        weights = [
            None if w is None or not (count or grouped) else (w if count else w.detach()).to(dtype)
            for ffn, count in zip(ffns, p.counts, strict=True)
            for w in ffn[:4]
        ]
        function = _GroupedMM if grouped else _PerExpert
        where = (p.end_E, p.token_R, p.row_P, p.start_T)
        out_RD = function.apply(setting, x_TD.to(dtype), *where, *weights)
        return F.dropout(out_RD, first.output_dropout)  # a rate of 0 in evaluation: read_ffn


class _PerExpert(torch.autograd.Function):
    """One product after the other, each on its expert's slice of the rows."""

    @staticmethod
    def forward(ctx: Any, s: _Setting, x_TD: Tensor, *rest: Any) -> Tensor:
        _, token_R, row_P, start_T, *weights = rest
        out_RD = x_TD.new_empty(len(token_R), x_TD.shape[1])
        kept: list[Tensor | None] = []
        for rows, runs in s.chunks:
            x_ND, out_ND = x_TD.index_select(0, token_R[rows]), out_RD[rows]
            pre_NH = x_TD.new_empty(len(x_ND), s.hidden)
            for e, run in runs:
                _linear(x_ND[run], weights[4 * e], weights[4 * e + 1], out=pre_NH[run])
            act_NH, mask_NH = s.activate(pre_NH)
            for e, run in runs:
                _linear(act_NH[run], weights[4 * e + 2], weights[4 * e + 3], out=out_ND[run])
            if s.keep_pre:
                kept += [pre_NH, act_NH if s.keep_act else None, mask_NH]
        ctx.setting = s
        ctx.save_for_backward(x_TD, token_R, row_P, start_T, *weights, *kept)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s: _Setting = ctx.setting
        x_TD, token_R, row_P, start_T, *rest = ctx.saved_tensors
        weights, kept = rest[: 4 * len(s.counts)], iter(rest[4 * len(s.counts) :])
        needs_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[6:]
        w_grads: list[Tensor | None] = [None] * len(weights)
        grad_RD = grads[0].contiguous()
        rows_grad_RD = torch.empty_like(grad_RD)
        for rows, runs in s.chunks:
            pre_NH, act_NH, mask_NH = next(kept), next(kept), next(kept)
            if act_NH is None:
                act_NH = s.activate_again(pre_NH, mask_NH)
            # Rows without a pair have gradient 0 (``_Combine.backward``) and add nothing.
            grad_ND, grad_NH = grad_RD[rows], torch.empty_like(pre_NH)
            for e, run in runs:
                if needs[4 * e + 2]:
                    w_grads[4 * e + 2] = grad_ND[run].t() @ act_NH[run]
                if needs[4 * e + 3]:
                    w_grads[4 * e + 3] = grad_ND[run].sum(0)
                torch.mm(grad_ND[run], weights[4 * e + 2], out=grad_NH[run])
            s.backward(grad_NH, pre_NH, mask_NH)
            # The tokens are gathered again rather than kept: [R, D] would be k times [T, D].
            x_ND, rows_grad_ND = x_TD.index_select(0, token_R[rows]), rows_grad_RD[rows]
            for e, run in runs:
                if needs[4 * e]:
                    w_grads[4 * e] = grad_NH[run].t() @ x_ND[run]
                if needs[4 * e + 1]:
                    w_grads[4 * e + 1] = grad_NH[run].sum(0)
                if needs_x:
                    torch.mm(grad_NH[run], weights[4 * e], out=rows_grad_ND[run])
        x_grad_TD = sum_by_token(rows_grad_RD, row_P, start_T) if needs_x else None
        return None, x_grad_TD, None, None, None, None, *w_grads


def _linear(x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None, out: Tensor) -> None:
    torch.mm(x_NI, w_OI.t(), out=out)
    if b_O is not None:
        out += b_O  # addmm would copy it to all rows first


class _GroupedMM(torch.autograd.Function):
    """All experts' products in one ``grouped_mm``, on stacked weights."""

    @staticmethod
    def forward(ctx: Any, s: _Setting, x_TD: Tensor, *rest: Any) -> Tensor:
        end_E, token_R, row_P, start_T, *weights = rest
        end_E = end_E.int()  # grouped_mm takes int32 alone
        w1_EHD, w2_EDH = torch.stack(weights[0::4]), torch.stack(weights[2::4])
        pre_RH = F.grouped_mm(x_TD.index_select(0, token_R), w1_EHD.transpose(1, 2), offs=end_E)
        _add_biases(s, pre_RH, weights[1::4])
        act_RH, mask_RH = s.activate(pre_RH)
        out_RD = F.grouped_mm(act_RH, w2_EDH.transpose(1, 2), offs=end_E)
        _add_biases(s, out_RD, weights[3::4])
        ctx.setting = s
        kept = (pre_RH, act_RH if s.keep_act else None, mask_RH)
        ctx.save_for_backward(x_TD, end_E, token_R, row_P, start_T, *kept, *weights)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s: _Setting = ctx.setting
        x_TD, end_E, token_R, row_P, start_T, pre_RH, act_RH, mask_RH, *weights = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[1], ctx.needs_input_grad[6:]
        w_grads: list[Tensor | None] = [None] * len(needs_w)
        grad_RD = grads[0].contiguous()
        if any(needs_w[2::4]):
            if act_RH is None:
                act_RH = s.activate_again(pre_RH, mask_RH)
            w_grads[2::4] = F.grouped_mm(grad_RD.t(), act_RH, offs=end_E)  # one matrix per expert
        # NOTE: weights are stacked again rather than kept: the stacks are a copy of all experts.
        grad_RH = F.grouped_mm(grad_RD, torch.stack(weights[2::4]), offs=end_E)
        s.backward(grad_RH, pre_RH, mask_RH)
        if any(needs_w[0::4]):
            rows_RD = x_TD.index_select(0, token_R)
            w_grads[0::4] = F.grouped_mm(grad_RH.t(), rows_RD, offs=end_E)
        for e, run in s.chunks[0].runs:
            w_grads[4 * e + 1] = grad_RH[run].sum(0) if needs_w[4 * e + 1] else None
            w_grads[4 * e + 3] = grad_RD[run].sum(0) if needs_w[4 * e + 3] else None
        x_grad_TD = None
        if needs_x:
            rows_grad_RD = F.grouped_mm(grad_RH, torch.stack(weights[0::4]), offs=end_E)
            x_grad_TD = sum_by_token(rows_grad_RD, row_P, start_T)
        # NOTE: no gradient, rather than one of zeros, for experts without rows: their weights were
        # detached. Zeros would let the optimizer decay and move them.
        w_grads = [g if need else None for g, need in zip(w_grads, needs_w, strict=True)]
        return None, x_grad_TD, None, None, None, None, *w_grads


def _add_biases(s: _Setting, rows: Tensor, biases: Sequence[Tensor | None]) -> None:
    for e, run in s.chunks[0].runs:
        bias = biases[e]
        if bias is not None:
            rows[run] += bias

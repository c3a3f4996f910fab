"""Products of many FFNs on one list of rows sorted by expert, at the cost of one dense FFN.

Kept for the backward pass are the tokens [T, D], the inner products [R, I] and, unless
``recompute``, the hidden activations [R, H], of gated FFNs with their gates: as a dense FFN keeps.
Nothing is computed, kept or differentiated for an expert without rows.

Shape suffixes: T tokens, E living experts, R rows sorted by expert, N rows of one expert or chunk,
D model width, H hidden width, I all inner products (H, or 2H if gated), O outputs of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dynmoe.layers.dispatch import Pairs, sum_by_token
from dynmoe.layers.ffn import ACTIVATIONS, FFNs, activated, halves

CHUNK = 8 * 2**20
"""Bytes of hidden activations that products of several experts are computed for together: few
operations where loads are small, and not more than the last cache of a CPU holds."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype if it is on, else that of ``x``; fp64 stays, as in PyTorch."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def compiles_shapes(x: Tensor) -> bool:
    """Tell whether products of new shapes take long, so that few sizes are worth rows in vain.

    On a CPU, oneDNN compiles a kernel for every new shape, 1 to 5 ms each, and keeps the last 1024.
    Loads are new in every step, and a product takes three to ten times as long the first time
    (docs/performance.md). fp32 products at precision "highest" and fp64 go to a BLAS that compiles
    nothing.
    """
    if x.device.type != "cpu":
        return False
    dtype, precision = compute_dtype(x), torch.get_float32_matmul_precision()
    return not (dtype == torch.float64 or (dtype == torch.float32 and precision == "highest"))


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


STACKED_ROWS = 64
"""Up to so many rows of the busiest expert, products of stacked weights are faster than one by one
(docs/performance.md): they read weights once, on all threads, whatever the rows are."""


class _Chunk(NamedTuple):
    """Rows of consecutive experts that are gathered and activated together."""

    rows: slice
    experts: list[int]
    sizes: list[int]
    """Rows of each of them."""


def _chunks(counts: Sequence[int], longest: int) -> list[_Chunk]:
    """Pack the experts with rows into chunks of at most ``longest`` rows, or of one expert."""
    chunks: list[_Chunk] = []
    for e, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if not count:
            continue
        if chunks and end - chunks[-1].rows.start <= longest:
            start, experts, sizes = chunks.pop()
            chunks.append(_Chunk(slice(start.start, end), [*experts, e], [*sizes, count]))
        else:
            chunks.append(_Chunk(slice(end - count, end), [e], [count]))
    return chunks


class _Setting(NamedTuple):
    """How the products are done, the same for all experts of a call."""

    counts: list[int]
    chunks: list[_Chunk]
    ffns: FFNs
    columns: list[slice]
    """The columns of the inner products that each inner matrix makes."""
    keep: bool
    keep_hidden: bool

    def by_expert(self, tensors: Sequence[Any]) -> list[Sequence[Any]]:
        """Split weights and biases, or what belongs to them: those of one FFN after the other."""
        size = 2 * len(self.columns) + 2
        return [tensors[i : i + size] for i in range(0, size * len(self.counts), size)]

    def activate(self, pre_NI: Tensor) -> _Hidden:
        """Activation, gate and dropout."""
        layout, rate = self.ffns.layout, self.ffns.hidden_dropout
        gate_NH = None
        if layout.gate is not None and self.keep_hidden:
            gate_NH, up_NH = halves(pre_NI, layout.gate)
            gate_NH = ACTIVATIONS[layout.activation].forward(gate_NH)
            hidden_NH = gate_NH * up_NH
        else:
            hidden_NH = activated(pre_NI, layout)
        if not rate:
            return _Hidden(hidden_NH, gate_NH, None)
        dropped_NH, mask_NH = torch.native_dropout(hidden_NH, rate, True)
        return _Hidden(dropped_NH, gate_NH, mask_NH)

    def kept(self, pre_NI: Tensor, hidden: _Hidden) -> list[Tensor | None]:
        """What the backward pass needs of a chunk."""
        if not self.keep:
            return []
        if self.keep_hidden:
            return [pre_NI, *hidden]
        return [pre_NI, None, None, hidden.mask_NH]

    def hidden_again(self, pre_NI: Tensor, kept: _Hidden) -> Tensor:
        if kept.out_NH is not None:
            return kept.out_NH
        return self._undropped(activated(pre_NI, self.ffns.layout), kept.mask_NH)

    def _undropped(self, x_NH: Tensor, mask_NH: Tensor | None) -> Tensor:
        if mask_NH is None:
            return x_NH
        rate = self.ffns.hidden_dropout
        return x_NH.mul_(mask_NH).div_(1 - rate if rate < 1 else 1)  # at 1 the mask is False

    def backward(self, grad_NH: Tensor, pre_NI: Tensor, kept: _Hidden) -> Tensor:
        """Return the gradient of the inner products; writes into ``grad_NH``."""
        layout = self.ffns.layout
        activation = ACTIVATIONS[layout.activation]
        self._undropped(grad_NH, kept.mask_NH)
        if layout.gate is None:
            return activation.backward(grad_NH, pre_NI, grad_input=grad_NH)
        grad_NI = torch.empty_like(pre_NI)
        grad_gate_NH, grad_up_NH = halves(grad_NI, layout.gate)
        pre_gate_NH, up_NH = halves(pre_NI, layout.gate)
        gate_NH = activation.forward(pre_gate_NH) if kept.gate_NH is None else kept.gate_NH
        torch.mul(grad_NH, gate_NH, out=grad_up_NH)
        activation.backward(grad_NH.mul_(up_NH), pre_gate_NH, grad_input=grad_gate_NH)
        return grad_NI


class _Hidden(NamedTuple):
    """The hidden activations of a chunk, and what they were made of."""

    out_NH: Tensor
    gate_NH: Tensor | None
    """The activated half."""
    mask_NH: Tensor | None
    """The dropout's."""


def grouped_ffn(
    x_TD: Tensor,
    p: Pairs,
    ffns: FFNs,
    recompute: bool,
    kept: dict[Any, Any] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the output of every row's expert on its token, [R, D], in ``compute_dtype``.

    ``ffns`` are the experts of ``p.counts``. ``kept`` holds copies of their weights in that dtype
    from call to call, None where they may change. ``backend``: see ``Experts``.

    Raises:
        ValueError: an FFN that does not map D to D columns, or is not of the size of the others.
    """
    dtype, dim = compute_dtype(x_TD), x_TD.shape[1]
    columns, hidden = _sizes(ffns, len(p.counts), dim)
    inner = columns[-1].stop
    grouped = backend == "grouped_mm" or (backend == "auto" and uses_grouped_mm(x_TD, hidden))
    if grouped:
        _check_grouped_mm(dtype, dim, hidden)
    keep = torch.is_grad_enabled()
    setting = _Setting(
        p.counts,
        _chunks(p.counts, sum(p.counts) if grouped else CHUNK // (inner * dtype.itemsize)),
        ffns._replace(weights=[]),
        columns,
        keep,
        keep and not recompute,
    )
    # Without rows no gradient: the weights stay out of the autograd graph, where DDP would find
    # them and give them a gradient of zeros.
    needed = [
        None if w is None or not (count or grouped) else w if count else w.detach()
        for count, own in zip(p.counts, setting.by_expert(ffns.weights), strict=True)
        for w in own
    ]
    # NOTE: cast here, because autocast does not reach products that write into ``out``; outside the
    # graph, which gives fp32 weights fp32 gradients by itself.
    weights = [w if w is None or w.dtype == dtype else _cast(w, dtype, kept) for w in needed]
    with torch.autocast(x_TD.device.type, enabled=False):
        function = _GroupedMM if grouped else _PerExpert
        where = (p.end_E, p.token_R, p.row_P, p.start_T)
        out_RD = function.apply(setting, weights, x_TD.to(dtype), *where, *needed)
        rate = ffns.output_dropout
        return F.dropout(out_RD, rate) if rate else out_RD  # 0 in evaluation: read_ffns


def stacks_pay(counts: Sequence[int]) -> bool:
    """Whether loads are so small and even that padding them costs less than it saves."""
    most = max(counts)
    return most <= STACKED_ROWS and most * len(counts) <= 2 * sum(counts)


def stacked_ffn(x_TD: Tensor, p: Pairs, ffns: FFNs, kept: dict[Any, Any]) -> tuple[Tensor, Pairs]:
    """Return the outputs of experts on as many rows each, [E * C, D], and the pairs of those rows.

    For evaluation: no gradient. ``kept`` holds the stacked weights from call to call.

    Raises:
        ValueError: see ``grouped_ffn``.
    """
    dtype, experts = compute_dtype(x_TD), len(p.counts)
    _sizes(ffns, experts, x_TD.shape[1])
    key = "stacked", dtype, *(id(w) for w in ffns.weights)
    if key not in kept:
        kept[key] = _stacks(ffns, experts, dtype)
    inner_EDI, b_E1I, outer_EHD, b_E1D = kept[key]
    most = max(p.counts)
    start_E = torch.tensor([0, *accumulate(p.counts)][:-1], device=x_TD.device)
    places_C = torch.arange(most, device=x_TD.device)
    # Rows beyond an expert's own are of whatever token: no pair has them.
    row_EC = (start_E[:, None] + places_C).clamp_(max=len(p.token_R) - 1)
    x_ECD = x_TD.index_select(0, p.token_R[row_EC.view(-1)]).view(experts, most, -1).to(dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        pre_ECI = _bmm(x_ECD, inner_EDI, b_E1I)
        hidden_NH = activated(pre_ECI.flatten(0, 1), ffns.layout)
        out_ECD = _bmm(hidden_NH.view(experts, most, -1), outer_EHD, b_E1D)
    shift_E = torch.arange(experts, device=x_TD.device) * most - start_E
    return out_ECD.flatten(0, 1), p._replace(row_P=p.row_P + shift_E[p.expert_P])


def _bmm(x_ENI: Tensor, w_EIO: Tensor, b_E1O: Tensor | None) -> Tensor:
    return torch.bmm(x_ENI, w_EIO) if b_E1O is None else torch.baddbmm(b_E1O, x_ENI, w_EIO)


def _stacks(ffns: FFNs, experts: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Weights and biases of the inner matrices and of the outer one, for rows as left operands."""
    size = len(ffns.weights) // experts
    own = [ffns.weights[i : i + size] for i in range(0, len(ffns.weights), size)]
    found: list[Tensor | None] = []
    for part in (slice(0, -2), slice(-2, None)):
        layers: list[Any] = [list(zip(e[part][0::2], e[part][1::2], strict=True)) for e in own]
        joined = [torch.cat([w for w, _ in each]).t().to(dtype) for each in layers]
        found.append(torch.stack(joined))
        if all(b is None for each in layers for _, b in each):
            found.append(None)
            continue
        biases = [
            torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in each]).to(dtype)
            for each in layers
        ]
        found.append(torch.stack(biases)[:, None])
    return tuple(found)


def _check_grouped_mm(dtype: torch.dtype, *widths: int) -> None:
    step = 16 // dtype.itemsize  # rows start at multiples of 16 bytes
    if dtype == torch.float64 or any(width % step for width in widths):
        raise ValueError(
            f"moe.backend=grouped_mm: expected fp32, bf16 or fp16 and widths that are multiples of "
            f"{step}, found {dtype} and widths {list(widths)}. Set moe.backend=auto"
        )


def _cast(weight: Tensor, dtype: torch.dtype, kept: dict[Any, Any] | None) -> Tensor:
    # Views (of FSDP's flat parameters) and detached tensors are new objects in every forward.
    if kept is None or type(weight) is not nn.Parameter:
        return weight.detach().to(dtype)
    key = id(weight), dtype
    # Some optimizers compute a step's loss again after they moved weights (LBFGS).
    version = None if weight.is_inference() else weight._version
    if key not in kept or kept[key][1] != version:
        with torch.inference_mode(False):  # for a training step within the block too
            cast = weight.detach().to(dtype)
        kept[key] = weight, version, cast  # the weight, so that its id stays its own
    return kept[key][2]


def _sizes(ffns: FFNs, experts: int, dim: int) -> tuple[list[slice], int]:
    """Return the columns of each inner matrix, and H.

    Raises:
        ValueError: see ``grouped_ffn``.
    """
    # NOTE: products write into slices of one tensor, whose shape must be right: PyTorch would
    # resize another slice, with a warning, and leave memory as it was in the output.
    matrices = ffns.weights[0::2]
    shapes = [tuple(w.shape) for w in matrices if w is not None]
    *inner, outer = shapes[: len(shapes) // experts]
    hidden = sum(outputs for outputs, _ in inner) // (1 if ffns.layout.gate is None else 2)
    fits = outer == (dim, hidden) and all(inputs == dim for _, inputs in inner)
    if not fits or shapes != shapes[: len(inner) + 1] * experts:
        raise ValueError(
            f"expected FFNs from {dim} to {dim} columns, all of one size, found matrices "
            f"{sorted({str(list(shape)) for shape in shapes})}"
        )
    ends = list(accumulate(outputs for outputs, _ in inner))
    return [
        slice(end - outputs, end) for end, (outputs, _) in zip(ends, inner, strict=True)
    ], hidden


class _PerExpert(torch.autograd.Function):
    """One product after the other, each on its expert's slice of the rows."""

    @staticmethod
    def forward(ctx: Any, s: _Setting, weights: list[Any], x_TD: Tensor, *rest: Any) -> Tensor:
        _, token_R, row_P, start_T, *_ = rest
        own = s.by_expert(weights)
        out_RD = x_TD.new_empty(len(token_R), x_TD.shape[1])
        kept: list[Tensor | None] = []
        for rows, experts, sizes in s.chunks:
            x_ND = x_TD.index_select(0, token_R[rows])
            pre_NI = x_TD.new_empty(len(x_ND), s.columns[-1].stop)
            parts = [pre_NI[:, part].split(sizes) for part in s.columns]
            for e, x, *outs in zip(experts, x_ND.split(sizes), *parts, strict=True):
                for i, out in enumerate(outs):
                    _linear(x, own[e][2 * i], own[e][2 * i + 1], out)
            hidden = s.activate(pre_NI)
            runs = hidden.out_NH.split(sizes), out_RD[rows].split(sizes)
            for e, x, out in zip(experts, *runs, strict=True):
                _linear(x, own[e][-2], own[e][-1], out)
            kept += s.kept(pre_NI, hidden)
        ctx.setting = s
        ctx.save_for_backward(x_TD, token_R, row_P, start_T, *weights, *kept)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s: _Setting = ctx.setting
        x_TD, token_R, row_P, start_T, *rest = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[2], ctx.needs_input_grad[7:]
        own, needs, kept = s.by_expert(rest), s.by_expert(needs_w), iter(rest[len(needs_w) :])
        w_grads: list[list[Tensor | None]] = [[None] * len(w) for w in own]
        grad_RD = grads[0].contiguous()
        rows_grad_RD = torch.empty_like(grad_RD)
        for rows, experts, sizes in s.chunks:
            pre_NI, hidden = next(kept), _Hidden(next(kept), next(kept), next(kept))
            hidden_NH = s.hidden_again(pre_NI, hidden)
            # Rows without a pair have gradient 0 (``dispatch._Combine``) and add nothing.
            grad_NH = torch.empty_like(hidden_NH)
            runs = [t.split(sizes) for t in (grad_RD[rows], hidden_NH, grad_NH)]
            for e, grad, x, out in zip(experts, *runs, strict=True):
                w_grads[e][-2:] = _weight_grads(grad, x, *needs[e][-2:])
                torch.mm(grad, own[e][-2], out=out)
            grad_NI = s.backward(grad_NH, pre_NI, hidden)
            # The tokens are gathered again rather than kept: [R, D] would be k times [T, D].
            x_ND = x_TD.index_select(0, token_R[rows])
            parts = [grad_NI[:, part].split(sizes) for part in s.columns]
            runs = [x_ND.split(sizes), rows_grad_RD[rows].split(sizes)]
            for e, x, out, *part_grads in zip(experts, *runs, *parts, strict=True):
                for i, grad in enumerate(part_grads):
                    both = slice(2 * i, 2 * i + 2)
                    w_grads[e][both] = _weight_grads(grad, x, *needs[e][both])
                    if needs_x:  # the first product, and the sum with the second
                        torch.mm(grad, own[e][0], out=out) if i == 0 else out.addmm_(
                            grad, own[e][2 * i]
                        )
        x_grad_TD = sum_by_token(rows_grad_RD, row_P, start_T) if needs_x else None
        return None, None, x_grad_TD, None, None, None, None, *chain.from_iterable(w_grads)


def _linear(x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None, out: Tensor) -> None:
    if b_O is None:
        torch.mm(x_NI, w_OI.t(), out=out)
    else:  # in one operation: bf16 is rounded once
        torch.addmm(b_O, x_NI, w_OI.t(), out=out)


def _weight_grads(
    grad_NO: Tensor, x_NI: Tensor, weight: bool, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a linear layer that are needed."""
    return grad_NO.t() @ x_NI if weight else None, grad_NO.sum(0) if bias else None


class _GroupedMM(torch.autograd.Function):
    """All experts' products in one ``grouped_mm``, on stacked weights; gate and up in one."""

    @staticmethod
    def forward(ctx: Any, s: _Setting, weights: list[Any], x_TD: Tensor, *rest: Any) -> Tensor:
        end_E, token_R, row_P, start_T, *_ = rest
        end_E = end_E.int()  # grouped_mm takes int32 alone
        inner_EID, outer_EDH = _stacked(s, weights)
        x_RD = x_TD.index_select(0, token_R)
        pre_RI = F.grouped_mm(x_RD, inner_EID.transpose(1, 2), offs=end_E)
        own, ((_, experts, sizes),) = s.by_expert(weights), s.chunks
        for i, part in enumerate(s.columns):
            _add_biases(pre_RI[:, part].split(sizes), [own[e][2 * i + 1] for e in experts])
        hidden = s.activate(pre_RI)
        out_RD = F.grouped_mm(hidden.out_NH, outer_EDH.transpose(1, 2), offs=end_E)
        _add_biases(out_RD.split(sizes), [own[e][-1] for e in experts])
        ctx.setting = s
        kept = s.kept(pre_RI, hidden)
        ctx.save_for_backward(x_TD, end_E, token_R, row_P, start_T, *weights, *kept)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s: _Setting = ctx.setting
        x_TD, end_E, token_R, row_P, start_T, *rest = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[2], ctx.needs_input_grad[7:]
        weights, (pre_RI, *hidden) = rest[: len(needs_w)], rest[len(needs_w) :]
        needs, ((_, experts, sizes),) = s.by_expert(needs_w), s.chunks
        w_grads: list[list[Tensor | None]] = [[None] * len(n) for n in needs]
        grad_RD = grads[0].contiguous()
        # NOTE: weights are stacked again rather than kept: the stacks are a copy of all experts.
        inner_EID, outer_EDH = _stacked(s, weights)
        if any(n[-2] for n in needs):
            hidden_RH = s.hidden_again(pre_RI, _Hidden(*hidden))
            for e, grad_DH in enumerate(F.grouped_mm(grad_RD.t(), hidden_RH, offs=end_E)):
                w_grads[e][-2] = grad_DH
        grad_RI = s.backward(F.grouped_mm(grad_RD, outer_EDH, offs=end_E), pre_RI, _Hidden(*hidden))
        if any(any(n[0:-2:2]) for n in needs):
            x_RD = x_TD.index_select(0, token_R)
            for e, grad_ID in enumerate(F.grouped_mm(grad_RI.t(), x_RD, offs=end_E)):
                w_grads[e][0:-2:2] = [grad_ID[part] for part in s.columns]
        for e, inner, outer in zip(
            experts, grad_RI.split(sizes), grad_RD.split(sizes), strict=True
        ):
            w_grads[e][1:-2:2] = [inner[:, part].sum(0) for part in s.columns]
            w_grads[e][-1] = outer.sum(0)
        x_grad_TD = None
        if needs_x:
            rows_grad_RD = F.grouped_mm(grad_RI, inner_EID, offs=end_E)
            x_grad_TD = sum_by_token(rows_grad_RD, row_P, start_T)
        # NOTE: no gradient, rather than one of zeros, for experts without rows: their weights were
        # detached. Zeros would let the optimizer decay and move them.
        flat = zip(chain.from_iterable(w_grads), needs_w, strict=True)
        found = (grad if need else None for grad, need in flat)
        return None, None, x_grad_TD, None, None, None, None, *found


def _add_biases(runs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    for rows, bias in zip(runs, biases, strict=True):
        if bias is not None:
            rows += bias


def _stacked(s: _Setting, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The inner matrices of every expert in one, [E, I, D], and the outer ones, [E, D, H]."""
    own = s.by_expert(weights)
    inner = torch.stack([w for each in own for w in each[0:-2:2]])
    return inner.view(len(own), -1, inner.shape[2]), torch.stack([each[-2] for each in own])

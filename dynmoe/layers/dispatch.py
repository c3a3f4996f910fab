"""Compute the experts of all routed (token, expert) pairs at the cost of one FFN on as many rows.

First the pairs: list them, gather the rows of every expert, and sum weighted rows back to their
tokens. Then the FFNs that the fast path knows. Last their products, grouped over experts.

Dropless and linear in the number of pairs: no capacity, no one-hot tensor, no loop over tokens.
Moving rows is a gather or a segmented sum, in the backward pass too, hence deterministic; on a CPU
this replaces the slow backward of indexing (``index_add_``).

Shape suffixes: T tokens, E living experts, P pairs sorted by token, R rows sorted by expert, N rows
of one expert or chunk, D model width, H hidden width, I and O inputs and outputs of one matrix.
R is P, or a little more where the rows of an expert are rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Pairs(NamedTuple):
    """The routed pairs, sorted by token, and their rows, sorted by expert."""

    counts: list[int]
    """Rows of each expert: the one host synchronisation of the layer."""
    end_E: Tensor
    """Where each expert's rows end."""
    token_R: Tensor
    """Token of each row. A row without a pair repeats its expert's last one; no output has it."""
    token_P: Tensor
    """Token of each pair."""
    expert_P: Tensor
    """Expert of each pair, a column of the mask."""
    row_P: Tensor
    """Row of each pair."""
    start_T: Tensor
    """Where each token's run of pairs starts."""


def pairs(mask_TE: Tensor, multiple: int = 1) -> Pairs:
    """List the pairs of a boolean mask, the rows of each expert rounded up to a ``multiple``.

    The rows of an expert are in the order of tokens.
    """
    pairs_E = mask_TE.sum(0)
    host_counts = pairs_E.tolist()  # NOTE: the device must have finished the routing here.
    # nonzero_static, because nonzero would ask the device for its size, which is known by now.
    token_P, expert_P = mask_TE.nonzero_static(size=sum(host_counts)).t().contiguous()
    end_E = ((pairs_E + multiple - 1) // multiple * multiple).cumsum(0)
    gap_E = end_E - pairs_E.cumsum(0)  # rows without a pair, up to the expert's own last
    by_expert_P = expert_P.argsort(stable=True)  # stable: tokens stay in order within an expert
    rows = torch.arange(len(token_P), device=mask_TE.device)
    if multiple > 1:  # shift every expert's rows by the gaps of those before it
        rows += (gap_E - gap_E.diff(prepend=gap_E.new_zeros(1)))[expert_P[by_expert_P]]
    row_P = torch.empty_like(token_P)
    row_P[by_expert_P] = rows
    counts = [-(-n // multiple) * multiple for n in host_counts]
    token_R = token_P[by_expert_P]
    if multiple > 1 and len(token_P):
        # Rows without a pair repeat a real token, whose activations are finite: 0 times them is 0.
        last_E = token_R[(pairs_E.cumsum(0) - 1).clamp(min=0)]
        token_R = last_E.repeat_interleave(torch.tensor(counts, device=last_E.device))
        token_R[row_P] = token_P
    k_T = mask_TE.sum(1)
    return Pairs(counts, end_E, token_R, token_P, expert_P, row_P, k_T.cumsum(0) - k_T)


def gather(x_TD: Tensor, p: Pairs) -> Tensor:
    """Return the token of every row, [R, D]."""
    return _Gather.apply(x_TD, p.token_R, p.row_P, p.start_T)


def combine(out_RD: Tensor, weights_TE: Tensor, p: Pairs) -> Tensor:
    """``y_t = sum over the pairs (t, e) of token t of weights_te * out_r``, [T, D]."""
    return _Combine.apply(out_RD, weights_TE, *p[2:])


def sum_by_token(
    rows_RD: Tensor, row_P: Tensor, start_T: Tensor, weight_P: Tensor | None = None
) -> Tensor:
    """Sum the rows of every token's pairs, each times its weight, [T, D]; 0 without pairs."""
    return F.embedding_bag(row_P, rows_RD, start_T, mode="sum", per_sample_weights=weight_P)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_P: Tensor, start_T: Tensor) -> Tensor:
        ctx.save_for_backward(row_P, start_T)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # NOTE: autograd's own backward of index_select adds rows in any order on a GPU.
        return sum_by_token(grads[0].contiguous(), *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_RD: Tensor,
        weights_TE: Tensor,
        token_R: Tensor,
        token_P: Tensor,
        expert_P: Tensor,
        row_P: Tensor,
        start_T: Tensor,
    ) -> Tensor:
        # embedding_bag wants the dtype of the rows; the router's weights are fp32.
        weight_P = weights_TE[token_P, expert_P].to(out_RD.dtype)
        ctx.save_for_backward(out_RD, weight_P, token_R, token_P, expert_P, row_P)
        ctx.shape, ctx.dtype = weights_TE.shape, weights_TE.dtype
        return sum_by_token(out_RD, row_P, start_T, weight_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # NOTE: here single pairs get their gradient. ``grad_RD`` times the weights is that by the
        # output of every pair: a loss made of such gradients would begin here.
        out_RD, weight_P, token_R, token_P, expert_P, row_P = ctx.saved_tensors
        grad_RD = grads[0].index_select(0, token_R)
        weights_grad_TE = None
        if ctx.needs_input_grad[1]:
            # NOTE: summed in the router's fp32: D products rounded to bf16 would be its gradient.
            dot_R = (grad_RD * out_RD).sum(1, dtype=ctx.dtype)
            weights_grad_TE = dot_R.new_zeros(ctx.shape)
            weights_grad_TE[token_P, expert_P] = dot_R[row_P]
        weight_R = weight_P.new_zeros(len(token_R))  # 0 where a row has no pair: no gradient
        weight_R[row_P] = weight_P
        return grad_RD.mul_(weight_R[:, None]), weights_grad_TE, None, None, None, None, None


# FFNs whose products can be grouped over experts: linear, activation, linear.

aten = torch.ops.aten

# Classes whose forward applies their children in order. By name: the layers need torch alone.
CHAINS = (("torch.nn.modules.container", "Sequential"), ("timm.layers.mlp", "Mlp"))
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


# Products of many FFNs on one list of rows sorted by expert.
#
# Kept for the backward pass are the tokens [T, D], the pre-activations [R, H] and, unless
# ``recompute``, the hidden activations [R, H]: as a dense FFN keeps. Nothing is computed, kept or
# differentiated for an expert without rows.

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

"""Top-k over FFNs and experts that cost nothing: zero, copy, constant (MoE++).

Shape suffixes: T tokens, E experts with an FFN, J constant experts, C all columns (FFNs, then
constant, copy and zero experts), H width of the gate, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.routers import Routing, SoftmaxRouter, hide_padding


class ZeroCostRouter(SoftmaxRouter):
    """The ``top_k`` largest of one softmax over FFNs, constant, copy and zero experts.

    MoE++ (arXiv 2410.07348). A zero expert outputs 0 and takes no weight: the others of a token
    share 1, by their probabilities. A copy expert returns the token x, constant expert j
    ``a1 x + a2 v_j`` with a = softmax(A_j x) and a learned vector v_j.

    - ``two_layer_gate``: logits by two matrices with tanh between, of width 8 C (its code); else by
      one (its paper).
    - ``gate_residual``: the logits of the layer before, times a learned C x C matrix, are added.
      The layer before is that of ``after``; the first has none. ``add_moe_layers`` gives it.
    - ``free_balance``: factor of experts without an FFN in the balance loss; below 1 it lets them
      take more tokens (the paper's tau).
    - ``input_scale``: the experts get the tokens times this, and copy and constant experts with
      them; the code's default is ``top_k``.
    - ``z_weight``, ``sequence_weight``: see ``SoftmaxRouter``, over all columns.

    Raises:
        ValueError: ``top_k`` beyond the columns, a number of experts below 0, or an ``after`` that
            has other columns, or already gives its logits to another layer.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int,
        num_constant: int = 2,
        num_copy: int = 1,
        num_zero: int = 1,
        top_k: int = 2,
        two_layer_gate: bool = True,
        gate_residual: bool = True,
        free_balance: float = 0.75,
        input_scale: float = 1.0,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
        after: ZeroCostRouter | None = None,
    ) -> None:
        super().__init__(z_weight, sequence_weight)
        for key, value in (("constant", num_constant), ("copy", num_copy), ("zero", num_zero)):
            if value < 0:
                raise ValueError(f"num_{key} is {value}: expected 0 or more experts")
        columns = num_slots + num_constant + num_copy + num_zero
        if not 1 <= top_k <= columns:
            raise ValueError(f"top_k is {top_k}: expected 1 to the number of experts, {columns}")
        self.num_slots = num_slots
        self.num_constant = num_constant
        self.num_copy = num_copy
        self.num_zero = num_zero
        self.columns = columns
        self.top_k = top_k
        self.free_balance = free_balance
        self.input_scale = input_scale
        hidden = 8 * columns
        self.gate_in = _weight(hidden, dim) if two_layer_gate else None
        self.gate_out = _weight(columns, hidden if two_layer_gate else dim)
        self.mix = _weight(2 * num_constant, dim)
        self.constants = _weight(num_constant, dim)
        self.hands_on = gate_residual
        self.residual: nn.Parameter | None = None
        self._before: Handover | None = None
        self._next: Handover | None = None
        if gate_residual and after is not None:
            if after.columns != columns:
                raise ValueError(
                    f"gate_residual: the layer before has {after.columns} experts, this one "
                    f"{columns}. Give all layers the same, or set gate_residual=false"
                )
            if after._next is not None:
                raise ValueError("after: this router already gives its logits to another layer")
            self.residual = _weight(columns, columns)
            self._before = after._next = Handover()

    def forward(
        self,
        x_TD: Tensor,
        live: Sequence[int],
        token_mask_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> Routing:
        self.check_pool(live)
        ffns, free = self.num_slots, self.columns - self.num_zero
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            logits_TC = self._after(self.logits(x_TD, live))
            probs_TC = logits_TC.softmax(1)
            picks = probs_TC.topk(self.top_k, dim=1).indices
            picks_TC = torch.zeros_like(probs_TC, dtype=torch.bool).scatter_(1, picks, True)
            picks_TC = hide_padding(picks_TC, token_mask_T)
            weights_TC = (probs_TC * picks_TC)[:, :free]
            sum_T1 = weights_TC.sum(1, keepdim=True)
            # 1 in the place of 0: a token of zero experts has weights, and gradients, of exactly 0.
            weights_TC = weights_TC / torch.where(sum_T1 > 0, sum_T1, 1.0)
            rows_TD = x_TD if self.input_scale == 1 else x_TD * self.input_scale
            extra_TD = self._extra(rows_TD, weights_TC[:, ffns:])
            aux = probs_TC.new_zeros(())
            if self.recorded:
                aux = self._balance(probs_TC, picks_TC, token_mask_T)
            aux = self._with_losses(aux, logits_TC, probs_TC, picks_TC, token_mask_T, shape)
        mask_TE = picks_TC[:, :ffns]
        return Routing(
            weights_TC[:, :ffns],
            mask_TE,
            probs_TC[:, :ffns],
            hide_padding(~mask_TE.any(1), token_mask_T),
            aux,
            mask_TE,
            extra_TD,
            free_T=picks_TC[:, ffns:].sum(1),
        )

    @property
    def has_logits(self) -> bool:
        return not self.hands_on  # those of the layer before are taken once

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        x_TD = x_TD.float()
        gated = x_TD if self.gate_in is None else F.linear(x_TD, self.gate_in.float()).tanh()
        return F.linear(gated, self.gate_out.float())

    def _after(self, logits_TC: Tensor) -> Tensor:
        """The logits with those of the layer before, for which they are the next."""
        if self.residual is not None and self._before is not None:
            before_TC = self._before.take(len(logits_TC))
            logits_TC = logits_TC + F.linear(before_TC, self.residual.float())
        if self._next is not None:
            self._next.put(logits_TC)
        return logits_TC

    def _extra(self, x_TD: Tensor, weights_TC: Tensor) -> Tensor:
        """What constant and copy experts add."""
        constant_TJ = weights_TC[:, : self.num_constant]
        passed_T1 = weights_TC[:, self.num_constant :].sum(1, keepdim=True)
        # The token's constants share one product, whose cost no choice changes.
        shares_TJ2 = (
            F.linear(x_TD, self.mix.float()).unflatten(1, (self.num_constant, 2)).softmax(2)
        )
        passed_T1 = passed_T1 + (constant_TJ * shares_TJ2[..., 0]).sum(1, keepdim=True)
        mixed_TD = (constant_TJ * shares_TJ2[..., 1]) @ self.constants.float()
        return torch.addcmul(mixed_TD, x_TD, passed_T1)

    def _balance(self, probs_TC: Tensor, picks_TC: Tensor, token_mask_T: Tensor | None) -> Tensor:
        factors = [1.0] * self.num_slots + [self.free_balance] * (self.columns - self.num_slots)
        load_TC = picks_TC * torch.tensor(factors, device=picks_TC.device, dtype=probs_TC.dtype)
        return losses.load_balance(probs_TC, load_TC, self.columns, token_mask_T)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": None}

    def flops(self, dim: int) -> tuple[int, int]:
        rows = self.gate_out.shape[1] if self.gate_in is not None else 0
        gate = dim * rows + self.gate_out.numel()
        residual = 0 if self.residual is None else self.residual.numel()
        return 0, 2 * (gate + residual + self.mix.numel() + self.constants.numel())

    def extra_repr(self) -> str:
        return (
            f"k={self.top_k} of {self.num_slots} FFNs, {self.num_constant} constant, "
            f"{self.num_copy} copy and {self.num_zero} zero experts, "
            f"gate_residual={self.residual is not None}"
        )


class Handover:
    """The logits of one layer on their way to the next, within a forward.

    Whoever takes them leaves nothing behind, so that no layer gets those of another forward.
    Activation checkpointing runs the taker again within backward, when the giver's logits are gone:
    it gets those of its last forward once more. Two forwards that wait for their backward are told
    apart by nothing, and refused.
    """

    def __init__(self) -> None:
        self._logits: Tensor | None = None
        self._again: Tensor | None = None
        self._waiting = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        # NOTE: a layer is copied without the one before it, for export: both copies meet here.
        return self

    def __reduce__(self) -> Any:
        return Handover, ()

    @torch.compiler.disable
    def put(self, logits_TC: Tensor) -> None:
        if not _in_backward():
            self._logits = logits_TC

    @torch.compiler.disable
    def take(self, tokens: int) -> Tensor:
        if _in_backward():
            return self._once_more()
        logits_TC, self._logits = self._logits, None
        if logits_TC is None or len(logits_TC) != tokens:
            found = "it did not run" if logits_TC is None else f"it had {len(logits_TC)}"
            raise ValueError(
                f"gate_residual: expected the layer before to route the same {tokens} tokens just "
                f"before, but {found}. Call the layers in their order, or set gate_residual=false"
            )
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self._waiting += 1
            # Without its graph, but with the same need of a gradient: a recomputation keeps as
            # many tensors as the forward did.
            self._again = logits_TC.detach().requires_grad_(logits_TC.requires_grad)
            if logits_TC.requires_grad:
                logits_TC = logits_TC.view_as(logits_TC)
                logits_TC.register_hook(self._done)
        return logits_TC

    def _once_more(self) -> Tensor:
        if self._again is None or self._waiting != 1:
            raise ValueError(
                "gate_residual under activation checkpointing: expected one forward before each "
                f"backward, found {self._waiting}. Run others under torch.no_grad(), checkpoint "
                "with use_reentrant=False, or set gate_residual=false"
            )
        return self._again

    def _done(self, _: Tensor) -> None:
        self._again, self._waiting = None, 0


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _weight(rows: int, columns: int) -> nn.Parameter:
    weight = torch.empty(rows, columns)
    return nn.Parameter(nn.init.trunc_normal_(weight, std=0.02) if rows else weight)

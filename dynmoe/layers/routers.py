"""Routers: which experts serve each token, and with which weights.

``Router`` is the base class and says what a router may override. Below it stands top-any gating
(DynMoE), whose experts may come and go. Scores, gates and losses are fp32 under any autocast.

Shape suffixes: T tokens, E living experts, S slots, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dynmoe.layers import losses

if TYPE_CHECKING:
    from dynmoe.layers.conflict import Conflict
    from dynmoe.layers.experts import Experts


FP32 = torch.float32


class Routing(NamedTuple):
    """The decision of a router for T tokens over E living experts.

    Rows of ``mask_TE`` may have any number of experts, 0 included, so a router may as well choose
    tokens for each expert. k counts the FFNs that a token costs. Experts without an FFN have no
    column: those that output 0 need nothing else, the others (identity, constant) put what they add
    into ``extra_TD``. A token that chose nothing but such experts has k = 0 and is in
    ``unserved_T``; ``free_T`` tells it from one that chose nothing.
    """

    weights_TE: Tensor
    """Combine weights, fp32; the output is ``sum_e weights_te * expert_e(x_t)``."""
    mask_TE: Tensor
    """Bool: the experts whose output enters the token's output. k is its row sum."""
    scores_TE: Tensor
    """The router's own scores, fp32: cosines (top-any) or probabilities (top-k)."""
    unserved_T: Tensor
    """Bool: real tokens that no expert serves, before any evaluation fallback."""
    aux: Tensor
    """Auxiliary loss, a scalar; the task multiplies it by ``moe.aux_weight``."""
    dispatch_TE: Tensor
    """Bool: the pairs to compute. Equal to the mask unless a gradient needs more."""
    extra_TD: Tensor | None = None
    """Output of experts without an FFN, which the layer adds to the sum; 0 on padding."""
    free_T: Tensor | None = None
    """Integers: how many experts without an FFN the token chose beside its k; 0 on padding."""
    observed: Tensor | None = None
    """[``Router.observes``]: sums over the real tokens that ``Router.update`` wants, detached."""
    conflict: Conflict | None = None
    """Of the layer, where it has a loss of token gradient conflict; routers leave it alone."""


class StepTotals(NamedTuple):
    """One layer's routing in one optimizer step: sums over micro-batches and ranks.

    Tensors are on the layer's device, in float64 (float32 on Apple's GPUs). A layer that did not
    run in the step has zeros.
    """

    load_S: Tensor
    """Tokens of each slot."""
    k_hist: Tensor
    """Real tokens that chose k experts, k = 0 to S; before any fallback."""
    observed: Tensor
    """Sum of ``Routing.observed``, [``Router.observes``]."""
    calls: Tensor
    """Forward passes that are in the sums: micro-batches times ranks, for a layer that runs once in
    each."""
    step: int
    """Optimizer steps taken, this one included."""
    num_steps: float
    """Optimizer steps of the whole training; infinite where nobody knows."""

    @property
    def tokens(self) -> Tensor:
        """Real tokens, at least 1."""
        return self.k_hist.sum().clamp(min=1)

    @property
    def mean_k(self) -> Tensor:
        """Experts computed for each real token, a fallback in training included."""
        return self.load_S.sum() / self.tokens


class Router(nn.Module):
    """Base class of routers. ``router(dim, num_slots)`` makes one for a pool of ``num_slots``.

    ``forward`` has to be written. The other methods have defaults that fit a router with a fixed
    pool whose parameters are its whole state. A router that is ``adaptive`` lets experts come and
    go, and overrides ``slot_parameters``, ``point`` and ``keep``.

    A router with state that moves from step to step (a bias per expert, a controlled threshold)
    keeps it in persistent fp32 buffers, which stay fp32 under ``model.to(torch.bfloat16)``, and
    overrides ``update``, which moves it once after each optimizer step. ``forward`` reads the state
    and must not change it: activation checkpointing runs it twice, gradient accumulation several
    times a step, and evaluation too.
    """

    adaptive: ClassVar[bool] = False
    """Whether experts may be added and removed during training."""
    input_scale: float = 1.0
    """Factor of the tokens that experts get."""
    expert_copies: int = 1
    """Of how many copies of the FFN the experts are parts, where ``moe.init`` makes parts."""
    hands_on: bool = False
    """Whether the router of the next MoE layer is made with ``after=`` this one."""
    sees_batch: ClassVar[bool] = False
    """Whether experts choose among the tokens of a batch, in evaluation too: refused for causal
    models, whose tokens would be told what follows."""
    graded: bool = True
    """Whether the weights of a token's experts may differ."""
    observes: int = 0
    """Numbers in ``Routing.observed``; 0 without."""
    takes_shape: bool = False
    """Whether ``forward`` has a keyword ``shape``: that of the tokens, [B, N] for B sequences of N
    tokens, whose rows ``x_TD`` has one after another; [T] where the layer is not told of them."""

    kept: dict[Any, Any] | None
    """What was made of the weights, within ``moe.constant_weights``; None elsewhere."""
    recorded: bool
    """Whether anybody reads ``Routing.aux``; the layer knows."""

    def __init__(self) -> None:
        super().__init__()
        # Of the object, not of the class: compiled code would be made anew for the first write.
        self.kept = None
        self.recorded = True

    @property
    def has_state(self) -> bool:
        """Whether ``update`` is to be called. Options may turn a state off: then override it."""
        return type(self).update is not Router.update

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        """Move the state: one optimizer step was taken.

        ``own``: what this layer routed in the step; ``every``: the same of all layers of the model
        whose router is of this class, this one included. State that layers share (one controller
        for the model) is a buffer in each of them, which all compute from ``every`` alone.

        Called under ``no_grad``, on every rank with equal totals, so that all make the same state.
        Not called for a step without a token in any of the layers. What it wrote is taken back
        if the step did not count: a ``GradScaler`` skipped it, or a loss was not finite. Nothing
        here should wait for the device (``item``, ``if`` on a tensor).
        """
        raise NotImplementedError

    def check_pool(self, live: Sequence[int], slots: int | None = None) -> None:
        """Check that every slot holds an expert, for a router whose pool is fixed.

        Raises:
            ValueError: others than ``slots`` of them live (``num_slots``, which such routers have).
        """
        wanted = self.num_slots if slots is None else slots
        if len(live) != wanted:
            raise ValueError(
                f"a {type(self).__name__} has a fixed pool of {wanted} experts, found {list(live)}"
            )

    def prepare(self, experts: Experts, live: Sequence[int]) -> None:
        """Read what routing needs of the experts; called before every ``forward`` of a layer."""

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        """Route every token.

        ``live`` lists the slots that hold an expert, ascending; column j of every result belongs to
        slot ``live[j]``. ``token_mask_T`` (bool) is False on padding, which must choose no expert,
        be in no loss and not be reported as unserved.
        """
        raise NotImplementedError

    @property
    def has_logits(self) -> bool:
        """Whether there are ``logits``, which the loss of token gradient conflict needs."""
        return type(self).logits is not Router.logits

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        """Return the scores, larger is likelier, before noise, softmax and the like; fp32, [T, C].

        Column j belongs to slot ``live[j]``; experts without an FFN have columns behind those.
        """
        raise NotImplementedError

    @property
    def can_weigh(self) -> bool:
        """Whether ``weigh`` may be called; budgets after training need it (``posthoc.py``)."""
        return type(self).weigh is not Router.weigh

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        """Return the weights of the experts in ``mask_TE``, had the router chosen them at these
        ``Routing.scores_TE`` in evaluation, [T, E]."""
        raise NotImplementedError

    def margins(self, scores_TE: Tensor, live: Sequence[int]) -> Tensor | None:
        """Return by how much each pair passes its threshold: the router takes those above 0.

        -inf on pairs that no other threshold would admit. None: a router without thresholds.
        """
        return None

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """Return the parameters that belong to one slot alone."""
        return []

    def point(self, slot: int, direction_D: Tensor) -> None:
        """Let the new expert in ``slot`` serve tokens like ``direction_D``, of any length.

        Called between optimizer steps; on every rank with the same direction.
        """

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots for good; slot ``slots[i]`` becomes slot i. Called for export."""

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        """Return what a line of ``routing.jsonl`` says about the state of this router.

        Reports draw ``thresholds``, one number for each living expert; None is no threshold.
        """
        return {"thresholds": None}

    def flops(self, dim: int) -> tuple[int, int] | None:
        """Return the FLOPs of one token: for each living expert, and for all of them together.

        None if they are not known: then costs of the whole model have no FLOPs.
        """
        return None

    def made_once(
        self, name: str, make: Callable[[Sequence[int]], Tensor], live: Sequence[int]
    ) -> Tensor:
        """Return ``make(live)``, from ``kept`` where weights are constant and get no gradient."""
        if self.kept is None or torch.is_grad_enabled():
            return make(live)
        key = name, tuple(live)
        if key not in self.kept:
            self.kept[key] = make(live)
        kept: Tensor = self.kept[key]
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        # NOTE: sums and controllers would stagnate in bf16, whose steps at 256 are 2: fp32 buffers
        # are moved, not rounded.
        kept = {key: b for key, b in self._buffers.items() if b is not None and b.dtype == FP32}
        super()._apply(fn, recurse)
        for key, before in kept.items():
            after = self._buffers[key]
            if after is not None and after.dtype != FP32:
                self._buffers[key] = before.to(after.device)
        return self


class SoftmaxRouter(Router):
    """Base class of routers over logits: two losses that any of them can add to its own.

    ``z_weight``: of ``losses.z_loss``; ``sequence_weight``: of ``losses.sequence_balance``. Both
    are parts of ``Routing.aux``, which ``moe.aux_weight`` multiplies once more.
    """

    def __init__(self, z_weight: float = 0.0, sequence_weight: float = 0.0) -> None:
        super().__init__()
        self.z_weight = z_weight
        self.sequence_weight = sequence_weight
        self.takes_shape = sequence_weight > 0

    @property
    def adds_losses(self) -> bool:
        # Exported programs are not trained, and know no number of sequences.
        wanted = self.recorded and not torch.compiler.is_exporting()
        return wanted and (self.z_weight > 0 or self.sequence_weight > 0)

    def _with_losses(
        self,
        aux: Tensor,
        logits_TC: Tensor,
        probs_TC: Tensor,
        picks_TC: Tensor,
        token_mask_T: Tensor | None,
        shape: Sequence[int] | None,
    ) -> Tensor:
        """``aux`` with what is asked for. C: all columns of the softmax."""
        if not self.adds_losses:
            return aux
        if self.z_weight:
            aux = aux + self.z_weight * losses.z_loss(logits_TC, token_mask_T)
        if self.sequence_weight:
            length = sequence_length(shape)
            balance = losses.sequence_balance(probs_TC, picks_TC, length, token_mask_T)
            aux = aux + self.sequence_weight * balance
        return aux


def one_target(target_k: float | Sequence[float]) -> float:
    """Return the ``target_k`` of one layer.

    Raises:
        ValueError: it is a list, which ``add_moe_layers`` gives out to the layers.
    """
    if not isinstance(target_k, int | float):
        raise ValueError(
            f"target_k is {target_k}: expected one number. A list, one for each MoE layer, is for "
            "add_moe_layers, which makes them"
        )
    return float(target_k)


def sequence_length(shape: Sequence[int] | None) -> int | None:
    """Return how many tokens in a row are a sequence, by the ``shape`` that a router takes; None
    where it does not tell."""
    return None if shape is None or len(shape) < 2 else math.prod(shape[1:])


def hide_padding(where: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Return ``where`` (bool, [T] or [T, E]) with False on padding."""
    if token_mask_T is None:
        return where
    return where & token_mask_T.view(-1, *(1 for _ in where.shape[1:]))


def cosine(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Cosine similarity of every row of ``x_TD`` with every row of ``w_ED``, in its dtype, [T, E].

    0, with gradient 0, for a row of zeros.
    """
    return _CosineWithUnits.apply(x_TD, F.normalize(w_ED, dim=1))


class _CosineWithUnits(torch.autograd.Function):
    """``x @ w.T / |x|`` for unit rows w, in two passes over [T, D] each way.

    No normalised copy of the tokens is made, nor is one in another dtype kept. Autograd's own
    backward of the norm would take three times as long as the product.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.dtype = x_TD.dtype
        kept_TD, x_TD = x_TD, x_TD.to(w_ED.dtype)
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True)
        # A token of zeros gets score 0, and gradient 0 in backward, rather than NaN.
        inverse_T1 = torch.where(norm_T1 > 1e-12, 1 / norm_T1, 0)
        scores_TE = F.linear(x_TD, w_ED) * inverse_T1
        # NOTE: the tokens as they came: the block keeps them anyway, an fp32 copy would be new.
        ctx.save_for_backward(kept_TD, w_ED, inverse_T1, scores_TE)
        return scores_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, w_ED, inverse_T1, scores_TE = ctx.saved_tensors
        x_TD = x_TD.to(w_ED.dtype)
        grad_TE = grads[0] * inverse_T1
        x_grad_TD = w_grad_ED = None
        if ctx.needs_input_grad[0]:
            radial_T1 = (grad_TE * scores_TE).sum(1, keepdim=True) * inverse_T1
            x_grad_TD = (grad_TE @ w_ED).addcmul_(x_TD, radial_T1, value=-1).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            w_grad_ED = grad_TE.t() @ x_TD
        return x_grad_TD, w_grad_ED


class TopAnyRouter(Router):
    """Top-any gating: every token decides by thresholds how many experts it activates.

    Expert e serves token x iff sigmoid(cos(x, w_e)) > sigmoid(G_e) (DynMoE, arXiv 2405.14297, Eq.
    2-6). The gate is hard with a straight-through gradient, the
    output the plain mean of the chosen experts. In training a token may choose none: it then gets
    exactly 0 and is reported in ``unserved_T``; at evaluation it falls back to its best expert.

    Each slot has its own direction and threshold Parameter, so that a slot without an expert has no
    gradient and no optimizer pass, and a new expert starts with fresh optimizer state.

    Options name the points where the paper and its two code bases differ:

    - ``gate_grad``: task gradient of the gate reaches the ``chosen`` experts only (both code bases
      have a ReLU before the straight-through sign), or ``all`` living ones. The latter needs every
      expert's output for every token in training: dense cost.
    - ``combine``: weight 1/k with ``constant_k`` (a token with k = 1 still teaches its gate), with
      the gradient ``through_k`` (it does not), or as the ``tutel`` code base does: through k if any
      token of the batch has k > 1, else the raw gate; at evaluation its fallback weight is the raw
      sigmoid score in a batch without any k > 1, so a token's output depends on its batch mates.
    - ``aux``: ``diverse_simple`` (Eq. 7) or ``gshard`` (the tutel vision runs' default);
      ``columns``: ``raw`` as in Eq. 7, or ``normalised`` as in both code bases;
      ``simplicity_over``: ``living`` experts or ``all`` slots (both code bases);
      ``smoothing``: see ``losses.diversity``; ``balance_weight`` and ``efficiency_weight``: the two
      terms that the DeepSpeed code base added in January 2025.
    """

    adaptive = True
    graded = False

    def __init__(
        self,
        dim: int,
        num_slots: int,
        gate_grad: Literal["chosen", "all"] = "chosen",
        combine: Literal["constant_k", "through_k", "tutel"] = "constant_k",
        aux: Literal["diverse_simple", "gshard"] = "diverse_simple",
        columns: Literal["raw", "normalised"] = "raw",
        simplicity_over: Literal["living", "all"] = "living",
        smoothing: float = 1e-3,
        balance_weight: float = 0.0,
        efficiency_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_grad = gate_grad
        self.combine = combine
        self.aux = aux
        self.columns = columns
        self.simplicity_over = simplicity_over
        self.smoothing = smoothing
        self.balance_weight = balance_weight
        self.efficiency_weight = efficiency_weight
        # Orthonormal as long as there are no more slots than dimensions; unit vectors always.
        rows_SD = F.normalize(nn.init.orthogonal_(torch.empty(num_slots, dim)), dim=1)
        self.directions = nn.ParameterList(nn.Parameter(row.clone()) for row in rows_SD)
        self.thresholds = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in rows_SD)

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        # NOTE: fp32, because the mask compares two numbers: in bf16, in steps of 2^-8 above 0.5,
        # scores would tie with thresholds and switch experts by rounding.
        with torch.autocast(x_TD.device.type, enabled=False):
            directions_ED = self.made_once("directions", self._directions, live)
            thresholds_E = self.made_once("thresholds", self._thresholds, live)
            scores_TE = cosine(x_TD, directions_ED)
            margin_TE = scores_TE.sigmoid() - thresholds_E.sigmoid()
            mask_TE = hide_padding(margin_TE > 0, token_mask_T)
            unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)

            mask_TE = self._admit(scores_TE, mask_TE, unserved_T)
            gate_TE = self._gate(margin_TE, mask_TE)
            aux = scores_TE.new_zeros(())
            if self.recorded:
                aux = self._aux(gate_TE, mask_TE, directions_ED, token_mask_T)
            weights_TE = self._weights(gate_TE, mask_TE, scores_TE)
            # NOTE: losses and ``unserved_T`` are of the gate before the fallback.
            if not self.training:
                mask_TE, weights_TE = self._fall_back(scores_TE, mask_TE, weights_TE, unserved_T)
            dispatch_TE = mask_TE
            if self.training and self.gate_grad == "all":
                # Real tokens: served or unserved. Padding is neither.
                dispatch_TE = mask_TE.any(1, keepdim=True) | unserved_T[:, None]
                dispatch_TE = dispatch_TE.expand_as(mask_TE)
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, dispatch_TE)

    def _directions(self, live: Sequence[int]) -> Tensor:
        return torch.stack([self.directions[slot] for slot in live]).float()

    def _thresholds(self, live: Sequence[int]) -> Tensor:
        return torch.stack([self.thresholds[slot] for slot in live]).float()

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return self._weights(mask_TE.to(scores_TE.dtype), mask_TE, scores_TE)

    def margins(self, scores_TE: Tensor, live: Sequence[int]) -> Tensor:
        return scores_TE - self._thresholds(live)

    def _admit(self, scores_TE: Tensor, mask_TE: Tensor, unserved_T: Tensor) -> Tensor:
        return mask_TE

    def _gate(self, margin_TE: Tensor, mask_TE: Tensor) -> Tensor:
        """Straight-through: the value of the hard gate, the gradient of the margin."""
        if not torch.is_grad_enabled():
            return mask_TE.to(margin_TE.dtype)
        through_TE = margin_TE if self.gate_grad == "all" else margin_TE * mask_TE
        return mask_TE + (through_TE - through_TE.detach())

    def _weights(self, gate_TE: Tensor, mask_TE: Tensor, scores_TE: Tensor) -> Tensor:
        k_T1 = mask_TE.sum(1, keepdim=True)
        if self.combine == "constant_k":
            return gate_TE / k_T1.clamp(min=1)
        through_TE = gate_TE / torch.where(k_T1 > 0, gate_TE.sum(1, keepdim=True), 1.0)
        if self.combine == "through_k":
            return through_TE
        return torch.where((k_T1 > 1).any(), through_TE, gate_TE)

    def _fall_back(
        self, scores_TE: Tensor, mask_TE: Tensor, weights_TE: Tensor, unserved_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token nobody serves takes its best expert by score, with weight 1 (DynMoE, Eq. 5)."""
        best_T1 = scores_TE.argmax(1, keepdim=True)
        best_TE = torch.zeros_like(mask_TE).scatter_(1, best_T1, unserved_T[:, None])
        weight_TE = best_TE.to(weights_TE.dtype)
        if self.combine == "tutel":
            raw_TE = weight_TE * scores_TE.sigmoid()
            weight_TE = torch.where((mask_TE.sum(1) > 1).any(), weight_TE, raw_TE)
        return mask_TE | best_TE, torch.where(unserved_T[:, None], weight_TE, weights_TE)

    def _aux(
        self, gate_TE: Tensor, mask_TE: Tensor, directions_ED: Tensor, token_mask_T: Tensor | None
    ) -> Tensor:
        num_slots = len(self.directions)
        if self.aux == "gshard":
            first_TE = self._first(mask_TE)
            return losses.load_balance(gate_TE, first_TE, gate_TE.shape[1], token_mask_T)
        normalised = self.columns == "normalised"
        every_SD = (
            directions_ED
            if self.simplicity_over == "living"
            else torch.stack(list(self.directions)).float()
        )
        aux = losses.diversity(directions_ED, normalised, self.smoothing)
        aux = aux + losses.simplicity(every_SD)
        if self.balance_weight:
            aux = aux + self.balance_weight * losses.top_any_balance(gate_TE, mask_TE, num_slots)
        if self.efficiency_weight:
            efficiency = losses.efficiency(gate_TE, num_slots, token_mask_T)
            aux = aux + self.efficiency_weight * efficiency
        return aux

    def _first(self, mask_TE: Tensor) -> Tensor:
        """Mark one of each token's experts as its first choice, for GShard's loss; bool, [T, E]."""
        # NOTE: top-any gates are all 1, so the official first choice is the order in which
        # torch.topk returns equal values, which is not defined. A fixed order would hold some slots
        # back and not others: one is drawn in training, and the lowest taken in evaluation.
        order_TE = torch.rand_like(mask_TE, dtype=torch.float) if self.training else mask_TE.float()
        best_T = order_TE.masked_fill(~mask_TE, -1).argmax(1)
        return mask_TE & F.one_hot(best_T, mask_TE.shape[1]).bool()

    def extra_repr(self) -> str:
        return (
            f"k=any of {len(self.directions)} slots, gate_grad={self.gate_grad}, "
            f"combine={self.combine}, aux={self.aux}"
        )

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """Return the slot's direction and threshold."""
        return [self.directions[slot], self.thresholds[slot]]

    @torch.no_grad()
    def point(self, slot: int, direction_D: Tensor) -> None:
        """Give a new expert the unit vector of ``direction_D`` and threshold 0 (Algorithm 1)."""
        direction_D = direction_D.float()
        # Scaled first: the square of a long sum overflows, and its unit vector would be 0.
        direction_D = direction_D / direction_D.abs().amax().clamp(min=1e-30)
        self.directions[slot].copy_(F.normalize(direction_D, dim=0))
        self.thresholds[slot].zero_()

    @torch.no_grad()
    def keep(self, slots: Sequence[int]) -> None:
        self.directions = nn.ParameterList(self.directions[slot] for slot in slots)
        self.thresholds = nn.ParameterList(self.thresholds[slot] for slot in slots)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": [self.thresholds[slot].item() for slot in live]}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

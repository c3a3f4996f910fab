"""Auxiliary losses of the routers, as pure functions.

All take fp32 and return a scalar. ``real_T`` (bool) is False on tokens that count nowhere; None:
all of them count. Nothing here waits for the device.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def diversity(directions_ED: Tensor, normalised: bool, smoothing: float) -> Tensor:
    """``||W W^T - I||_F`` over expert directions (DynMoE, arXiv 2405.14297, Eq. 7, first term).

    The directions start orthonormal, where the norm has a kink: its gradient there is a unit vector
    in a direction set by rounding noise. ``smoothing`` > 0 rounds the kink off,
    ``sqrt(s^2 + smoothing^2) - smoothing``, and keeps the value 0 at the orthonormal start.
    """
    if normalised:
        directions_ED = F.normalize(directions_ED, dim=1)
    eye_EE = torch.eye(len(directions_ED), device=directions_ED.device, dtype=directions_ED.dtype)
    off_EE = directions_ED @ directions_ED.t() - eye_EE
    if normalised:
        off_EE = off_EE * (1 - eye_EE)
    if smoothing == 0:
        return torch.linalg.vector_norm(off_EE)
    return (off_EE.square().sum() + smoothing**2).sqrt() - smoothing


def simplicity(directions_ED: Tensor) -> Tensor:
    """Mean norm of the expert directions (DynMoE, Eq. 7, second term)."""
    return torch.linalg.vector_norm(directions_ED, dim=1).mean()


def redundancy(first_PD: Tensor, second_PD: Tensor) -> Tensor:
    """Sum of the squared cosines of P pairs of router rows (MASS, arXiv 2512.19765, its code)."""
    cosine_P = (F.normalize(first_PD, dim=1) * F.normalize(second_PD, dim=1)).sum(1)
    return cosine_P.square().sum()


def load_balance(
    probs_TE: Tensor, first_TE: Tensor, num_experts: int, real_T: Tensor | None = None
) -> Tensor:
    """``E * sum_e mean_t(p_te) * mean_t(first_te)``: GShard (arXiv 2006.16668, sec. 2.2), Switch.

    ``first_TE`` marks each token's first choice. 1.0 when probabilities and choices are uniform.
    """
    # NOTE: choices have no gradient: the loss moves the router by the probabilities alone.
    first_TE = first_TE.to(probs_TE.dtype)
    probs_E, first_E = _sum(probs_TE, real_T), _sum(first_TE, real_T)
    return num_experts * (probs_E * first_E).sum() / _count(probs_TE, real_T) ** 2


def z_loss(logits_TC: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean of the squared logsumexp of a token's logits (ST-MoE, arXiv 2202.08906, Eq. 5)."""
    squares_T1 = logits_TC.logsumexp(1, keepdim=True).square()
    return _sum(squares_T1, real_T).sum() / _count(logits_TC, real_T)


def sequence_balance(
    probs_TC: Tensor, picks_TC: Tensor, length: int | None = None, real_T: Tensor | None = None
) -> Tensor:
    """Balance within each sequence, mean over sequences (DeepSeek-V3, arXiv 2412.19437, Eq. 17-20).

    Of a sequence: ``sum_c f_c mean_t(p_tc)`` with f_c the picks of column c, times the columns,
    divided by all picks. ``length`` tokens in a row are a sequence; None: all of them are one.
    """
    if not len(probs_TC):
        return probs_TC.sum()
    columns, length = probs_TC.shape[1], length or len(probs_TC)
    picks_TC = picks_TC.to(probs_TC.dtype)
    real_T1 = torch.ones_like(picks_TC[:, :1]) if real_T is None else real_T[:, None].float()
    probs_BC, picks_BC, real_B1 = (
        (part * real_T1).view(-1, length, part.shape[1]).sum(1)
        for part in (probs_TC, picks_TC, torch.ones_like(real_T1))
    )
    share_BC = columns * picks_BC / picks_BC.sum(1, keepdim=True).clamp(min=1)
    balance_B1 = (share_BC * probs_BC / real_B1.clamp(min=1)).sum(1, keepdim=True)
    # A sequence of padding has 0.
    return balance_B1.sum() / (real_B1 > 0).sum().clamp(min=1)


def pair_balance(probs_TE: Tensor, mask_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """``E * sum_e mean_t(p_te) * n_e / n``: n_e of all n chosen pairs are of expert e.

    GShard's loss for choices of any number (BlockFFN's baseline of top-p routing). Padding has no
    pair.
    """
    load_E = mask_TE.to(probs_TE.dtype).sum(0)
    mean_E = _sum(probs_TE, real_T) / _count(probs_TE, real_T)
    return probs_TE.shape[1] * (mean_E * load_E).sum() / load_E.sum().clamp(min=1)


def l1(
    weights_TE: Tensor, mask_TE: Tensor, target_k: float | None, real_T: Tensor | None = None
) -> Tensor:
    """Mean over tokens of the sum of their weights; ReMoE (arXiv 2412.14711).

    With a ``target_k`` the weights of expert e count ``E / target_k`` times the share of tokens
    that it serves: GShard's balance loss of the weights. Padding has no weight.
    """
    weights_E, tokens = weights_TE.sum(0), _count(weights_TE, real_T)
    if target_k is not None:
        share_E = mask_TE.to(weights_TE.dtype).sum(0) / tokens
        weights_E = weights_E * share_E * (weights_TE.shape[1] / target_k)
    return weights_E.sum() / tokens


def entropy(probs_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean entropy of the tokens' probabilities in nats, with the 1e-5 of the code of top-p routing
    (arXiv 2403.07652) inside its logarithm."""
    return -_sum(probs_TE * (probs_TE + 1e-5).log(), real_T).sum() / _count(probs_TE, real_T)


def top_any_balance(gate_TE: Tensor, mask_TE: Tensor, num_slots: int) -> Tensor:
    """Balance over tokens that chose some expert; DynMoE's DeepSpeed code since January 2025
    (``deepspeed/moe/sharded_moe.py``, function ``topanygating_opt``).

    Every token's gates are divided by their sum, which has a gradient too: a token with one expert
    moves nothing, the others move gates against each other.
    """
    some_T = mask_TE.any(1)
    served = some_T.sum().clamp(min=1)
    share_TE = gate_TE / torch.where(some_T, gate_TE.sum(1), 1.0)[:, None]
    load_E = mask_TE.to(gate_TE.dtype).sum(0) / served
    return num_slots * ((share_TE * some_T[:, None]).sum(0) / served * load_E).sum()


def efficiency(gate_TE: Tensor, num_slots: int, real_T: Tensor | None = None) -> Tensor:
    """Mean k as a share of the pool, differentiable through the gate; from the same code."""
    return _sum(gate_TE, real_T).sum() / (_count(gate_TE, real_T) * num_slots)


def mean_k(gate_TE: Tensor, choice_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of the sum of their gates on ``choice_TE``, which has none on padding."""
    return (gate_TE * choice_TE).sum() / _count(gate_TE, real_T)


def importance_and_load(
    probs_TE: Tensor, kth_logit_T: Tensor, noise_std: float, real_T: Tensor | None = None
) -> Tensor:
    """Half the sum of the squared coefficients of variation of importance and load over experts.

    Shazeer et al. (arXiv 1701.06538, App. A) as Tutel computes it for GMoE
    (``tutel/impls/losses.py``, ``load_importance_loss``): the load term compares noise-free
    *probabilities* with the noisy *logit* of the last chosen expert. Kept for fidelity.
    """
    load_TE = torch.special.ndtr((probs_TE - kth_logit_T[:, None]) / noise_std)
    return (_squared_cv(_sum(probs_TE, real_T)) + _squared_cv(_sum(load_TE, real_T))) / 2


def _sum(x_TE: Tensor, real_T: Tensor | None) -> Tensor:
    return x_TE.sum(0) if real_T is None else (x_TE * real_T[:, None]).sum(0)


def _count(x_TE: Tensor, real_T: Tensor | None) -> Tensor | int:
    """The number of tokens that count, at least 1."""
    return max(len(x_TE), 1) if real_T is None else real_T.sum().clamp(min=1)


def _squared_cv(x_E: Tensor) -> Tensor:
    if len(x_E) == 1:  # the unbiased variance of one number is undefined; one expert is balanced
        return x_E.sum() * 0
    return x_E.var() / (x_E.mean().square() + 1e-10)

"""Auxiliary losses of the routers, as pure functions.

Shape suffixes: T tokens, E living experts, D model width. All take fp32 and return a scalar.
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


def load_balance(probs_TE: Tensor, first_TE: Tensor, num_experts: int) -> Tensor:
    """``E * sum_e mean_t(p_te) * mean_t(first_te)``: GShard (arXiv 2006.16668, sec. 2.2), Switch.

    ``first_TE`` marks each token's first choice. 1.0 when probabilities and choices are uniform.
    """
    # NOTE: choices have no gradient: the loss moves the router by the probabilities alone.
    tokens = max(len(probs_TE), 1)  # a batch of padding alone has none
    return num_experts * (probs_TE.sum(0) * first_TE.to(probs_TE.dtype).sum(0)).sum() / tokens**2


def top_any_balance(gate_TE: Tensor, mask_TE: Tensor, num_slots: int) -> Tensor:
    """Balance over tokens that chose some expert; DynMoE's DeepSpeed code since January 2025
    (``deepspeed/moe/sharded_moe.py``, function ``topanygating_opt``)."""
    some_T = mask_TE.any(1)
    served = some_T.sum().clamp(min=1)
    share_TE = gate_TE / mask_TE.sum(1, keepdim=True).clamp(min=1)
    load_E = mask_TE.to(gate_TE.dtype).sum(0) / served
    return num_slots * ((share_TE * some_T[:, None]).sum(0) / served * load_E).sum()


def efficiency(gate_TE: Tensor, num_slots: int) -> Tensor:
    """Mean k as a share of the pool, differentiable through the gate; from the same code."""
    return gate_TE.sum() / (max(len(gate_TE), 1) * num_slots)


def importance_and_load(probs_TE: Tensor, kth_logit_T: Tensor, noise_std: float) -> Tensor:
    """Half the sum of the squared coefficients of variation of importance and load over experts.

    Shazeer et al. (arXiv 1701.06538, App. A) as Tutel computes it for GMoE
    (``tutel/impls/losses.py``, ``load_importance_loss``): the load term compares noise-free
    *probabilities* with the noisy *logit* of the last chosen expert. Kept for fidelity.
    """
    load_TE = torch.special.ndtr((probs_TE - kth_logit_T[:, None]) / noise_std)
    return (_squared_cv(probs_TE.sum(0)) + _squared_cv(load_TE.sum(0))) / 2


def _squared_cv(x_E: Tensor) -> Tensor:
    if len(x_E) == 1:  # the unbiased variance of one number is undefined; one expert is balanced
        return x_E.sum() * 0
    return x_E.var() / (x_E.mean().square() + 1e-10)

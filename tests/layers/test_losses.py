"""Auxiliary losses against sums written out by hand, with fewer living experts than slots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

import dynmoe.layers
from dynmoe.layers import TopAnyRouter, losses
from dynmoe.layers.routers import Router

CONF = Path(__file__).parents[2] / "conf" / "moe"

DIM, SLOTS, LIVE = 6, 5, (0, 2, 3)


@pytest.fixture
def x_TD() -> torch.Tensor:
    return torch.randn(40, DIM, generator=torch.Generator().manual_seed(0))


def aux_and_mask(x_TD: torch.Tensor, **options: object) -> tuple[float, list[list[bool]]]:
    torch.manual_seed(1)
    routing = TopAnyRouter(DIM, SLOTS, **options)(x_TD, LIVE)  # type: ignore[arg-type]
    return routing.aux.item(), routing.mask_TE.tolist()


def test_gshard_over_living_experts(x_TD: torch.Tensor) -> None:
    """tutel/impls/losses.py: E * sum_e mean gate_e * mean of first choices, E the living ones."""
    torch.manual_seed(1)
    routing = TopAnyRouter(DIM, SLOTS, aux="gshard").eval()(x_TD, LIVE)
    aux, mask = routing.aux.item(), (routing.mask_TE & ~routing.unserved_T[:, None]).tolist()
    expected = 0.0
    for e in range(3):
        gate = sum(row[e] for row in mask) / 40
        first = sum(any(row) and row.index(True) == e for row in mask) / 40
        expected += 3 * gate * first
    assert aux == pytest.approx(expected)


def test_balance_and_efficiency_over_the_pool(x_TD: torch.Tensor) -> None:
    """DynMoE's DeepSpeed code: balance over tokens with k > 0, mean k as a share of all slots."""
    base, mask = aux_and_mask(x_TD)
    served = [row for row in mask if any(row)]
    assert 0 < len(served) < 40
    balance = sum(
        (sum(row[e] / sum(row) for row in served) / len(served))
        * (sum(row[e] for row in served) / len(served))
        for e in range(3)
    )
    mean_k = sum(map(sum, mask)) / 40
    with_balance, _ = aux_and_mask(x_TD, balance_weight=1.0)
    with_efficiency, _ = aux_and_mask(x_TD, efficiency_weight=1.0)
    assert with_balance - base == pytest.approx(SLOTS * balance, rel=1e-4)
    assert with_efficiency - base == pytest.approx(mean_k / SLOTS, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_diversity_by_hand(smoothing: float) -> None:
    w = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    raw = (3.0**2 + 2 * 2.0**2 + 1.0**2 + smoothing**2) ** 0.5 - smoothing
    assert losses.diversity(w, False, smoothing).item() == pytest.approx(raw)
    cos = 2**-0.5
    normalised = (2 * cos**2 + smoothing**2) ** 0.5 - smoothing
    assert losses.diversity(w, True, smoothing).item() == pytest.approx(normalised)
    assert losses.simplicity(w).item() == pytest.approx((2 + 2**0.5) / 2)


def test_first_choices_of_top_any_are_drawn_among_the_chosen(x_TD: Tensor) -> None:
    """Equal gates have no order: by the lowest slot, slot 0 would be held back alone."""
    router = TopAnyRouter(DIM, SLOTS, aux="gshard")
    mask_TE = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    mask_TE = mask_TE.repeat_interleave(3000, 0)
    torch.manual_seed(0)
    first_TE = router._first(mask_TE)
    torch.manual_seed(0)
    assert torch.equal(first_TE, router._first(mask_TE))  # by seed
    assert not (first_TE & ~mask_TE).any()
    share = first_TE.view(3, 3000, 3).float().mean(1)
    expected = torch.tensor([[1 / 3] * 3, [0, 0.5, 0.5], [0, 0, 0]])
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


# Every loss of every official preset, by gradient: two losses of equal value may pull elsewhere.


def preset(name: str, **options: object) -> Router:
    """The router of ``conf/moe/<name>.yaml``, at a start that is off every kink."""

    def read(name: str) -> Any:
        own = OmegaConf.load(CONF / f"{name}.yaml")
        bases = [base for base in own.get("defaults", []) if base != "_self_"]
        return OmegaConf.merge(*(read(base) for base in bases), own)

    moe = OmegaConf.create({"moe": read(name), "task": {"placement": "all"}})
    router: Any = OmegaConf.to_container(moe.moe.router, resolve=True)
    make = getattr(dynmoe.layers, router.pop("_target_").rsplit(".", 1)[1])
    router.pop("_partial_")
    torch.manual_seed(1)
    made: Router = make(DIM, SLOTS if make is TopAnyRouter else 4, **{**router, **options})
    for p in made.parameters():
        p.data += torch.randn_like(p) * 0.1
    return made


def gates(router: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Gates of all slots as the official code has them: a ReLU, then a sign whose gradient is 1."""
    w_DS = F.normalize(torch.stack(list(router.directions)), dim=1).t()
    alive_S = torch.tensor([slot in LIVE for slot in range(SLOTS)])
    scores = torch.sigmoid(F.normalize(x_TD, dim=1) @ w_DS) * alive_S
    margin = F.relu(scores - torch.sigmoid(torch.stack(list(router.thresholds))))
    gate = torch.sign(margin).detach() + margin - margin.detach()
    return gate, torch.sign(margin).detach()


def diverse_and_simple(router: Any) -> Tensor:
    w_SD = torch.stack(list(router.directions))
    unit_SD = F.normalize(w_SD, dim=1)
    total = torch.zeros(())
    for i in LIVE:
        for j in LIVE:
            if i != j:
                total = total + (unit_SD[i] @ unit_SD[j]) ** 2
    return total.sqrt() + sum(w.norm() for w in w_SD) / SLOTS


def official_deepspeed(router: Any, x_TD: Tensor) -> Tensor:
    """DynMoE's ``topanygating_opt``: K^2 mean_e(mean share x mean mask), and mean k."""
    gate, mask = gates(router, x_TD)
    shares = [g / g.sum() for g, m in zip(gate, mask, strict=True) if m.any()]
    masks = [m for m in mask if m.any()]
    assert 0 < len(shares) < len(x_TD)
    balance = (torch.stack(shares).mean(0) * torch.stack(masks).mean(0)).mean() * SLOTS**2
    return diverse_and_simple(router) + balance + gate.mean()


def official_tutel(router: Any, x_TD: Tensor) -> Tensor:
    """Tutel's ``gshard_loss`` of the gates, over living experts; ties as drawn by the router."""
    gate, mask = gates(router, x_TD)
    first = router._first(mask[:, LIVE].bool()).float()
    return (gate[:, LIVE].sum(0) * first.sum(0)).sum() * len(LIVE) / len(x_TD) ** 2


def gshard(router: Any, x_TD: Tensor) -> Tensor:
    """DeepSpeed's ``top2gating``: mean(me * ce) * E * E, ``ce`` of the first choice."""
    probs = F.softmax(x_TD @ router.weight.t(), dim=1)
    first = F.one_hot(probs.argmax(1), 4).float()
    return (probs.mean(0) * first.mean(0)).mean() * 16


def gmoe(router: Any, x_TD: Tensor) -> Tensor:
    """Tutel's ``load_importance_loss``."""
    projected = F.normalize(router.project(x_TD), dim=1)
    logits = projected @ F.normalize(router.embeddings, dim=1).t() * router.log_scale.exp()
    noisy = logits + torch.randn_like(logits) / 4
    kth = noisy.topk(router.top_k, dim=1).values[:, -1:]  # with its graph, as in the code
    probs = logits.softmax(1)
    load = torch.distributions.Normal(torch.zeros(()), 1 / 4).cdf(probs - kth)

    def squared_cv(x: Tensor) -> Tensor:
        return x.var() / (x.mean() ** 2 + 1e-10)

    return (squared_cv(probs.sum(0)) + squared_cv(load.sum(0))) / 2


OFFICIAL = {
    "dynmoe_official_deepspeed": official_deepspeed,
    "dynmoe_vl_official": official_deepspeed,
    "dynmoe_official_tutel": official_tutel,
    "dynmoe_official_tutel, diverse and simple": lambda router, x_TD: diverse_and_simple(router),
    "moe_llava": gshard,
    "topk": gshard,
    "gmoe": gmoe,
}


def flat_grad(value: Tensor, by: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(value, by, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for t, g in zip(by, grads, strict=True)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("name", OFFICIAL)
def test_gradient_of_official_losses(name: str, x_TD: Tensor) -> None:
    preset_name, _, other = name.partition(", ")
    router = preset(preset_name, **({"aux": "diverse_simple"} if other else {}))
    x_TD = x_TD.clone().requires_grad_()  # the loss moves the layers before, too
    parameters = [x_TD, *router.parameters()]
    found = []
    for loss in (
        lambda: router(x_TD, LIVE if isinstance(router, TopAnyRouter) else range(4)).aux,
        lambda: OFFICIAL[name](router, x_TD),
    ):
        torch.manual_seed(7)
        value = loss()
        found.append((value.detach(), flat_grad(value, parameters)))
    (value, grad), (expected, expected_grad) = found
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    assert expected_grad.norm() > 1e-4
    assert (grad - expected_grad).norm() < 1e-4 * expected_grad.norm()


@pytest.mark.parametrize("name", ["dynmoe_official_deepspeed", "dynmoe_official_tutel"])
def test_gradient_of_official_weights(name: str, x_TD: Tensor) -> None:
    """1/k is a constant in DeepSpeed's head; tutel divides by the sum of gates, which moves."""
    router = preset(name)
    c_TE = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    gate, mask = gates(router, x_TD)
    by = (gate if name == "dynmoe_official_tutel" else mask).sum(1, keepdim=True)
    expected = gate[:, LIVE] / torch.where(mask.any(1, keepdim=True), by, 1.0)
    assert (mask.sum(1) > 1).any() and not mask.any(1).all()
    found = router(x_TD, LIVE).weights_TE
    torch.testing.assert_close(found, expected)
    parameters = list(router.parameters())
    mine, official = (flat_grad((w_TE * c_TE).sum(), parameters) for w_TE in (found, expected))
    assert (mine - official).norm() < 1e-4 * official.norm()


def test_losses_of_masked_tokens_are_those_of_the_others(x_TD: Tensor) -> None:
    """Values and gradients, without taking the tokens out, for which a device would be waited."""
    real_T = torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.6
    choice_TE = F.one_hot(torch.arange(40) % DIM, DIM)
    kth_T = x_TD.amax(1)
    for loss in (
        lambda x, choice, kth, real: losses.load_balance(x.softmax(1), choice, DIM, real),
        lambda x, choice, kth, real: losses.efficiency(x, DIM, real),
        lambda x, choice, kth, real: losses.importance_and_load(x.softmax(1), kth, 0.5, real),
    ):
        leaf_TD = x_TD.clone().requires_grad_()
        masked = loss(leaf_TD, choice_TE, kth_T, real_T)
        alone = loss(leaf_TD[real_T], choice_TE[real_T], kth_T[real_T], None)
        torch.testing.assert_close(masked, alone)
        (grad,), (expected,) = (torch.autograd.grad(v, leaf_TD) for v in (masked, alone))
        torch.testing.assert_close(grad, expected)
        nothing = torch.zeros(40, dtype=torch.bool)
        assert loss(leaf_TD, choice_TE, kth_T, nothing).item() == 0
    assert math.isfinite(losses.top_any_balance(x_TD * 0, x_TD > 99, DIM).item())

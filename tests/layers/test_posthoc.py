"""Budgets after training: rules against loops, and what holds for every router."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.layers import (
    AverageKeyRouter,
    BiasedTopKRouter,
    BlockFFNRouter,
    BudgetTopAnyRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    GeMoERouter,
    MaskedTopKRouter,
    MoELayer,
    NullExpertRouter,
    PrefixRouter,
    ReLURouter,
    TopAnyRouter,
    TopKRouter,
    UniFRouter,
    ZeroCostRouter,
    record_routing,
)
from dynmoe.layers.posthoc import LOWERING, Cuts, Rule, changed_routing, cut, keys, rules_of
from dynmoe.layers.routers import Router, Routing

DIM, SLOTS, TOKENS = 8, 6, 60
LIVE = tuple(range(SLOTS))
ROUTERS: dict[str, Any] = {
    "top_any": TopAnyRouter,
    "top_any, tutel": partial(TopAnyRouter, combine="tutel"),
    "budget": partial(BudgetTopAnyRouter, target_k=2.5, scale="norm"),
    "budget, softmax": partial(BudgetTopAnyRouter, weights="softmax"),
    "top-3": partial(TopKRouter, top_k=3),
    "top-3, raw": partial(TopKRouter, top_k=3, renormalise=False, scale=2.5),
    "top-3 of parts": partial(TopKRouter, top_k=3, weights_sum="k"),
    "top-3 with capacity": partial(TopKRouter, top_k=3, capacity_factor=0.8),
    "loss-free": partial(BiasedTopKRouter, top_k=3),
    "emoe": partial(AverageKeyRouter, top_k=3),
    "top-p": partial(PrefixRouter, top_p=0.6),
    "xmoe": partial(PrefixRouter, top_p=0.6, boundary="below", renorm="chosen"),
    "remoe": ReLURouter,
    "blockffn": BlockFFNRouter,
    "expert choice": ExpertChoiceRouter,
    "expert threshold": ExpertThresholdRouter,
    "adamoe": partial(NullExpertRouter, num_null=2, top_k=2),
    "longcat": partial(NullExpertRouter, renorm="none", null_output="identity"),
    "beam": partial(MaskedTopKRouter, top_k=3),
    "gemoe": GeMoERouter,
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    router: Router = ROUTERS[name](DIM, SLOTS)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.4)
    for key, buffer in router.named_buffers():
        if key in ("bias_E", "keys_ED"):
            nn.init.normal_(buffer, std=0.2)
    return router.eval()


def tokens() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(TOKENS, DIM), torch.arange(TOKENS) % 7 != 3


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_every_router_and_rule(name: str) -> None:
    router, (x_TD, real_T) = made(name), tokens()
    own = router(x_TD, LIVE, real_T)
    assert rules_of(router)
    for rule in rules_of(router):
        found_keys = keys(rule, router, LIVE, own)
        key_TE = found_keys.key_TE
        finite = key_TE[key_TE.isfinite()]
        if rule in LOWERING:  # with every pair above the cut the routing is the router's own
            assert not (key_TE.isfinite() & ~own.mask_TE).any()
            whole = cut(own, found_keys, -1e9, router, real_T)
            assert torch.equal(whole.mask_TE, own.mask_TE)
            assert torch.equal(whole.weights_TE, own.weights_TE)
        masks = []
        for at in (*finite.quantile(torch.tensor([0.0, 0.3, 0.7])).tolist(), 1e9):
            found = cut(own, found_keys, at, router, real_T)
            masks.append(found.mask_TE)
            above_T = (found_keys.counted() > at).sum(1)
            assert torch.equal(found.mask_TE.sum(1)[real_T], above_T[real_T])
            assert found.weights_TE.isfinite().all() and found.dispatch_TE is found.mask_TE
            assert not found.weights_TE[~found.mask_TE].any()
            assert not found.mask_TE[~real_T].any()
            assert torch.equal(found.unserved_T, real_T & ~found.mask_TE.any(1))
            sums_T, own_T = found.weights_TE.sum(1), own.weights_TE.sum(1)
            if name in ("top_any", "top-3", "loss-free", "xmoe", "gemoe", "emoe"):
                torch.testing.assert_close(sums_T, real_T.float() * sums_T.amax())
            elif name == "top-3 of parts":
                torch.testing.assert_close(sums_T, found.mask_TE.sum(1).float())
            elif rule in LOWERING and name in ("top-p", "remoe", "longcat", "top-3, raw"):
                assert (sums_T <= own_T + 1e-6).all()
        for more, fewer in pairwise(masks):
            # A token below all thresholds falls back by its score, not by its margin.
            assert rule == "threshold" or not (fewer & ~more).any()
            assert (fewer.sum(1) <= more.sum(1)).all()
        assert (masks[-1].sum(1) <= 1).all()
        may_have_none = ("remoe", "blockffn", "adamoe", "longcat", "beam")
        if name not in may_have_none and rule not in LOWERING:
            assert masks[-1].any(1)[real_T].all()


@torch.no_grad()
def naive(
    rule: Rule, own: Routing, dense_TE: Tensor, margin_TE: Tensor | None, at: float
) -> Tensor:
    taken = torch.zeros_like(own.mask_TE)
    for t in range(len(taken)):
        chosen = [e for e in LIVE if own.mask_TE[t, e]]
        score, dense = own.scores_TE[t].tolist(), dense_TE[t].tolist()
        if rule == "threshold":
            assert margin_TE is not None
            kept = [e for e in LIVE if margin_TE[t, e] > at] or [max(LIVE, key=score.__getitem__)]
        elif rule == "quantile":
            kept = [e for e in LIVE if score[e] > at] or [max(LIVE, key=score.__getitem__)]
        elif rule == "top_k":
            kept = sorted(chosen, key=lambda e: -score[e])[: math.ceil(-at)]
        elif rule == "ratio":
            kept = [e for e in chosen if dense[e] > at * max(dense[e] for e in chosen)]
        else:
            shares = [each / sum(dense) for each in dense]
            entropy = -sum(p * math.log(p) for p in shares) / math.log(SLOTS)
            kept = chosen if entropy > at else [max(chosen, key=dense.__getitem__)]
        taken[t, kept] = True
    return taken


@pytest.mark.parametrize(
    ("rule", "name", "at"),
    [
        ("threshold", "top_any", 0.3),
        ("threshold", "top_any", -0.2),
        ("threshold", "xmoe", 0.2),
        ("quantile", "top_any", 0.3),
        ("quantile", "top-3", 0.3),
        ("ratio", "top-3", 0.4),
        ("ratio", "loss-free", 0.7),
        ("ratio", "budget, softmax", 0.5),
        ("entropy", "top-3", 0.8),
        ("entropy", "gemoe", 0.8),
        ("top_k", "top-3", -2),
        ("top_k", "top_any", -2),
    ],
)
@torch.no_grad()
def test_rules_against_loops(rule: Rule, name: str, at: float) -> None:
    router, (x_TD, _) = made(name), tokens()
    own = router(x_TD, LIVE)
    dense_TE = router.weigh(own.scores_TE, torch.ones_like(own.mask_TE))
    margin_TE = router.margins(own.scores_TE, LIVE)
    found = cut(own, keys(rule, router, LIVE, own), at, router)
    wanted = naive(rule, own, dense_TE, margin_TE, at)
    assert torch.equal(found.mask_TE, wanted)
    assert not torch.equal(wanted, own.mask_TE)


@pytest.mark.parametrize("name", ["top_any", "budget", "xmoe", "expert threshold", "remoe"])
@torch.no_grad()
def test_a_shift_of_nothing_changes_nothing(name: str) -> None:
    router, (x_TD, real_T) = made(name), tokens()
    own = router(x_TD, LIVE, real_T)
    found = cut(own, keys("threshold", router, LIVE, own), 0.0, router, real_T)
    served_T = own.mask_TE.any(1)
    assert torch.equal(found.mask_TE[served_T], own.mask_TE[served_T])
    assert torch.equal(found.weights_TE[served_T], own.weights_TE[served_T])


@torch.no_grad()
def test_a_shift_is_that_of_the_thresholds() -> None:
    router, (x_TD, real_T) = made("top_any"), tokens()
    own = router(x_TD, LIVE, real_T)
    found = cut(own, keys("threshold", router, LIVE, own), 0.25, router, real_T)
    for threshold in router.thresholds:
        threshold += 0.25
    wanted = router(x_TD, LIVE, real_T)
    assert torch.equal(found.mask_TE, wanted.mask_TE)
    torch.testing.assert_close(found.weights_TE, wanted.weights_TE)


@pytest.mark.parametrize("wanted_k", [1, 2])
@torch.no_grad()
def test_the_k_best_are_those_of_a_smaller_k(wanted_k: int) -> None:
    router, (x_TD, real_T) = made("top-3"), tokens()
    own = router(x_TD, LIVE, real_T)
    found = cut(own, keys("top_k", router, LIVE, own), -wanted_k, router, real_T)
    router.top_k = wanted_k
    smaller = router(x_TD, LIVE, real_T)
    assert torch.equal(found.mask_TE, smaller.mask_TE)
    torch.testing.assert_close(found.weights_TE, smaller.weights_TE)


def test_what_is_offered() -> None:
    assert rules_of(made("top_any")) == ("threshold", "quantile", "top_k")
    assert rules_of(made("top-3")) == ("entropy", "ratio", "quantile", "top_k")
    assert "threshold" in rules_of(made("xmoe")) and "ratio" in rules_of(made("budget, softmax"))
    assert rules_of(NullExpertRouter(DIM, SLOTS, renorm="all")) == ()
    assert rules_of(ZeroCostRouter(DIM, SLOTS)) == rules_of(UniFRouter(DIM, 16)) == ()


@pytest.mark.parametrize("rule", ["threshold", "quantile"])
@torch.no_grad()
def test_a_model_reaches_a_mean_and_is_left_as_it_was(rule: Rule) -> None:
    torch.manual_seed(0)

    def layer() -> MoELayer:
        ffn = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        return MoELayer(ffn, DIM, TopAnyRouter, SLOTS)

    model = nn.Sequential(layer(), layer()).eval()
    x, _ = tokens()
    before = model(x)
    cuts = Cuts(rule, {"0": 0.0, "1": 0.0})
    with changed_routing(model, None, [cuts]):
        assert torch.equal(model(x), before)
    assert cuts.reach == (1, SLOTS)
    with changed_routing(model, None, [cuts], counts=lambda: False):
        model(-x)
    assert cuts._tokens == {"0": TOKENS, "1": TOKENS}
    for _ in range(4):
        cuts = cuts.moved_to(1.5)
        with changed_routing(model, cuts), record_routing(model) as tape:
            model(x)
    means = [call.mask.sum().item() / TOKENS for (call,) in tape.values()]
    assert sum(means) / 2 == pytest.approx(1.5, abs=0.02)
    assert (len(set(cuts.at.values())) == 1) is (rule == "threshold")
    if rule == "quantile":
        assert means == pytest.approx([1.5, 1.5], abs=0.03)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_padding_and_free_choices_are_not_counted_as_served() -> None:
    router, (x_TD, real_T) = made("adamoe"), tokens()
    own = router(x_TD, LIVE, real_T)
    cuts = Cuts("quantile", {"layer": 0.0})
    cuts.count("layer", keys("quantile", router, LIVE, own), real_T)
    kept_T = real_T & (own.free_T == 0)
    assert 0 < kept_T.sum() < real_T.sum()
    assert cuts.reach == (pytest.approx((kept_T.sum() / real_T.sum()).item()), SLOTS)

"""Routers obey the equations they cite: gates, straight-through gradients, fallback, capacity."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dynmoe.layers import AverageKeyRouter, CosineTopKRouter, TopAnyRouter, TopKRouter
from dynmoe.layers.routers import cosine

DIM, SLOTS = 8, 4
LIVE = tuple(range(SLOTS))


@pytest.fixture
def x_TD() -> torch.Tensor:
    return torch.randn(50, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_state_of_a_router_stays_fp32() -> None:
    class Controlled(TopKRouter):
        def __init__(self, dim: int, num_slots: int) -> None:
            super().__init__(dim, num_slots)
            self.register_buffer("threshold", torch.tensor(1 / 3))
            self.register_buffer("steps", torch.tensor(7))

    router = torch.nn.Sequential(Controlled(DIM, SLOTS))
    for change in ("bfloat16", "half"):
        getattr(router, change)()
        assert router[0].threshold.equal(torch.tensor(1 / 3)) and router[0].steps.item() == 7
        assert router[0].weight.dtype == getattr(torch, change)
    assert router.to("meta")[0].threshold.is_meta


def test_repr_says_k_and_capacity() -> None:
    router = TopKRouter(DIM, SLOTS, top_k=2, capacity_factor=1.5, min_capacity=4)
    assert "k=2 of 4, capacity_factor=1.5, min_capacity=4" in repr(router)
    assert "k=3 of 4" in repr(AverageKeyRouter(DIM, SLOTS, top_k=3))
    assert "k=any of 4 slots" in repr(TopAnyRouter(DIM, SLOTS))


# Top-any gating (DynMoE, Eq. 2-6).


def test_top_any_gate_and_mean(x_TD: torch.Tensor) -> None:
    router = TopAnyRouter(DIM, SLOTS)
    for slot, threshold in enumerate((-0.2, 0.0, 0.1, 0.3)):
        router.thresholds[slot].data.fill_(threshold)
    routing = router(x_TD, LIVE)
    for t, x in enumerate(x_TD):
        chosen = [
            e
            for e in LIVE
            if torch.cosine_similarity(x, router.directions[e], dim=0).sigmoid()
            > router.thresholds[e].sigmoid()
        ]
        assert routing.mask_TE[t].nonzero().flatten().tolist() == chosen
        expected = torch.zeros(SLOTS)
        if chosen:
            expected[chosen] = 1 / len(chosen)
        torch.testing.assert_close(routing.weights_TE[t], expected)


def test_k_is_binomial_at_the_start() -> None:
    """Thresholds 0 and orthonormal directions: each expert fires for half of random tokens."""
    x_TD = torch.randn(20_000, 64)
    k_T = TopAnyRouter(64, 6)(x_TD, range(6)).mask_TE.sum(1)
    share = torch.bincount(k_T, minlength=7) / len(k_T)
    binomial = torch.tensor([math.comb(6, k) / 2**6 for k in range(7)])
    torch.testing.assert_close(share, binomial, atol=0.015, rtol=0)


def test_only_living_slots_are_scored(x_TD: torch.Tensor) -> None:
    router = TopAnyRouter(DIM, SLOTS)
    routing = router(x_TD, (1, 3))
    every = router(x_TD, LIVE)
    assert torch.equal(routing.scores_TE, every.scores_TE[:, [1, 3]])
    (routing.weights_TE.sum() + routing.aux).backward()
    assert router.directions[1].grad is not None
    assert router.directions[0].grad is None and router.thresholds[0].grad is None


def straight_through(router: TopAnyRouter, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradient of sum(c * weights) by the margins, for fixed c: read off the thresholds."""
    c_TE = torch.randn(len(x_TD), SLOTS, generator=torch.Generator().manual_seed(3))
    routing = router(x_TD, LIVE)
    (routing.weights_TE * c_TE).sum().backward()
    slope = torch.stack([(g.sigmoid() * (1 - g.sigmoid())).detach() for g in router.thresholds])
    got_E = torch.stack([g.grad for g in router.thresholds])
    return routing.mask_TE, c_TE, -slope, got_E


@pytest.mark.parametrize("gate_grad", ["chosen", "all"])
def test_straight_through_gradient_constant_k(gate_grad: str, x_TD: torch.Tensor) -> None:
    mask_TE, c_TE, slope_E, got_E = straight_through(TopAnyRouter(DIM, SLOTS, gate_grad), x_TD)
    per_gate_TE = c_TE / mask_TE.sum(1, keepdim=True).clamp(min=1)
    reached_TE = mask_TE if gate_grad == "chosen" else torch.ones_like(mask_TE)
    torch.testing.assert_close(got_E, slope_E * (per_gate_TE * reached_TE).sum(0))


@pytest.mark.parametrize("combine", ["constant_k", "through_k", "tutel"])
def test_gradient_of_a_token_with_one_expert(combine: str) -> None:
    """A token with k = 1 teaches its gate only with a constant 1/k (tutel: without any k > 1)."""
    router = TopAnyRouter(DIM, SLOTS, combine=combine)
    direction = router.directions[0].detach()
    others = sum(router.directions[e].detach() for e in LIVE[1:])
    alone, pair = direction - others, direction + router.directions[1].detach()
    for batch, expected in (
        ([alone], {"constant_k": True, "through_k": False, "tutel": True}),
        ([alone, pair], {"constant_k": True, "through_k": False, "tutel": False}),
    ):
        router.zero_grad()
        weights_TE = router(torch.stack(batch), LIVE).weights_TE
        weights_TE[0, 0].backward()
        gradient = router.thresholds[0].grad
        assert (gradient is not None and abs(gradient.item()) > 1e-3) == expected[combine]


def test_evaluation_falls_back_to_the_best_expert_alone() -> None:
    """A token below every threshold is served at evaluation, whoever else is in its batch."""
    router = TopAnyRouter(DIM, SLOTS).eval()
    lost = -sum((e + 1) * router.directions[e].detach() for e in LIVE)
    found = router.directions[0].detach() + router.directions[1].detach()
    for batch in ([lost], [lost, found]):
        routing = router(torch.stack(batch), LIVE)
        assert routing.weights_TE[0].tolist() == [1.0, 0.0, 0.0, 0.0]
        assert routing.unserved_T[0] and routing.mask_TE[0].tolist() == [True, False, False, False]
    router.train()
    assert not router(lost[None], LIVE).weights_TE.any()


def test_tutel_fallback_depends_on_batch_mates() -> None:
    """The official tutel gate weighs the fallback by its raw score in a batch without any k > 1."""
    router = TopAnyRouter(DIM, SLOTS, combine="tutel").eval()
    lost = -sum((e + 1) * router.directions[e].detach() for e in LIVE)
    found = router.directions[0].detach() + router.directions[1].detach()
    alone = router(lost[None], LIVE)
    assert alone.weights_TE[0, 0].item() == pytest.approx(alone.scores_TE[0, 0].sigmoid().item())
    assert router(torch.stack([lost, found]), LIVE).weights_TE[0, 0].item() == 1.0


@pytest.mark.parametrize("columns", ["raw", "normalised"])
def test_auxiliary_loss_is_one_and_smooth_at_the_start(columns: str, x_TD: torch.Tensor) -> None:
    router = TopAnyRouter(DIM, SLOTS, columns=columns)
    aux = router(x_TD, LIVE).aux
    assert aux.item() == pytest.approx(1.0, abs=1e-5)
    aux.backward()
    for row in router.directions:
        # Only simplicity pulls: along the direction, with 1/E.
        torch.testing.assert_close(row.grad, row.detach() / SLOTS, atol=1e-3, rtol=0)


def test_point_gives_unit_direction_and_zero_threshold() -> None:
    router = TopAnyRouter(DIM, SLOTS)
    router.thresholds[2].data.fill_(0.7)
    router.point(2, torch.arange(DIM).float())
    torch.testing.assert_close(
        router.directions[2].data, F.normalize(torch.arange(DIM).float(), dim=0)
    )
    assert router.thresholds[2].item() == 0


# Fixed k.


def test_top_k_weights(x_TD: torch.Tensor) -> None:
    router = TopKRouter(DIM, SLOTS, top_k=2)
    routing = router(x_TD, LIVE)
    probs_TE = (x_TD @ router.weight.t()).softmax(1)
    top_T2, index_T2 = probs_TE.topk(2, dim=1)
    expected_TE = torch.zeros(50, SLOTS).scatter(1, index_T2, top_T2 / top_T2.sum(1, keepdim=True))
    torch.testing.assert_close(routing.weights_TE, expected_TE)
    single = TopKRouter(DIM, SLOTS, top_k=1)
    routing = single(x_TD, LIVE)  # not renormalised at k = 1: the router must learn
    probs_TE = (x_TD @ single.weight.t()).softmax(1)
    torch.testing.assert_close(routing.weights_TE.sum(1), probs_TE.amax(1))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("renormalise", [True, False])
def test_top_k_weights_as_other_models_have_them(
    top_k: int, renormalise: bool, x_TD: torch.Tensor
) -> None:
    """Mixtral's sum to 1 for every k, OLMoE's are probabilities; DeepSeek-V2 scales them."""
    router = TopKRouter(DIM, SLOTS, top_k=top_k, renormalise=renormalise, scale=2.5)
    routing = router(x_TD, LIVE)
    sums_T = (x_TD @ router.weight.t()).softmax(1).topk(top_k).values.sum(1)
    if renormalise:
        sums_T = torch.ones(50)
    torch.testing.assert_close(routing.weights_TE.sum(1), 2.5 * sums_T)


def test_gmoe_router_starts_at_scale_two_and_stops_at_hundred(x_TD: torch.Tensor) -> None:
    router = CosineTopKRouter(DIM, SLOTS).eval()
    cosines_TE = (
        F.normalize(router.project(x_TD), dim=1) @ F.normalize(router.embeddings, dim=1).t()
    )
    torch.testing.assert_close(router.logits(x_TD), 2 * cosines_TE)
    router.log_scale.data.fill_(9.0)
    torch.testing.assert_close(router.logits(x_TD), 100 * cosines_TE)


def test_gmoe_noise_only_in_training(x_TD: torch.Tensor) -> None:
    router = CosineTopKRouter(DIM, SLOTS).eval()
    assert torch.equal(router(x_TD, LIVE).scores_TE, router(x_TD, LIVE).scores_TE)
    router.train()
    assert not torch.equal(router(x_TD, LIVE).scores_TE, router(x_TD, LIVE).scores_TE)


@pytest.mark.parametrize(("tokens", "places"), [(18_912, 4_728), (31_520, 7_881), (12_608, 3_153)])
def test_gmoe_capacity(tokens: int, places: int) -> None:
    """int(1.5 * ceil(T / 6)) places per expert: PACS and DomainNet steps, an evaluation batch."""
    router = CosineTopKRouter(DIM, 6, capacity_factor=1.5).eval()
    x_TD = torch.randn(1, DIM).expand(tokens, DIM)  # equal tokens: all want one expert
    routing = router(x_TD, range(6))
    assert routing.mask_TE.sum() == places
    assert routing.unserved_T.sum() == tokens - places


def test_capacity_serves_the_most_confident_first(x_TD: torch.Tensor) -> None:
    router = TopKRouter(DIM, SLOTS, top_k=1, capacity_factor=0.5).eval()
    routing = router(x_TD, LIVE)
    best_T, choice_T = routing.scores_TE.max(1)
    for e in LIVE:
        wanted = (choice_T == e).nonzero().flatten().tolist()
        kept = sorted(wanted, key=lambda t: -best_T[t].item())[: int(0.5 * math.ceil(50 / SLOTS))]
        assert routing.mask_TE[:, e].nonzero().flatten().tolist() == sorted(kept)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("factor", "least", "expected"), [(0.5, 0, 6), (0.5, 4, 6), (0.05, 0, 0), (0.05, 4, 4)]
)
@pytest.mark.parametrize("make", [TopKRouter, AverageKeyRouter])
def test_least_capacity(make, masked: bool, factor: float, least: int, expected: int) -> None:  # type: ignore[no-untyped-def]
    """DeepSpeed's min_capacity: places where the share of few tokens rounds to none."""
    router = make(DIM, SLOTS, top_k=1, capacity_factor=factor, min_capacity=least).eval()
    router.keys_ED = torch.eye(SLOTS, DIM)
    x_TD = torch.ones(50, DIM)  # equal tokens: all want one expert
    mask_T = torch.arange(60) < 50 if masked else None
    if masked:
        x_TD = torch.cat([x_TD, torch.randn(10, DIM)])
    assert router(x_TD, LIVE, mask_T).mask_TE.sum() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0: expected a number > 0"),
        ({"capacity_factor": 1.0, "min_capacity": -1}, "min_capacity is -1"),
        ({"min_capacity": 4}, "needs a capacity_factor"),
    ],
)
@pytest.mark.parametrize("make", [TopKRouter, CosineTopKRouter, AverageKeyRouter])
def test_impossible_capacity_is_refused(make, options: dict[str, float], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make(DIM, SLOTS, top_k=2, **options)


def test_emoe_with_the_noise_and_capacity_of_its_code(x_TD: torch.Tensor) -> None:
    router = AverageKeyRouter(DIM, SLOTS, top_k=1, noise=2.0, capacity_factor=0.5)
    router.keys_ED = torch.randn(SLOTS, DIM)
    clean_TE = x_TD @ router.keys_ED.t()
    torch.manual_seed(3)
    noisy_TE = clean_TE + torch.randn(50, SLOTS) * 2.0 / SLOTS
    torch.manual_seed(3)
    routing = router(x_TD, LIVE)
    torch.testing.assert_close(routing.scores_TE, noisy_TE)
    best_T, choice_T = noisy_TE.softmax(1).max(1)
    for e in LIVE:
        wanted = (choice_T == e).nonzero().flatten().tolist()
        kept = sorted(wanted, key=lambda t: -best_T[t].item())[: int(0.5 * math.ceil(50 / SLOTS))]
        assert routing.mask_TE[:, e].nonzero().flatten().tolist() == sorted(kept)
    assert routing.unserved_T.equal(~routing.mask_TE.any(1))
    assert torch.equal(router.eval()(x_TD, LIVE).scores_TE, clean_TE)  # none in evaluation


def test_gmoe_aux_against_a_slow_reference(x_TD: torch.Tensor) -> None:
    router = CosineTopKRouter(DIM, SLOTS, top_k=2)
    clean_TE = router.logits(x_TD).detach()
    torch.manual_seed(5)
    noisy_TE = clean_TE + torch.randn_like(clean_TE) / SLOTS
    torch.manual_seed(5)
    aux = router(x_TD, LIVE).aux.item()
    probs_TE = clean_TE.softmax(1)
    importance, load = [0.0] * SLOTS, [0.0] * SLOTS
    for t in range(50):
        kth = sorted(noisy_TE[t].tolist())[-2]
        for e in LIVE:
            importance[e] += probs_TE[t, e].item()
            z = (probs_TE[t, e].item() - kth) / (1.0 / SLOTS)
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def squared_cv(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / (mean**2 + 1e-10)

    assert aux == pytest.approx((squared_cv(importance) + squared_cv(load)) / 2, rel=1e-4)


@pytest.mark.parametrize("kwargs", [{"top_k": 5}, {"top_k": 0}])
def test_impossible_k_is_refused(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 to the number of experts, 4"):
        TopKRouter(DIM, SLOTS, **kwargs)


def test_gradient_of_cosine() -> None:
    x_TD = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    w_ED = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosine, (x_TD, w_ED))
    expected = F.cosine_similarity(x_TD[:, None], w_ED[None], dim=2)
    torch.testing.assert_close(cosine(x_TD, w_ED), expected)
    zero_D = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    (grad_D,) = torch.autograd.grad(cosine(zero_D, w_ED).sum(), zero_D)
    assert grad_D.eq(0).all()

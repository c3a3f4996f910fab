"""Experts that choose tokens, against golden values of published code, and by property."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe.layers import ExpertChoiceRouter, ExpertThresholdRouter
from dynmoe.layers.routers import Routing, StepTotals

GOLDEN = Path(__file__).parent / "golden"


def cases(name: str) -> list[Any]:
    found: list[Any] = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return found


def routed(router: Any, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
    routing: Routing = router(x_TD, range(router.num_slots), mask_T)
    return routing


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def step(router: ExpertThresholdRouter, number: int, *batches: Tensor) -> list[Routing]:
    """One optimizer step, the ``number``-th from 0 of 100, over micro-batches."""
    routings = [routed(router, x_TD) for x_TD in batches]
    observed = torch.stack([r.observed.double() for r in routings if r.observed is not None])
    mask_TE = torch.cat([routing.mask_TE for routing in routings])
    own = StepTotals(
        mask_TE.sum(0).double(),
        torch.bincount(mask_TE.sum(1), minlength=router.num_slots + 1).double(),
        observed.sum(0),
        torch.tensor(len(batches)),
        number + 1,
        100,
    )
    with torch.no_grad():
        router.update(own, [own])
    return routings


# Expert choice.


@pytest.mark.parametrize("case", cases("expert_choice"), ids=lambda case: case["name"])
def test_expert_choice_is_the_ported_one(case: Any) -> None:
    weight_ED = torch.tensor(case["weight_ED"])
    router = ExpertChoiceRouter(weight_ED.shape[1], len(weight_ED), case["capacity_factor"])
    router.weight.data.copy_(weight_ED)
    routing = routed(router, torch.tensor(case["x_TD"]))
    assert routing.mask_TE.int().tolist() == case["mask_TE"]
    assert routing.mask_TE.sum(1).tolist() == case["k_T"]
    assert (routing.mask_TE.sum(0) == case["tokens_per_expert"]).all()
    assert routing.unserved_T.int().tolist() == case["unserved_T"]
    close(routing.weights_TE, case["weights_TE"])


@pytest.mark.parametrize(
    ("target_k", "tokens", "each"), [(2.0, 30, 12), (0.6, 25, 3), (1.0, 13, 2), (1.0, 3, 1)]
)
def test_places_of_real_tokens(target_k: float, tokens: int, each: int) -> None:
    """Of 5 experts, rounded down, at least one; equal for all, whatever the padding."""
    torch.manual_seed(0)
    router = ExpertChoiceRouter(8, 5, target_k)
    mask_T = torch.arange(40) < tokens
    routing = routed(router, torch.randn(40, 8), mask_T)
    assert routing.mask_TE.sum(0).tolist() == [each] * 5 and not routing.mask_TE[tokens:].any()
    assert not routed(router, torch.randn(40, 8), mask_T & False).mask_TE.any()


# Expert threshold.


def threshold_router(case: Any) -> ExpertThresholdRouter:
    weight_ED = torch.tensor(case["weight_ED"])
    tokens = len(case["steps"][0]["micro_batches"][0]["x_TD"])
    router = ExpertThresholdRouter(
        weight_ED.shape[1],
        case["num_experts"],
        target_k=case["tokens_per_expert"] * case["num_experts"] / tokens,
        ema=case["ema_alpha"],
        warm_up=case["warmup_steps_expert_choice"],
        slack=None if case["capacity_factor"] < 0 else case["capacity_factor"],
    )
    router.weight.data.copy_(weight_ED)
    return router


@pytest.mark.parametrize("case", cases("expert_threshold"), ids=lambda case: case["name"])
def test_expert_threshold_is_the_authors(case: Any) -> None:
    router = threshold_router(case)
    for number, expected in enumerate(case["steps"]):
        close(router.cutoff_E, expected["cutoff_used_E"])
        assert bool(router.warming) == (expected["policy"] == "topk")
        micro_batches = expected["micro_batches"]
        routings = step(router, number, *(torch.tensor(each["x_TD"]) for each in micro_batches))
        for routing, each in zip(routings, micro_batches, strict=True):
            assert routing.mask_TE.int().tolist() == each["mask_TE"]
            close(routing.weights_TE, each["weights_TE"])
            assert routing.observed is not None
            close(routing.observed, [*each["batch_cutoff_E"], 1.0])
            assert routing.mask_TE.sum(1).float().mean().item() == pytest.approx(each["mean_k"])
        close(router.raw_E, expected["ema_raw_after_E"])
        close(router.cutoff_E, expected["cutoff_after_E"])
    routing = routed(router.eval(), torch.tensor(case["eval"]["x_TD"]))
    assert routing.mask_TE.int().tolist() == case["eval"]["mask_TE"]
    close(routing.weights_TE, case["eval"]["weights_TE"])


def stream(number: int, tokens: int = 400) -> Tensor:
    own = torch.Generator().manual_seed(number)
    return 0.3 + torch.randn(tokens, 8, generator=own)


def trained(steps: int = 40, **options: Any) -> ExpertThresholdRouter:
    torch.manual_seed(0)
    router = ExpertThresholdRouter(8, 6, **{"ema": 0.9, "warm_up": 5, **options})
    router.weight.data.normal_()
    for number in range(steps):
        step(router, number, stream(number))
    return router


@pytest.mark.parametrize("target_k", [0.4, 2.0, 6.0])
def test_mean_k_is_the_target_and_loads_are_level(target_k: float) -> None:
    router = trained(target_k=target_k).eval()
    load_E = routed(router, stream(1000, 20_000)).mask_TE.float().mean(0)
    assert load_E.sum().item() == pytest.approx(target_k, rel=0.05)
    assert load_E.std() / load_E.mean() < 0.1


def test_evaluation_does_not_depend_on_the_batch() -> None:
    router, x_TD = trained().eval(), stream(1000, 64)
    together = routed(router, x_TD)
    alone = [routed(router, row_D[None]) for row_D in x_TD]
    assert torch.equal(together.mask_TE, torch.cat([each.mask_TE for each in alone]))
    assert together.observed is None


def test_warm_up_in_steps_or_as_a_share() -> None:
    for warm_up, last in ((3, 2), (0.05, 4)):
        router = ExpertThresholdRouter(8, 4, target_k=1.0, warm_up=warm_up)
        for number in range(7):
            assert bool(router.warming) == (number <= last)
            load_E = step(router, number, stream(number, 40))[0].mask_TE.sum(0)
            if number <= last:
                assert load_E.tolist() == [10] * 4
    assert not ExpertThresholdRouter(8, 4, warm_up=0).warming


@pytest.mark.parametrize(
    ("offset", "slack", "expected"), [(5.0, 0.2, 16), (-5.0, 0.2, 24), (-5.0, 0.0, 20)]
)
def test_bounds_of_a_load(offset: float, slack: float, expected: int) -> None:
    """Cuts that no token reaches, or all: an expert's share of 80 tokens is 20."""
    router = ExpertThresholdRouter(8, 4, target_k=1.0, warm_up=0, slack=slack)
    router.cutoff_E.fill_(offset)
    routing = routed(router, stream(0, 80))
    assert routing.mask_TE.sum(0).tolist() == [expected] * 4
    lowest_E = routing.scores_TE.masked_fill(~routing.mask_TE, torch.inf).amin(0)
    highest_E = routing.scores_TE.masked_fill(routing.mask_TE, -torch.inf).amax(0)
    assert (lowest_E >= highest_E).all()
    assert routed(router.eval(), stream(0, 80)).mask_TE.any() == (offset < 0)


def test_batches_of_padding_alone_are_no_batches() -> None:
    """On one rank of several, say: the mean of the cuts is over those that have a token."""
    router = trained(10)
    x_TD = stream(0)
    empty = routed(router, x_TD, torch.zeros(len(x_TD), dtype=torch.bool))
    assert empty.observed is not None and not empty.observed.any()
    before = router.cutoff_E.clone()
    none = StepTotals(*torch.zeros(2, 6), empty.observed.double(), torch.tensor(1), 11, 100)
    router.update(none, [none])
    assert torch.equal(router.cutoff_E, before) and router.updates == 10


def test_the_start_of_the_average_leaves_no_bias() -> None:
    """At ema = 0.9999 the average of equal cuts is that cut, from the first step."""
    router = ExpertThresholdRouter(8, 4, target_k=1.0, ema=0.9999)
    for number in range(3):
        (routing,) = step(router, number, stream(0))
        assert routing.observed is not None
        torch.testing.assert_close(router.cutoff_E, routing.observed[:-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [ExpertChoiceRouter, ExpertThresholdRouter])
@pytest.mark.parametrize("target_k", [0.0, 5.0])
def test_impossible_targets_are_refused(make: Any, target_k: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0, up to the number of experts, 4"):
        make(8, 4, target_k=target_k)

"""Prefix routers against golden values, of the authors' code where there is some; by property."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe.layers import PrefixRouter
from dynmoe.layers.routers import Routing, StepTotals

GOLDEN = Path(__file__).parent / "golden"


def cases(name: str, *keys: str) -> list[Any]:
    """The cases that have ``keys``; each file says in words how it was made."""
    found: list[Any] = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return [case for case in found if all(key in case for key in keys)]


def named(case: Any) -> str:
    return str(case["name"])


def close(found: Tensor | None, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=atol, rtol=1e-5)


def router_of(rows: Any, **options: Any) -> PrefixRouter:
    rows_SD = torch.tensor(rows)
    made = PrefixRouter(rows_SD.shape[1], len(rows_SD), **options)
    for row, value_D in zip(made.rows, rows_SD, strict=True):
        row.data.copy_(value_D)
    return made


def routed(router: PrefixRouter, x_TD: Tensor, mask_T: Tensor | None = None) -> Routing:
    routing: Routing = router(x_TD, range(router.num_slots), mask_T)
    return routing


def totals(*routings: Routing) -> StepTotals:
    """One layer's sums over micro-batches."""
    masks_TE = torch.cat([routing.mask_TE for routing in routings])
    return StepTotals(
        load_S=masks_TE.sum(0).double(),
        k_hist=torch.bincount(masks_TE.sum(1), minlength=masks_TE.shape[1] + 1).double(),
        observed=torch.zeros(0),
        calls=torch.tensor(len(routings)),
        step=1,
        num_steps=100,
    )


@torch.no_grad()
def move(router: PrefixRouter, x_TD: Tensor) -> float:
    """One step; the mean k that it had."""
    own = totals(routed(router, x_TD))
    router.update(own, [own])
    return own.mean_k.item()


def row_grads(router: PrefixRouter) -> Tensor:
    return torch.stack([row.grad for row in router.rows if row.grad is not None])


@pytest.mark.parametrize("case", cases("topp"), ids=named)
def test_top_p_is_the_authors(case: Any) -> None:
    x_TD = torch.tensor(case["x_TD"])
    for renorm, key in (("none", "weights_raw_TE"), ("chosen", "weights_renormalised_TE")):
        router = router_of(case["weight_ED"], top_p=case["top_p"], renorm=renorm)
        routing = routed(router, x_TD)
        assert routing.mask_TE.int().tolist() == case["mask_TE"]
        assert routing.mask_TE.sum(1).tolist() == case["k_T"]
        close(routing.weights_TE, case[key])
        close(routing.scores_TE, case["probs_TE"])
    for loss in ("balance", "entropy"):
        weights = {"balance_weight": 0.0, "entropy_weight": 0.0, f"{loss}_weight": 1.0}
        router = router_of(case["weight_ED"], top_p=case["top_p"], **weights)
        aux = routed(router, x_TD).aux
        assert aux.item() == pytest.approx(case[f"{loss}_loss_blockffn"], abs=1e-5)
        aux.backward()
        close(row_grads(router), case[f"{loss}_loss_grad_weight_ED"], atol=1e-5)


@pytest.mark.parametrize("case", cases("xmoe"), ids=named)
def test_xmoe_is_the_authors(case: Any) -> None:
    """Logits are given: tokens are unit vectors over a gate that is the identity."""
    logits_TE = torch.tensor(case["logits_TE"], requires_grad=True)
    eye = torch.eye(logits_TE.shape[1]).tolist()
    router = router_of(
        eye,
        top_p=case["threshold"],
        boundary="below",
        balance="first",
        balance_weight=1.0,
        entropy_weight=0.0,
    )
    routing = routed(router, logits_TE)
    assert routing.mask_TE.int().tolist() == case["wanted_mask_TE"]
    close(routing.weights_TE, case["weights_TE"])
    assert routing.aux.item() == pytest.approx(case["aux"], abs=1e-5)
    routing.aux.backward()
    close(logits_TE.grad, case["aux_grad_logits_TE"])


@pytest.mark.parametrize("case", cases("mass", "k_T"), ids=named)
def test_the_gate_of_mass_is_the_authors(case: Any) -> None:
    router = router_of(case["weight_SD"], top_p=case["threshold"], boundary="below", renorm="tutel")
    routing = router(torch.tensor(case["x_TD"]), range(case["num_experts"]))
    weights_TS = torch.tensor(case["weights_TS"])
    assert not weights_TS[:, case["num_experts"] :].any()
    close(routing.weights_TE, weights_TS[:, : case["num_experts"]].tolist(), atol=1e-5)
    assert routing.mask_TE.sum(1).tolist() == case["k_T"]


@pytest.mark.parametrize("case", cases("dtopp"), ids=named)
def test_dtopp_follows_its_equations(case: Any) -> None:
    """Step by step; where the file keeps no tokens, k is what it says."""
    router = router_of(
        case["weight_ED"],
        top_p=case["p_init"],
        renorm="chosen",
        target_k=case["target_k"],
        kp=case["kp"],
        ki=case["ki"],
        normalise_logits=case["normalise_logits"],
    )
    if router.logit_scale is not None:
        router.logit_scale.data.fill_(case["theta"])
    weight_ED = torch.tensor(case["weight_ED"])
    for number, step in enumerate(case["steps"]):
        assert router.p.item() == pytest.approx(step["p"], abs=1e-5)
        load_S = torch.tensor([step["mean_k"] * 16] + [0.0] * (len(weight_ED) - 1))
        own = StepTotals(
            load_S, torch.tensor([0.0, 16.0]), torch.zeros(0), torch.tensor(1), number, 8
        )
        if "x_TD" in step:
            for row, value_D in zip(router.rows, weight_ED * (1 + 0.2 * number), strict=True):
                row.data.copy_(value_D)
            routing = routed(router, torch.tensor(step["x_TD"]))
            assert routing.mask_TE.int().tolist() == step["mask_TE"]
            close(routing.weights_TE, step["weights_TE"], atol=1e-5)
            own = totals(routing)
        router.update(own, [own])
        assert router.integral.item() == pytest.approx(step["integral"], abs=1e-5)
        assert router.p.item() == pytest.approx(step["p_next"], abs=1e-5)


@pytest.mark.parametrize("boundary", ["below", "up_to"])
def test_a_prefix_of_the_order_that_grows_with_the_share(boundary: Any) -> None:
    torch.manual_seed(0)
    rows, x_TD = torch.randn(6, 8).tolist(), torch.randn(200, 8)
    before = torch.zeros(200, 6, dtype=torch.bool)
    for top_p in (0.0, 0.2, 0.5, 0.9, 1.0):
        router = router_of(rows, top_p=top_p, boundary=boundary)
        routing = routed(router, x_TD)
        lowest_T = routing.scores_TE.masked_fill(~routing.mask_TE, 2).amin(1)
        highest_T = routing.scores_TE.masked_fill(routing.mask_TE, -1).amax(1)
        assert (lowest_T >= highest_T).all() and not (before & ~routing.mask_TE).any()
        before = routing.mask_TE
        if top_p == 0:
            assert (routing.mask_TE.sum(1) == 1).all()
    assert before.all()
    sharp = router_of((10 * torch.tensor(rows)).tolist(), top_p=0.5, boundary=boundary)
    flat = router_of(rows, top_p=0.5, boundary=boundary)
    k_T = [routed(router, x_TD).mask_TE.sum(1) for router in (sharp, flat)]
    assert (k_T[0] <= k_T[1]).all() and k_T[0].sum() < k_T[1].sum()


def test_the_end_of_a_flat_prefix_is_reached_at_a_share_of_one() -> None:
    """The sum of rounded probabilities is 1 before the last expert."""
    router = router_of([[4.0], [3.0], [-90.0]], top_p=1.0, boundary="below")
    assert routed(router, torch.ones(1, 1)).mask_TE.all()


def test_boundaries_differ_where_the_sum_is_the_share() -> None:
    rows = [[1.0, 0.0], [1.0, 0.0], [-200.0, 0.0]]  # probabilities 1/2, 1/2, 0
    for boundary, k in (("below", 1), ("up_to", 2)):
        router = router_of(rows, top_p=0.5, boundary=boundary)
        assert routed(router, torch.tensor([[1.0, 0.0]])).mask_TE.sum().item() == k


def test_one_batch_with_raw_weights_and_one_with_shares() -> None:
    """``tutel``: padding with k > 1 is no token of the batch."""
    router = router_of([[3.0, 0.0], [0.0, 3.0]], top_p=0.6, boundary="below", renorm="tutel")
    sure, torn = [2.0, 0.0], [1.0, 1.0]
    alone = routed(router, torch.tensor([sure]))
    assert alone.weights_TE[0, 0].item() == pytest.approx(alone.scores_TE[0, 0].item()) != 1.0
    mixed = routed(router, torch.tensor([sure, torn]))
    assert mixed.weights_TE.sum(1).tolist() == pytest.approx([1.0, 1.0])
    padded = routed(router, torch.tensor([sure, torn]), torch.tensor([True, False]))
    torch.testing.assert_close(padded.weights_TE[:1], alone.weights_TE)


def stream(number: int) -> Tensor:
    own = torch.Generator().manual_seed(number)
    return torch.randn(256, 8, generator=own)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_router_that_sharpens_is_held_at_its_target(normalise: bool) -> None:
    torch.manual_seed(0)
    router = PrefixRouter(8, 8, renorm="chosen", target_k=2.0, normalise_logits=normalise)
    rows_SD = 0.5 * torch.randn(8, 8)
    mean_k = []
    for step in range(200):
        for row, value_D in zip(router.rows, rows_SD, strict=True):
            row.data.copy_(value_D * (1 + 0.003 * step))
        mean_k.append(move(router, stream(step)))
    assert abs(mean_k[0] - 2.0) > 0.1
    assert all(abs(sum(mean_k[at : at + 20]) / 20 - 2.0) < 0.1 for at in range(100, 200, 20))


def test_the_controller_does_not_wind_up() -> None:
    """A target that cannot be had keeps p at its end; one that can moves it away at once."""
    one, four = (totals(routed(flat(top_p=p), torch.ones(16, 1))) for p in (0.0, 1.0))
    for start, beyond, back in ((4.0, one, four), (1.0, four, one)):
        router = flat(target_k=start)
        for _ in range(100):
            router.update(beyond, [beyond])
        assert router.p == (start > 1) and abs(router.integral) < 6
        router.target_k = 2.0
        router.update(back, [back])
        assert 0 < router.p < 1


def flat(**options: Any) -> PrefixRouter:
    return router_of([[0.0]] * 4, **options)


def test_one_share_for_all_layers_or_one_for_each() -> None:
    few, many = (totals(routed(flat(top_p=p), torch.ones(16, 1))) for p in (0.0, 1.0))
    for per_layer, expected in ((False, 2.5), (True, 1.0)):
        router = PrefixRouter(1, 4, top_p=0.5, target_k=2.0, per_layer=per_layer)
        router.update(few, [few, many])
        error = (2.0 - expected) / 4
        assert router.p.item() == pytest.approx(0.5 + 0.7 * error)
    before = router.p.clone()
    empty = few._replace(load_S=0 * few.load_S, k_hist=0 * few.k_hist)
    router.update(empty, [empty, many])  # a layer that did not run
    assert torch.equal(router.p, before)


def test_new_rows_have_the_length_of_the_others() -> None:
    router = router_of([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])
    router.point(1, torch.tensor([0.0, -1e30]))
    assert router.rows[1].tolist() == pytest.approx([0.0, -5.0])
    router.keep([0, 1])
    assert len(router.rows) == 2


def test_a_target_out_of_reach_is_refused() -> None:
    for target_k in (0.5, 5.0):
        with pytest.raises(ValueError, match=r"target_k is .*: expected 1 to"):
            PrefixRouter(8, 4, target_k=target_k)

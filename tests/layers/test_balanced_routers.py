"""Loss-free bias and null experts against golden values of the authors' code, and by property."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe.layers import (
    BiasedTopKRouter,
    MoELayer,
    NullExpertRouter,
    StepTotals,
    TopKRouter,
    record_routing,
)
from dynmoe.metrics.routing import RoutingMeter

GOLDEN = Path(__file__).parent / "golden"


def cases(name: str) -> list[Any]:
    """Outputs of the authors' functions; each file says in words how it was made."""
    found: list[Any] = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return found


def totals(routing: Any, step: int = 1, num_steps: float = 10, calls: int = 1) -> StepTotals:
    k_T = routing.mask_TE.sum(1)
    return StepTotals(
        load_S=routing.mask_TE.sum(0).double(),
        k_hist=torch.bincount(k_T, minlength=routing.mask_TE.shape[1] + 1).double(),
        observed=torch.zeros(0) if routing.observed is None else routing.observed.double(),
        calls=torch.tensor(calls),
        step=step,
        num_steps=num_steps,
    )


def routed(router: Any, x_TD: Tensor, mask_T: Tensor | None = None) -> Any:
    return router(x_TD, range(router.num_slots), mask_T)


@torch.no_grad()
def move(router: Any, x_TD: Tensor, step: int = 1) -> Any:
    routing = routed(router, x_TD)
    own = totals(routing, step)
    router.update(own, [own])
    return routing


# Loss-free bias.


@pytest.mark.parametrize("case", cases("lossfree"), ids=lambda case: case["name"])
@pytest.mark.parametrize(("rule", "prefix"), [("sign", ""), ("centred_sign", "torchtitan_")])
def test_loss_free_bias_is_the_authors(case: Any, rule: str, prefix: str) -> None:
    weight_ED = torch.tensor(case["weight_ED"])
    router = BiasedTopKRouter(
        weight_ED.shape[1],
        len(weight_ED),
        top_k=case["top_k"],
        score=case["score"],
        renormalise=case["renormalise"],
        route_scale=case["route_scale"],
        bias_update=rule,  # type: ignore[arg-type]
        bias_rate=case["update_rate"],
        num_groups=case["num_groups"],
        limited_groups=case["limited_groups"],
    )
    router.weight.data.copy_(weight_ED)
    for step in case["steps"]:
        torch.testing.assert_close(
            router.bias_E, torch.tensor(step[f"{prefix}bias_before_E"]), atol=1e-6, rtol=0
        )
        routing = move(router, torch.tensor(step["x_TD"]))
        assert routing.mask_TE.sum(0).tolist() == step[f"{prefix}load_E"]
        torch.testing.assert_close(
            router.bias_E, torch.tensor(step[f"{prefix}bias_after_E"]), atol=1e-6, rtol=0
        )
        if not prefix:
            assert routing.mask_TE.int().tolist() == step["mask_TE"]
            for ours, key in ((routing.weights_TE, "weights_TE"), (routing.scores_TE, "scores_TE")):
                if key in step:  # scores of the first step alone
                    torch.testing.assert_close(ours, torch.tensor(step[key]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 3])
def test_quantile_bias_evens_out_a_skewed_load(top_k: int) -> None:
    """The load of a batch that one expert attracts: even after a few steps on other batches."""
    torch.manual_seed(0)
    router = BiasedTopKRouter(16, 8, top_k=top_k, bias_update="quantile", bias_rate=0.5)
    router.weight.data = 0.3 * torch.randn(8, 16)
    router.weight.data[0] += 0.4
    for step in range(30):
        first = move(router, 0.5 + torch.randn(2000, 16), step)
        if step == 0:
            skewed_E = first.mask_TE.sum(0)
    even = 2000 * top_k / 8
    assert skewed_E.max() > 1.5 * even
    load_E = routed(router, 0.5 + torch.randn(20_000, 16)).mask_TE.sum(0) / 10
    assert ((load_E - even).abs() < 0.1 * even).all()


def test_bias_chooses_and_does_not_weigh() -> None:
    router = BiasedTopKRouter(4, 3, top_k=1, renormalise=False)
    router.weight.data.zero_()
    router.bias_E[2] = 0.1
    routing = routed(router, torch.ones(2, 4))
    assert routing.mask_TE.tolist() == [[False, False, True]] * 2
    assert routing.weights_TE[:, 2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k is 5"),
        ({"num_groups": 3}, "num_groups is 3: expected a divisor of 4"),
        ({"limited_groups": 1}, "needs num_groups"),
        ({"num_groups": 2, "limited_groups": 3}, "limited_groups is 3: expected 1 to"),
        ({"num_groups": 2, "limited_groups": 1, "top_k": 3}, "Raise limited_groups"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiasedTopKRouter(8, 4, **options)


# Null experts.


def null_router(case: Any, **options: Any) -> NullExpertRouter:
    true_ED, null_ND = torch.tensor(case["gate_true_ED"]), torch.tensor(case["gate_null_ED"])
    router = NullExpertRouter(
        true_ED.shape[1], len(true_ED), len(null_ND), case["top_k"], **options
    )
    router.weight.data.copy_(true_ED)
    router.null_weight.data.copy_(null_ND)
    return router


@pytest.mark.parametrize("case", cases("adamoe")[:3], ids=lambda case: case["name"])
@pytest.mark.parametrize(
    ("balance", "key"), [("loss", "loss_paper"), ("plain", "loss_exp2_as_coded")]
)
def test_adamoe_is_the_authors(case: Any, balance: Any, key: str) -> None:
    router = null_router(case, balance=balance)
    x_TD = torch.tensor(case["x_TD"])
    routing = routed(router, x_TD)
    assert routing.mask_TE.int().tolist() == case["mask_true_TE"]
    assert routing.free_T.tolist() == case["num_null_T"]
    assert routing.unserved_T.int().tolist() == case["all_null_T"]
    weights_TE = torch.tensor(case["weights_true_TE"])
    torch.testing.assert_close(routing.weights_TE, weights_TE, atol=1e-6, rtol=0)
    assert routing.aux.item() == pytest.approx(case[key], abs=1e-5)
    routing.aux.backward()
    grad_TC = torch.tensor(case[f"{key}_grad_logits_TE"])  # of the logits: rows times x
    found_CD = torch.cat([router.weight.grad, router.null_weight.grad])  # type: ignore[list-item]
    torch.testing.assert_close(found_CD, grad_TC.t() @ x_TD, atol=1e-5, rtol=1e-4)


def test_without_null_experts_it_is_top_k() -> None:
    torch.manual_seed(0)
    router, plain = NullExpertRouter(8, 4, num_null=0, top_k=2), TopKRouter(8, 4, top_k=2)
    plain.weight = router.weight
    x_TD = torch.randn(50, 8)
    ours, theirs = routed(router, x_TD), routed(plain, x_TD)
    assert torch.equal(ours.mask_TE, theirs.mask_TE) and not ours.free_T.any()
    torch.testing.assert_close(ours.weights_TE, theirs.weights_TE)


def test_random_logits_choose_true_experts_by_their_share() -> None:
    router = NullExpertRouter(32, 8, num_null=8, top_k=4)
    router.weight.data.normal_(), router.null_weight.data.normal_()
    k_T = routed(router, torch.randn(20_000, 32)).mask_TE.sum(1).float()
    assert k_T.mean().item() == pytest.approx(4 * 8 / 16, rel=0.15)


def test_the_task_moves_null_rows_only_where_they_have_a_weight() -> None:
    x_TD = torch.randn(60, 8)
    for renorm, moves in (("true_only", False), ("all", True)):
        torch.manual_seed(0)
        router = NullExpertRouter(8, 4, 4, top_k=3, renorm=renorm)  # type: ignore[arg-type]
        routing = routed(router, x_TD)
        (routing.weights_TE * torch.randn(60, 4)).sum().backward()
        assert router.null_weight.grad is not None
        assert (router.null_weight.grad.abs().max() > 1e-4) == moves


def test_identity_experts_return_their_input() -> None:
    """All weights of a token over FFNs that return their input as well: it comes out whole."""
    make = lambda dim, slots: NullExpertRouter(  # noqa: E731
        dim, slots, num_null=4, top_k=3, renorm="all", null_output="identity"
    )
    layer = MoELayer(torch.nn.Identity(), 8, make, 4)
    x_TD = torch.randn(40, 8)
    mask_T = torch.arange(40) < 30
    meter = RoutingMeter(layer)
    with record_routing(layer) as tape:
        y_TD = layer(x_TD, mask_T)
    meter.update("train", tape)
    (line,) = meter.records(["train"], reduce=lambda t: t)
    assert line["mean_k"] + line["mean_free"] == pytest.approx(3) and line["tokens"] == 30
    torch.testing.assert_close(y_TD[:30], x_TD[:30])
    assert not y_TD[30:].any()
    y_TD.sum().backward()
    assert layer.router.null_weight.grad is not None


@pytest.mark.parametrize("target_k", [0.7, 2.0])
def test_biases_hold_the_mean_number_of_true_experts(target_k: float) -> None:
    torch.manual_seed(0)
    router = NullExpertRouter(
        16, 8, 8, 3, renorm="none", null_output="identity", balance="bias", bias_rate=0.1,
        target_k=target_k,
    )  # fmt: skip
    router.weight.data.normal_(std=0.3), router.null_weight.data.normal_(std=0.3)
    x_TD = torch.randn(1000, 16)
    for step in range(300):
        routing = move(router, x_TD, step)
    assert routing.mask_TE.sum(1).float().mean().item() == pytest.approx(target_k, rel=0.02)


def test_loss_weight_falls_along_the_training() -> None:
    torch.manual_seed(0)
    router = NullExpertRouter(8, 4, 4, top_k=2, aux_end=0.1)
    x_TD = torch.randn(30, 8)
    start = routed(router, x_TD).aux.item()
    move(router, x_TD, step=5)
    assert routed(router, x_TD).aux.item() == pytest.approx(0.55 * start)
    move(router, x_TD, step=12)
    assert routed(router, x_TD).aux.item() == pytest.approx(0.1 * start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "number of true and null experts, 4 \\+ 4"),
        ({"null_output": "identity"}, "Set renorm=none"),
        ({"target_k": 1.0}, "needs balance=bias"),
        ({"balance": "bias"}, "target_k is None"),
        ({"balance": "bias", "target_k": 5.0}, "target_k is 5.0: expected more than 0, up to 3"),
        ({"num_null": -1}, "num_null is -1"),
    ],
)
def test_impossible_null_experts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NullExpertRouter(8, 4, **{"num_null": 4, **options})

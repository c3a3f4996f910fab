"""Top-any gating under a budget: mean k is the target, whatever the stream does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.adaptation import Adaptation, RouterUpdates, Schedule
from dynmoe.layers import BudgetTopAnyRouter, MoELayer, TopAnyRouter, record_routing
from dynmoe.metrics.routing import RoutingMeter

DIM, SLOTS = 16, 8
LIVE = tuple(range(SLOTS))


def layer(slots: int = SLOTS, **options: Any) -> MoELayer:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
    made = MoELayer(mlp, DIM, partial(BudgetTopAnyRouter, **options), SLOTS, slots, init="fresh")
    for slot, threshold in enumerate(made.router.thresholds):
        threshold.data.fill_(0.1 * slot - 0.3)  # experts of unlike popularity
    return made


def stream(step: int, tokens: int = 512) -> Tensor:
    """Fixed: batches around one mean."""
    own = torch.Generator().manual_seed(step)
    return 0.2 + torch.randn(tokens, DIM, generator=own)


def train(
    moe: MoELayer, steps: int, batch: Callable[[int], Tensor] = stream, lr: float = 1e-3
) -> list[float]:
    """Mean k of each step."""
    optimizer = torch.optim.AdamW(moe.parameters(), lr=lr)
    updates = RouterUpdates(moe, optimizer)
    found = []
    for step in range(steps):
        with record_routing(moe) as tape:
            loss = (moe(batch(step)) - batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates.step(loss)
        stats = tape[""][0].stats
        found.append((stats.load_E.sum() / stats.k_hist.sum()).item())
    updates.close()
    return found


@pytest.mark.parametrize("unserved", ["best", "nothing"])
@pytest.mark.parametrize("target_k", [1.2, 2.0, 5.5])
def test_target_is_reached_on_a_fixed_stream(target_k: float, unserved: str) -> None:
    moe = layer(target_k=target_k, unserved=unserved)
    mean_k = train(moe, 60)
    assert abs(mean_k[0] / target_k - 1) > 0.1
    assert sum(mean_k[-20:]) / 20 == pytest.approx(target_k, rel=0.02)
    assert moe.router.shift.item() != 0 and moe.router.shift.grad is None
    # Who is popular stays popular: the shift is one for all.
    assert moe.router.record(LIVE)["thresholds"] == pytest.approx(
        [t.item() + moe.router.shift.item() for t in moe.router.thresholds]
    )


def test_fewer_than_one_expert_per_token() -> None:
    mean_k = train(layer(target_k=0.4, unserved="nothing"), 60)
    assert sum(mean_k[-20:]) / 20 == pytest.approx(0.4, rel=0.02)


def test_target_is_held_under_drift() -> None:
    """Tokens turn towards one expert, and the learning rate is high."""
    moe = layer(target_k=2.0)
    towards_D = 3 * moe.router.directions[0].detach().clone()
    mean_k = train(moe, 120, lambda step: stream(step) + max(0, step - 40) / 80 * towards_D, 1e-2)
    late = [sum(mean_k[at : at + 20]) / 20 for at in range(40, 120, 20)]
    assert late == pytest.approx([2.0] * 4, rel=0.05)
    assert sum(mean_k[-10:]) / 10 == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("target_k", [1.0, 8.0])
def test_a_target_at_its_end_does_not_run_away(target_k: float) -> None:
    """One expert for each token, or all: no way is left, and the shift stays where it is."""
    moe = layer(target_k=target_k)
    assert train(moe, 15)[-1] == target_k
    shift = moe.router.shift.clone()
    train(moe, 5)
    assert torch.equal(moe.router.shift, shift)


def test_evaluation_spends_what_training_does() -> None:
    moe = layer(target_k=1.5)
    train(moe, 40)
    x_TD = stream(1000, 4000)
    k = {mode: moe.router.train(mode)(x_TD, LIVE).mask_TE.sum(1) for mode in (True, False)}
    assert torch.equal(k[True], k[False]) and k[True].min() == 1
    assert k[True].float().mean().item() == pytest.approx(1.5, rel=0.03)


def test_a_shift_of_zero_is_top_any() -> None:
    """At evaluation in all, in training but for unserved tokens, gradients included."""
    torch.manual_seed(0)
    plain = TopAnyRouter(DIM, SLOTS)
    for options in ({}, {"unserved": "nothing"}):
        router = BudgetTopAnyRouter(DIM, SLOTS, **options)
        router.load_state_dict(
            plain.state_dict() | {"shift": torch.zeros(()), "trend": torch.zeros(())}
        )
        x_TD, c_TE = stream(0), torch.randn(512, SLOTS)
        for training in (False, True):
            theirs = plain.train(training)(x_TD, LIVE)
            ours = router.train(training)(x_TD, LIVE)
            same_T = ~theirs.unserved_T | (options != {}) | (not training)
            assert torch.equal(ours.mask_TE[same_T], theirs.mask_TE[same_T])
            torch.testing.assert_close(ours.weights_TE[same_T], theirs.weights_TE[same_T])
            torch.testing.assert_close(ours.aux, theirs.aux)
        grads = []
        for routing, module in ((ours, router), (theirs, plain)):
            module.zero_grad()
            (routing.weights_TE * c_TE)[same_T].sum().backward()
            grads.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*grads)


def test_weights_by_hand() -> None:
    x_TD = stream(0)
    for scale in ("sum", "norm"):
        router = BudgetTopAnyRouter(DIM, SLOTS, weights="softmax", temperature=0.2, scale=scale)
        routing = router(x_TD, LIVE)
        for t in range(20):
            chosen = routing.mask_TE[t]
            share_E = (routing.scores_TE[t, chosen] / 0.2).softmax(0)
            if scale == "norm":
                share_E = share_E / share_E.square().sum().sqrt() / 2**0.5
            torch.testing.assert_close(routing.weights_TE[t, chosen], share_E)
    learned = BudgetTopAnyRouter(
        DIM, SLOTS, weights="softmax", temperature=0.2, learn_temperature=True, scale=scale
    )
    learned.load_state_dict(router.state_dict(), strict=False)
    found = learned(x_TD, LIVE).weights_TE
    torch.testing.assert_close(found, router(x_TD, LIVE).weights_TE)
    (found * torch.randn(512, len(LIVE))).sum().backward()
    assert isinstance(learned.temperature, nn.Parameter) and learned.temperature.grad.abs() > 0
    with pytest.raises(ValueError, match="needs weights=softmax"):
        BudgetTopAnyRouter(DIM, SLOTS, learn_temperature=True)
    router = BudgetTopAnyRouter(DIM, SLOTS, target_k=3.0, scale="norm")
    weights_TE = router(x_TD, LIVE).weights_TE
    torch.testing.assert_close(weights_TE.square().sum(1), torch.full((512,), 1 / 3))


@pytest.mark.parametrize(
    ("gate_grad", "by_scores"), [("chosen", False), ("chosen", True), ("none", True)]
)
def test_gradient_of_the_gate(gate_grad: str, by_scores: bool) -> None:
    router = BudgetTopAnyRouter(
        DIM,
        SLOTS,
        gate_grad=gate_grad,  # type: ignore[arg-type]
        weights="softmax" if by_scores else "mean",
    )
    (router(stream(0), LIVE).weights_TE * torch.randn(512, SLOTS)).sum().backward()
    assert all((t.grad is not None) == (gate_grad == "chosen") for t in router.thresholds)
    assert all(d.grad is not None and d.grad.any() for d in router.directions)


@pytest.mark.parametrize("missing", ["before", "after"])
def test_experts_are_added_for_tokens_that_no_threshold_admits(missing: str) -> None:
    """Half of the tokens point away from all experts; the budget turns others away too."""
    moe = layer(SLOTS + 2, target_k=1.0, unserved="nothing", missing=missing)
    away_D = -sum(d.detach() for d in moe.router.directions[:SLOTS])
    moe.router.shift.fill_(0.6)
    x_TD = torch.cat([stream(0, 20), away_D.expand(20, DIM)])
    distance_TE = moe.router(x_TD, LIVE).scores_TE - torch.stack([*moe.router.thresholds])[:SLOTS]
    expected_T = (distance_TE <= (0.6 if missing == "after" else 0.0)).all(1)
    assert expected_T[20:].all() and expected_T[:20].any() == (missing == "after")
    assert torch.equal(moe.router(x_TD, LIVE).unserved_T, expected_T)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    adaptation = Adaptation(moe, optimizer, Schedule(0, 1, 1))
    before = moe.router.shift.clone()
    moe(x_TD).sum().backward()
    optimizer.step()
    (event,) = adaptation.step()
    assert not torch.equal(moe.router.shift, before)
    unserved_D = x_TD[expected_T].sum(0)
    torch.testing.assert_close(
        moe.router.directions[event["added"]].detach(), nn.functional.normalize(unserved_D, dim=0)
    )


def test_recorded_by_layer() -> None:
    model = nn.Sequential(layer(target_k=1.5), layer(target_k=3.0))
    meter = RoutingMeter(model)
    with record_routing(model) as tape:
        model(stream(0))
    meter.update("train", tape)
    lines = meter.records(["train"], reduce=lambda t: t)
    assert [line["target_k"] for line in lines] == [1.5, 3.0]
    assert all(line["shift"] == 0 and len(line["thresholds"]) == SLOTS for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_k": 0.5}, "less than 1 needs unserved=nothing"),
        ({"target_k": 9.0}, "to the number of slots, 8"),
        ({"target_k": 0.0, "unserved": "nothing"}, "expected more than 0"),
        ({"target_k": [1.0, 2.0]}, "add_moe_layers"),
        ({"gate_grad": "none"}, "Set weights=softmax"),
        ({"gate_grad": "all", "weights": "softmax"}, "Set gate_grad=chosen"),
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetTopAnyRouter(DIM, SLOTS, **options)

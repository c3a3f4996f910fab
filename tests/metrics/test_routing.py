"""Routing statistics add up over calls, sources and changes of the pool."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynmoe.layers import MoELayer, TopAnyRouter, TopKRouter, mask_padding, record_routing
from dynmoe.metrics.routing import RoutingMeter

DIM = 6


def make_model(router: type[nn.Module] = TopAnyRouter, experts: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
    slots = 4 if router is TopAnyRouter else experts
    return nn.Sequential(MoELayer(mlp, DIM, router, experts, slots))


def feed(model: nn.Sequential, meter: RoutingMeter, source: str, tokens: int) -> torch.Tensor:
    x_TD = torch.randn(tokens, DIM)
    with record_routing(model) as tape:
        model(x_TD)
    meter.update(source, tape)
    return model[0].router(x_TD, model[0].live).mask_TE


def test_sums_over_calls_by_source() -> None:
    model = make_model()
    meter = RoutingMeter(model)
    masks = torch.cat([feed(model, meter, "train", 30), feed(model, meter, "train", 20)])
    other = feed(model, meter, "env0", 10)
    train, env0 = meter.records(["train", "env0"], reduce=lambda t: t)
    k = masks.sum(1)
    assert train["source"] == "train" and train["layer"] == "0" and train["slots"] == [0, 1]
    assert train["tokens"] == 50 and train["load"] == masks.sum(0).tolist()
    assert train["k_hist"] == [(k == i).sum().item() for i in range(3)]
    assert train["mean_k"] == pytest.approx(k.float().mean().item())
    assert train["unrouted"] == (k == 0).sum().item() / 50
    assert env0["tokens"] == 10 and env0["load"] == other.sum(0).tolist()
    assert train["thresholds"] == [0.0, 0.0]


def test_starts_anew_and_reports_sources_it_has_not_seen() -> None:
    model = make_model()
    meter = RoutingMeter(model)
    feed(model, meter, "train", 30)
    meter.records(["train"], reduce=lambda t: t)
    train, env5 = meter.records(["train", "env5"], reduce=lambda t: t)
    assert train["tokens"] == env5["tokens"] == 0 and env5["load"] == [0, 0]


def test_experts_may_come_and_go_within_a_stretch() -> None:
    """Loads are kept by slot: tokens before a change are not credited to another expert."""
    model = make_model()
    meter = RoutingMeter(model)
    before = feed(model, meter, "train", 40)
    model[0].remove_expert(0)
    model[0].add_expert(3, torch.ones(DIM))
    after = feed(model, meter, "train", 40)
    (train,) = meter.records(["train"], reduce=lambda t: t)
    assert train["slots"] == [1, 3] and train["tokens"] == 80
    stayed, new = before[:, 1].sum() + after[:, 0].sum(), after[:, 1].sum()
    assert train["load"] == [stayed.item(), new.item()]
    assert train["mean_k"] * 80 == pytest.approx((before.sum() + after.sum()).item())


def test_sums_over_ranks_by_the_given_function() -> None:
    model = make_model()
    meter = RoutingMeter(model)
    mask = feed(model, meter, "train", 30)
    (train,) = meter.records(["train"], reduce=lambda t: 2 * t)
    assert train["tokens"] == 60 and train["load"] == (2 * mask.sum(0)).tolist()


def test_fixed_routers_have_no_thresholds() -> None:
    model = make_model(TopKRouter, experts=3)
    meter = RoutingMeter(model)
    feed(model, meter, "train", 12)
    (train,) = meter.records(["train"], reduce=lambda t: t)
    assert train["thresholds"] is None and train["mean_k"] == 2 and train["k_hist"] == [0, 0, 12, 0]


def test_evaluations_are_broken_down_by_position_and_class() -> None:
    """Two classes, four tokens each; the third sample's class is that of the first."""
    model = make_model()
    meter = RoutingMeter(model, classes=3)
    x_BND, label_B = torch.randn(3, 4, DIM), torch.tensor([2, 0, 2])
    with record_routing(model) as tape:
        model(x_BND)
    meter.update("env1", tape, label_B)
    mask_BNE = model[0].router(x_BND.view(-1, DIM), model[0].live).mask_TE.view(3, 4, 2)
    train, env1 = meter.records(["train", "env1"], reduce=lambda t: t)
    assert env1["k_by_position"] == pytest.approx(
        mask_BNE.sum(2).float().mean(0).tolist(), abs=1e-4
    )
    assert env1["load_by_class"] == [
        mask_BNE[1].sum(0).tolist(),
        [0, 0],
        (mask_BNE[0] + mask_BNE[2].int()).sum(0).tolist(),
    ]
    assert "load_by_class" not in train


def test_positions_count_real_tokens_only() -> None:
    model = make_model(TopKRouter, experts=3)
    meter = RoutingMeter(model, classes=2)
    real_BN = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    with record_routing(model) as tape, mask_padding(model, real_BN):
        model(torch.randn(3, 4, DIM))
    meter.update("env0", tape, torch.tensor([0, 1, 1]))
    (env0,) = meter.records(["env0"], reduce=lambda t: t)
    assert env0["tokens"] == 7 and env0["mean_k"] == 2 and env0["unrouted"] == 0
    assert env0["k_by_position"] == [2, 2, 2, 2]
    assert [sum(row) for row in env0["load_by_class"]] == [8, 6]


PARTS = ("prompt", "image", "answer")


def test_parts_of_sequences_are_told_apart() -> None:
    """Two calls, as in generation: of two prompts, and of a token behind each of them."""
    model = make_model()
    meter = RoutingMeter(model, parts=PARTS)
    part_BN = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 2]])
    real_BN = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    ended_B1 = torch.tensor([[True], [False]])
    with record_routing(model) as tape:
        for x_BND, real in ((torch.randn(2, 4, DIM), real_BN), (torch.randn(2, 1, DIM), ended_B1)):
            with mask_padding(model, real):
                model(x_BND)
    meter.update("env0", tape, part_BN=[part_BN, torch.full((2, 1), 2)])
    (env0,) = meter.records(["env0"], reduce=lambda t: t)
    first, second = (call.mask for call in tape["0"])
    served = {
        "prompt": first[0, [0, 3]].sum(0) + first[1, 2],
        "image": first[0, [1, 2]].sum(0),
        "answer": first[1, 3] + second[0, 0].int(),
    }
    tokens = {"prompt": 3, "image": 2, "answer": 2}
    assert env0["tokens"] == 7
    assert env0["parts"] == {
        name: {
            "tokens": tokens[name],
            "load": served[name].tolist(),
            "mean_k": served[name].sum().item() / tokens[name],
        }
        for name in PARTS
    }
    assert sum(served.values()).tolist() == env0["load"]  # type: ignore[union-attr]


def test_parts_are_kept_by_slot_and_summed_over_ranks() -> None:
    model = make_model()
    meter = RoutingMeter(model, parts=PARTS)

    def image_of(tokens: int) -> torch.Tensor:
        x_BND = torch.randn(1, tokens, DIM)
        with record_routing(model) as tape:
            model(x_BND)
        meter.update("train", tape, part_BN=[torch.ones(1, tokens, dtype=torch.long)])
        return tape["0"][0].mask[0].sum(0)

    before = image_of(40)
    model[0].remove_expert(0)
    model[0].add_expert(3, torch.ones(DIM))
    after = image_of(30)
    (train,) = meter.records(["train"], reduce=lambda t: 2 * t)
    load = [2 * (before[1] + after[0]).item(), 2 * after[1].item()]
    assert train["slots"] == [1, 3] and train["parts"]["image"]["load"] == load
    assert train["parts"]["image"]["tokens"] == train["tokens"] == 140
    mean_k = (before.sum() + after.sum()).item() / 70  # those of the removed expert too
    assert train["parts"]["image"]["mean_k"] == train["mean_k"] == mean_k
    assert train["parts"]["answer"] == {"tokens": 0, "load": [0, 0], "mean_k": 0}
    (anew,) = meter.records(["train"], reduce=lambda t: t)
    assert {part["tokens"] for part in anew["parts"].values()} == {0}


def test_without_parts_none_are_recorded() -> None:
    model = make_model()
    meter = RoutingMeter(model)
    feed(model, meter, "train", 5)
    (train,) = meter.records(["train"], reduce=lambda t: t)
    assert "parts" not in train


def test_tokens_that_are_not_finite_count_nowhere() -> None:
    """Neither in the totals nor by position, class or part, in training and evaluation."""
    found = []
    part_BN = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    for bad in (float("nan"), float("inf"), None):
        model = make_model()
        meter = RoutingMeter(model, classes=2, parts=("image", "text"))
        x_BND = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(0))
        mask_BN = torch.ones(2, 4, dtype=torch.bool)
        if bad is None:  # as if it were padding
            mask_BN[0, 2] = False
        else:
            x_BND[0, 2, 3] = bad
        for source in ("train", "env0"):
            model.train(source == "train")
            with record_routing(model) as tape, mask_padding(model, mask_BN):
                model(x_BND)
            label_B = None if source == "train" else torch.tensor([0, 1])
            meter.update(source, tape, label_B, [part_BN])
        found.append(meter.records(["train", "env0"], reduce=lambda t: t))
    assert found[0] == found[1] == found[2]
    assert [record["tokens"] for record in found[0]] == [7, 7]
    assert [part["tokens"] for part in found[0][0]["parts"].values()] == [4, 3]


def test_no_token() -> None:
    model = make_model()
    meter = RoutingMeter(model, classes=2, parts=("image", "text"))
    with record_routing(model) as tape:
        model(torch.zeros(2, 0, DIM))
    nothing_BN = torch.zeros(2, 0, dtype=torch.long)
    meter.update("env0", tape, torch.tensor([0, 1]), [nothing_BN])
    (env0,) = meter.records(["env0"], reduce=lambda t: t)
    assert env0["tokens"] == env0["mean_k"] == 0 and env0["k_by_position"] == []
    assert env0["load_by_class"] == [[0, 0], [0, 0]]

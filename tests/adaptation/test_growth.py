"""Experts split where their gradient drifts: the authors' numbers, the decision, gradients."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.adaptation import DriftGrowth, GrowthSchedule
from dynmoe.adaptation.drift import Drift, cosine, split_gradient, standard_score
from dynmoe.errors import ConfigError
from dynmoe.layers import MoELayer, PrefixRouter, TopAnyRouter, TopKRouter
from dynmoe.layers.losses import redundancy

GOLDEN = Path(__file__).parents[1] / "layers" / "golden" / "mass.json"
CASES = {case["name"]: case for case in json.loads(GOLDEN.read_text())["cases"]}
DIM, HIDDEN, START, SLOTS = 6, 8, 2, 5
close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["drift", "no drift"])
def test_statistics_are_the_authors(name: str) -> None:
    case = CASES[name]
    drift, expected = Drift(case["warmup"], case["window"]), {}
    for step, norm in enumerate(case["grad_norms"], 1):
        drift.add(norm)
        expected[step] = {
            "step": step,
            "last_z": drift.scores[-1] if drift.scores else None,
            "num_z": len(drift.scores),
            "sum_z": sum(drift.scores),
            "p_value": drift.p_value,
            "may_test": drift.may_test,
        }
    for after in case["after_step"]:
        found = expected[after["step"]]
        assert found == pytest.approx(after, abs=1e-5), after["step"]


def test_a_split_is_the_authors_as_meant_and_as_coded() -> None:
    case = CASES["split"]
    numbers = {key: torch.tensor(v) for key, v in case.items() if isinstance(v, list)}
    source, new = case["source_expert"], case["new_expert"]
    weight, gradient = numbers["fc1_SHD"][source], numbers["fc1_grad_SHD"][source]
    close(cosine([weight], [gradient]), torch.tensor(case["cosine_weight_grad"]))
    # A matrix in two parts is one vector.
    close(cosine([*weight.split(2)], [*gradient.split(2)]), cosine([weight], [gradient]))
    for key, as_meant in (
        ("fc1", numbers["fc1_grad_new_expert_as_intended_HD"]),
        ("gate", numbers["gate_grad_new_expert_as_intended_D"]),
    ):
        shape = "SHD" if key == "fc1" else "SD"
        weight = numbers[f"{key}_{shape}"][source]
        gradient = numbers[f"{key}_grad_{shape}"][source]
        after = numbers[f"{key}_grad_after_{shape}"]
        old, copied = split_gradient(gradient, weight, "projection_full")
        close(old, after[source])
        close(copied, as_meant)
        old, copied = split_gradient(gradient, weight, "projection_both")
        close(old, after[source])
        close(copied, after[new])


def test_the_redundancy_loss_is_the_authors() -> None:
    case = CASES["split"]
    rows = torch.tensor(case["gate_after_SD"], requires_grad=True)
    first, second = torch.tensor(case["pairs"]).t()
    loss = redundancy(rows[first], rows[second])
    close(loss, torch.tensor(case["redundancy"]))
    loss.backward()
    close(rows.grad, torch.tensor(case["redundancy_grad_gate_SD"]))


def test_equal_norms_are_no_drift() -> None:
    """An expert without tokens has the norm 0 in every step; the code divides by 0 there."""
    assert standard_score([0.0] * 5) == standard_score([0.1] * 7) == 0.0
    drift = Drift(2, 4)
    for _ in range(6):
        drift.add(0.0)
    assert drift.may_test and drift.p_value == 0.5


SHARES = GrowthSchedule(0.1, 0.05, 0.09)


def test_shares_become_steps_as_in_the_code() -> None:
    assert SHARES.in_steps(2000) == GrowthSchedule(200, 100, 180, "step")
    assert SHARES.in_steps(100) == GrowthSchedule(10, 30, 60, "step")
    assert "No expert is ever split" in str(SHARES.in_steps(100).never_splits(100))
    assert SHARES.in_steps(2000).never_splits(2000) is None
    with pytest.raises(ValueError, match="unit='step'"):
        SHARES.in_steps(float("inf"))


@pytest.mark.parametrize(
    "wrong", [(0.0, 0.1, 0.1), (1.5, 0.1, 0.1), (9, 2, 1, "step"), (9.5, 2, 2, "step")]
)
def test_a_schedule_that_cannot_be(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*found"):
        GrowthSchedule(*wrong)


# One layer, whose gradients the tests write by hand.


def make(router: Any = PrefixRouter, mlp: nn.Module | None = None) -> MoELayer:
    torch.manual_seed(0)
    mlp = mlp or nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
    return MoELayer(mlp, DIM, router, START, SLOTS, "fresh")


def make_growth(layer: nn.Module, **options: Any) -> DriftGrowth:
    settings = {
        "schedule": GrowthSchedule(100, 2, 3, "step"),
        "p_value": 0.3,
        "cosine": 1e-3,
        **options,
    }
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(layer.parameters(), lr=1e-2)
    settings.pop("optimizer", None)
    return DriftGrowth(layer, optimizer, **settings)


def orthogonal(weight: Tensor, norm: float) -> Tensor:
    """A gradient of this norm, orthogonal to the weight, whose rows are not."""
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight = weight.detach()
    gradient -= (gradient * weight).sum() / weight.square().sum() * weight
    return norm * gradient / gradient.norm()


def first(layer: MoELayer, slot: int) -> nn.Parameter:
    return layer.experts.slots[slot][0].weight


def write_gradients(layer: MoELayer, norms: dict[int, float]) -> None:
    for slot in layer.live:
        if slot in norms:
            for p in layer.slot_parameters(slot):
                p.grad = torch.ones_like(p)
            weight = first(layer, slot)
            weight.grad = orthogonal(weight, norms[slot])


def drive(
    layer: MoELayer, growth: DriftGrowth, rising: int, steps: int, **options: Any
) -> list[Any]:
    """Steps in which the gradient of one expert grows, and that of the others shrinks."""
    events = []
    for step in range(steps):
        layer.zero_grad()
        norms = {slot: 1.0 / (1 + growth.steps) for slot in range(SLOTS)}
        norms[rising] = 1.0 + growth.steps
        write_gradients(layer, norms)
        events += growth.before_step(**options)
        assert step + 1 <= growth.steps
    return events


def test_an_expert_whose_gradient_drifts_is_split() -> None:
    layer = make()
    growth = make_growth(layer)
    assert drive(layer, growth, rising=1, steps=2) == []
    layer.zero_grad()
    write_gradients(layer, {0: 0.1, 1: 9.0})
    weight = first(layer, 1)
    gradient, row = weight.grad.clone(), layer.router.rows[1].grad.clone()
    (event,) = growth.before_step()
    keys = ("step", "layer", "removed", "added", "before", "after", "source", "gain")
    assert [event[key] for key in keys] == [2, "", [], 2, 2, 3, 1, None]
    assert layer.live == (0, 1, 2) and event["p_value"] < 0.3 and abs(event["cosine"]) < 1e-3
    for old, new in zip(layer.slot_parameters(1), layer.slot_parameters(2), strict=True):
        assert torch.equal(old, new)
    old, new = split_gradient(gradient, weight.detach(), "projection_full")
    assert torch.equal(weight.grad, old)
    assert torch.equal(first(layer, 2).grad, new)
    old, new = split_gradient(row, layer.router.rows[1].detach(), "projection_full")
    # Equal rows are where the redundancy loss has its largest value: it has no gradient there.
    torch.testing.assert_close(layer.router.rows[1].grad, old)
    torch.testing.assert_close(layer.router.rows[2].grad, new)
    others = [p for p in layer.experts.slots[2].parameters() if p.grad is None]
    assert len(others) == 3  # both biases and the second matrix


def test_the_next_split_waits_for_the_warm_up() -> None:
    layer = make()
    events = drive(layer, make_growth(layer, schedule=GrowthSchedule(100, 4, 5, "step")), 1, 9)
    assert [event["step"] for event in events] == [4, 8]


def test_only_upward_drift_and_new_directions_count() -> None:
    layer = make()
    growth = make_growth(layer)
    for norm in (3.0, 2.0, 1.0, 0.5):  # falls
        write_gradients(layer, {0: norm, 1: norm})
        assert growth.before_step() == []
    growth = make_growth(layer)
    for norm in (1.0, 2.0, 3.0, 4.0):  # along the weights
        write_gradients(layer, {0: 0.1, 1: norm})
        weight = first(layer, 1)
        weight.grad = norm * weight.detach().clone()
        assert growth.before_step() == []


def test_growth_ends() -> None:
    """With the steps, or with the slots."""
    layer = make()
    growth = make_growth(layer, schedule=GrowthSchedule(3, 2, 3, "step"))
    assert len(drive(layer, growth, 1, 9)) == 1 and growth.is_over
    layer = make()
    growth = make_growth(layer)
    events = drive(layer, growth, 1, 20)
    assert [event["after"] for event in events] == [3, 4, 5]
    assert growth.is_over and len(layer.live) == SLOTS


def test_the_newest_copy_has_to_prove_itself() -> None:
    """Useless copies go, one patience point each; without one left the layer stops."""
    layer, gains = make(), []
    growth = make_growth(layer, patience=1)

    def loss() -> Tensor:  # the same with and without any expert
        gains.append(layer.live)
        return torch.tensor(1.0)

    events = drive(layer, growth, 0, 30, loss=loss)
    assert [(e["removed"], e["added"], e["patience"]) for e in events] == [
        ([], 2, 1),
        ([], 3, 1),
        ([3], 3, 0),
        ([3], None, 0),
    ]
    assert [e["gain"] for e in events] == [None, None, 0.0, 0.0]
    assert gains == [(0, 1, 2, 3), (0, 1, 2)] * 2
    assert growth.is_over and layer.live == (0, 1, 2)


def test_a_copy_gets_no_gradient_of_the_one_whose_slot_it_takes() -> None:
    layer = make()
    growth = make_growth(layer, check_from=2)
    events = drive(layer, growth, 0, 3)
    while events[-1]["removed"] != [2]:
        events = drive(layer, growth, 0, 1, loss=lambda: torch.tensor(1.0)) or events
    assert events[-1]["added"] == 2
    with_one = [p.grad is not None for p in layer.experts.slots[2].parameters()]
    assert with_one == [True, False, False, False]  # the first matrix alone


def test_a_copy_that_helps_stays() -> None:
    layer = make()
    growth = make_growth(layer, check_from=2)
    events = drive(layer, growth, 0, 20, loss=lambda: torch.tensor(-float(len(layer.live))))
    assert [(e["removed"], e["added"]) for e in events] == [([], 2), ([], 3), ([], 4)]
    assert [e["gain"] for e in events] == [None, 1.0, 1.0]


def test_a_useless_copy_that_drifts_itself_is_not_split() -> None:
    layer = make()
    growth = make_growth(layer, check_from=2, schedule=GrowthSchedule(100, 3, 3, "step"))
    drive(layer, growth, 1, 3)
    events = drive(layer, growth, 2, 3, loss=lambda: torch.tensor(1.0))
    assert [(e["removed"], e["added"], e["source"]) for e in events] == [([2], None, None)]
    assert layer.live == (0, 1)


def test_steps_that_do_not_count() -> None:
    layer = make()
    growth = make_growth(layer)
    write_gradients(layer, {0: 1.0, 1: float("nan")})
    growth.before_step()
    layer.zero_grad()
    growth.before_step()  # the layer did not run
    write_gradients(layer, {0: 1.0, 1: 1.0})
    growth.before_step(counts=False)
    assert growth.steps == 3 and not growth.state_dict()["layers"][""]["experts"]


def test_experts_without_tokens_have_the_norm_0() -> None:
    layer = make()
    growth = make_growth(layer)
    write_gradients(layer, {0: 2.0})
    growth.before_step()
    kept = growth.state_dict()["layers"][""]["experts"]
    assert [kept[slot]["norms"].tolist() for slot in (0, 1)] == [[pytest.approx(2.0)], [0.0]]


def test_scaled_gradients_are_read_unscaled() -> None:
    layer = make()
    growth = make_growth(layer)
    write_gradients(layer, {0: 2.0 * 1024, 1: 1024.0})
    growth.before_step(scale=1024.0)
    kept = growth.state_dict()["layers"][""]["experts"]
    assert kept[0]["norms"].tolist() == [pytest.approx(2.0)]


def test_the_redundancy_loss_acts_while_experts_may_be_split() -> None:
    layer = make()
    growth = make_growth(layer, schedule=GrowthSchedule(4, 2, 3, "step"), redundancy_weight=0.5)
    drive(layer, growth, 1, 3)
    rows = layer.router.rows
    with torch.no_grad():
        rows[2].copy_(torch.randn(DIM))
    first, second = (rows[slot].detach().requires_grad_() for slot in (1, 2))
    (0.5 * redundancy(first[None], second[None])).backward()
    for scale in (1.0, 8.0):
        growth.steps = 3
        layer.zero_grad()
        growth.before_step(scale=scale)
        torch.testing.assert_close(rows[1].grad, scale * first.grad)
        torch.testing.assert_close(rows[2].grad, scale * second.grad)
        assert rows[0].grad is None
    layer.zero_grad()
    growth.before_step()  # the steps are over
    assert rows[1].grad is None


def test_a_copy_starts_without_optimizer_state_and_averages_follow() -> None:
    layer = make()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    average = torch.optim.swa_utils.AveragedModel(layer).module
    growth = make_growth(layer, optimizer=optimizer, averages=[average])
    drive(layer, growth, 1, 3)
    assert not any(p in optimizer.state for p in layer.slot_parameters(2))
    assert all(p in optimizer.state for p in layer.slot_parameters(1))
    assert average.live == (0, 1, 2)
    for new, own in zip(average.slot_parameters(2), layer.slot_parameters(2), strict=True):
        assert torch.equal(new, own)


def test_a_state_goes_on_exactly() -> None:
    straight, growth = make(), None
    growth = make_growth(straight)
    expected = drive(straight, growth, 1, 12)

    layer = make()
    first = make_growth(layer)
    found = drive(layer, first, 1, 5)
    second = make_growth(layer)
    second.load_state_dict(first.state_dict())
    assert [*found, *drive(layer, second, 1, 7)] == expected and len(expected) > 1
    with pytest.raises(ConfigError, match="expected a state"):
        second.load_state_dict({"steps": 3, "layers": {"other": {}}})


def test_thresholds_of_top_any_routers_keep_their_gradient() -> None:
    layer = make(TopAnyRouter)
    drive(layer, make_growth(layer), 1, 3)
    assert layer.router.thresholds[2].grad == layer.router.thresholds[1].grad == 1


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_gate_and_up_of_a_gated_expert_are_one_matrix() -> None:
    from dynmoe.layers.ffn import GatedFFN

    ffn = GatedFFN(
        nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, DIM), 0.0
    )
    layer = make(mlp=ffn)
    slot = layer.experts.slots[0]
    assert layer.experts.first_weights(0) == [slot.gate.weight, slot.up.weight]
    growth = make_growth(layer)
    for weight, norm in zip(layer.experts.first_weights(0), (3.0, 4.0), strict=True):
        weight.grad = orthogonal(weight, norm)
    growth.before_step()
    kept = growth.state_dict()["layers"][""]["experts"][0]["norms"]
    assert kept.tolist() == [pytest.approx(5.0)]
    # An FFN of another form has its first linear layer.
    assert make(mlp=Gated()).experts.first_weights(0)[0].shape == (HIDDEN, DIM)


def test_models_that_cannot_grow_are_refused() -> None:
    with pytest.raises(ConfigError, match="use an adaptive one"):
        make_growth(make(TopKRouter))
    frozen = make()
    for expert in frozen.experts.slots:
        expert.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"first linear layer .*moe.adaptation=null"):
        make_growth(frozen)
    layer = make()
    several = [torch.optim.SGD([p], lr=1) for p in layer.parameters()]
    with pytest.raises(ConfigError, match="one optimizer"):
        make_growth(layer, optimizer=several)


@pytest.mark.parametrize(
    "wrong",
    [{"p_value": 0.0}, {"cosine": 2.0}, {"patience": 1.5}, {"check_from": 1}, {"split": "both"}],
)
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: expected .*found"):
        make_growth(make(), **wrong)

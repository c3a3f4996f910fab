"""ReLU routing against golden values of the authors' code, and by property."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.adaptation import RouterUpdates
from dynmoe.layers import MoELayer, ReLURouter, aux_loss, record_routing
from dynmoe.layers.routers import StepTotals

CASES = json.loads((Path(__file__).parent / "golden" / "remoe.json").read_text())["cases"]


def of_sparsity(sparsity: float, experts: int, tokens: float = 1000.0) -> StepTotals:
    load_S = torch.zeros(experts, dtype=torch.float64)
    load_S[0] = (1 - sparsity) * experts * tokens
    k_hist = torch.tensor([tokens] + [0.0] * experts, dtype=torch.float64)
    return StepTotals(load_S, k_hist, torch.zeros(0), torch.tensor(1), 1, 100)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case["name"])
def test_remoe_is_the_authors(case: Any) -> None:
    weight_ED, x_TD = torch.tensor(case["weight_ED"]), torch.tensor(case["x_TD"])
    router = ReLURouter(
        weight_ED.shape[1],
        len(weight_ED),
        target_k=case["top_k_target"],
        lambda_init=case["lambda"],
    )
    router.weight.data.copy_(weight_ED)
    routing = router(x_TD, range(len(weight_ED)))
    assert routing.mask_TE.int().tolist() == case["mask_TE"]
    assert routing.unserved_T.int().tolist() == case["unserved_T"]
    torch.testing.assert_close(routing.weights_TE, torch.tensor(case["weights_TE"]))
    assert routing.aux.item() == pytest.approx(case["l1_loss"], rel=1e-5)
    routing.aux.backward()
    torch.testing.assert_close(router.weight.grad, torch.tensor(case["l1_grad_weight_ED"]))


def test_lambda_takes_the_authors_steps() -> None:
    case = CASES[2]
    experts = case["num_experts"]
    router = ReLURouter(
        8, experts, case["top_k_target"], case["lambda_0"], lambda_rate=case["multiplier"]
    )
    for step in case["steps"]:
        own = of_sparsity(step["sparsity"], experts)
        router.update(own, [own])
        assert router.coefficient.item() == pytest.approx(step["lambda_after"], rel=1e-6)


def test_one_lambda_for_the_model_or_one_for_each_layer() -> None:
    dense, sparse = of_sparsity(0.2, 8, 1000), of_sparsity(0.95, 8, 3000)  # 0.7625 of all
    for per_layer, factor in ((False, 1.2), (True, 1 / 1.2)):
        router = ReLURouter(8, 8, target_k=1.6, lambda_init=1.0, per_layer=per_layer)
        router.update(sparse, [dense, sparse])
        assert router.coefficient.item() == pytest.approx(factor)
    before = router.coefficient.clone()
    empty = of_sparsity(1.0, 8, 0)
    router.update(empty, [empty, dense])  # a layer that did not run, with its own lambda
    assert torch.equal(router.coefficient, before)


def test_lambda_finds_back_from_its_ends() -> None:
    dense, sparse = of_sparsity(0.0, 8), of_sparsity(1.0, 8)
    router = ReLURouter(8, 8)
    for end in (sparse, dense):
        for _ in range(800):
            router.update(end, [end])
        assert 0 < router.coefficient.item() < float("inf")


def test_plain_and_balanced_loss_by_hand() -> None:
    """Experts of 3 and 1 tokens among 4, one of which is padding's."""
    x_TD = torch.tensor([[1.0, -1.0], [2.0, -1.0], [3.0, 0.5], [9.0, 9.0]])
    real_T = torch.tensor([True, True, True, False])
    for l1, expected in (("plain", 6.5 / 3), ("balanced", 2 / 1.5 * (6 * 1 + 0.5 / 3) / 3)):
        router = ReLURouter(2, 2, target_k=1.5, lambda_init=1.0, l1=l1)  # type: ignore[arg-type]
        router.weight.data.copy_(torch.eye(2))
        assert router(x_TD, (0, 1), real_T).aux.item() == pytest.approx(expected)


def stream(step: int) -> Tensor:
    own = torch.Generator().manual_seed(step)
    # Around a mean: a gate without bias fires for half of the tokens that are around zero.
    return 0.7 + torch.randn(128, 16, generator=own)


def test_target_is_held_on_a_fixed_stream() -> None:
    """On average: lambda swings around the place where it would be right."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
    moe = MoELayer(mlp, 16, partial(ReLURouter, target_k=2.0, lambda_init=0.01), 8, init="fresh")
    moe.router.weight.data.normal_(std=0.25)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.3)
    updates = RouterUpdates(moe, optimizer)
    mean_k = []
    for step in range(120):
        with record_routing(moe) as tape:
            loss = (moe(stream(step)) - stream(step)).square().mean()
        (loss + aux_loss(tape)).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates.step(loss)
        mean_k.append(tape[""][0].stats.load_E.sum().item() / 128)
    updates.close()
    assert mean_k[0] > 3.0
    assert sum(mean_k[40:]) / 80 == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_k": 0.0}, "target_k is 0"),
        ({"target_k": 5.0}, "up to"),
        ({"lambda_rate": 1.0}, "more than"),
    ],
)
def test_impossible_targets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReLURouter(8, 4, **options)

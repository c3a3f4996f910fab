"""A mask over the choices of top-k, by its equations and by property."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.adaptation import RouterUpdates
from dynmoe.layers import MaskedTopKRouter, MoELayer, TopKRouter, aux_loss, record_routing

LIVE = tuple(range(6))


def router(masks: bool = True, **options: Any) -> MaskedTopKRouter:
    torch.manual_seed(0)
    made = MaskedTopKRouter(8, 6, **{"top_k": 3, **options})
    made.weight.data.normal_()
    if masks:
        made.mask_weights.data.normal_()
    return made


def stream(step: int, tokens: int = 128) -> Tensor:
    own = torch.Generator().manual_seed(step)
    return 0.3 + torch.randn(tokens, 8, generator=own)


def test_it_starts_as_top_k() -> None:
    made, plain = router(masks=False), TopKRouter(8, 6, top_k=3)
    plain.weight = made.weight
    ours, theirs = made(stream(0), LIVE), plain(stream(0), LIVE)
    assert torch.equal(ours.mask_TE, theirs.mask_TE)
    assert torch.equal(ours.weights_TE, theirs.weights_TE)
    torch.testing.assert_close(ours.aux, 0.01 * theirs.aux + 0.01)  # all choices stay


@pytest.mark.parametrize("gate_grad", ["all", "chosen"])
def test_values_and_gradients_by_hand(gate_grad: str) -> None:
    made = router(balance_weight=0.0, mask_weight=0.5, gate_grad=gate_grad)
    x_TD, upstream_TE = stream(0), torch.randn(128, 6)
    routing = made(x_TD, LIVE)
    plain = TopKRouter(8, 6, top_k=3)
    plain.weight = made.weight
    choice = plain(x_TD, LIVE)
    soft_TE = (x_TD @ made.mask_weights.t()).sigmoid().detach()
    mask_TE = choice.mask_TE & (soft_TE >= 0.5)
    assert torch.equal(routing.mask_TE, mask_TE)
    assert {0, 3} <= set(mask_TE.sum(1).tolist())  # no expert, and every choice
    assert torch.equal(routing.unserved_T, ~mask_TE.any(1))
    torch.testing.assert_close(routing.weights_TE, choice.weights_TE * mask_TE)
    share = mask_TE.sum() / (3 * 128)
    assert routing.aux.item() == pytest.approx(0.5 * share.item())
    reached_TE = mask_TE if gate_grad == "chosen" else choice.mask_TE
    assert torch.equal(routing.dispatch_TE, reached_TE)
    assert torch.equal(made.eval()(x_TD, LIVE).dispatch_TE, mask_TE)
    ((routing.weights_TE * upstream_TE).sum() + routing.aux).backward()
    slope_TE = soft_TE * (1 - soft_TE)
    grad_TE = upstream_TE * choice.weights_TE.detach() * reached_TE + (
        0.5 / (3 * 128) * choice.mask_TE
    )
    torch.testing.assert_close(made.mask_weights.grad, (grad_TE * slope_TE).t() @ x_TD)


def test_the_loss_alone_makes_choices_fewer() -> None:
    made = router(masks=False, balance_weight=0.0, mask_weight=1.0)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for step in range(5):
        made(stream(step), LIVE).aux.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made(stream(9), LIVE).mask_TE.sum() < 0.5 * 3 * 128


def test_a_budget_is_held_while_masks_are_trained() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    moe = MoELayer(mlp, 8, partial(MaskedTopKRouter, top_k=3, target_k=1.4), 6, init="fresh")
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
    updates = RouterUpdates(moe, optimizer)
    mean_k = []
    for step in range(100):
        with record_routing(moe) as tape:
            loss = (moe(stream(step)) - stream(step)).square().mean()
        (loss + aux_loss(tape)).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates.step(loss)
        mean_k.append(tape[""][0].stats.load_E.sum().item() / 128)
    updates.close()
    assert mean_k[0] == 3
    assert sum(mean_k[-40:]) / 40 == pytest.approx(1.4, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_k": 3.0}, "up to top_k, 2"),
        ({"target_k": 0}, "more than 0"),
        ({"top_k": 9}, "top_k"),
    ],
)
def test_impossible_masks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedTopKRouter(8, 4, **options)

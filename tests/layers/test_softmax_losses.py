"""Losses that any router over logits can add, and experts in turn, against their equations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import (
    BiasedTopKRouter,
    CosineTopKRouter,
    GeMoERouter,
    MoELayer,
    NullExpertRouter,
    PrefixRouter,
    TopKRouter,
    ZeroCostRouter,
    aux_loss,
    losses,
    record_routing,
)

DIM, EXPERTS, B, N = 6, 4, 3, 8
ROUTERS: dict[str, Any] = {
    "topk": TopKRouter,
    "gmoe": partial(CosineTopKRouter, top_k=2),
    "loss-free": BiasedTopKRouter,
    "adamoe": partial(NullExpertRouter, num_null=2, top_k=2),
    "gemoe": GeMoERouter,
    "moepp": ZeroCostRouter,
    "top-p": PrefixRouter,
}


@pytest.fixture
def x_BND() -> Tensor:
    return torch.randn(B, N, DIM, generator=torch.Generator().manual_seed(0))


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0], [9.0, 9.0]])
    want = (torch.tensor(2.0).log() ** 2 + (3 + torch.tensor(2.0).log()) ** 2) / 2
    real_T = torch.tensor([True, True, False])
    torch.testing.assert_close(losses.z_loss(logits, real_T), want)


def balance_by_hand(probs_NE: Tensor, picks_NE: Tensor, top_k: int) -> Tensor:
    """DeepSeek-V3, Eq. 17 to 20, of one sequence."""
    tokens, experts = probs_NE.shape
    f_E = experts / (top_k * tokens) * picks_NE.sum(0)
    return (f_E * probs_NE.mean(0)).sum()


def test_sequence_balance_by_hand() -> None:
    probs_BNE = torch.rand(B, N, EXPERTS, generator=torch.Generator().manual_seed(1)).softmax(2)
    picks_BNE = F.one_hot(probs_BNE.topk(2).indices, EXPERTS).sum(2)
    real_BN = torch.ones(B, N, dtype=torch.bool)
    real_BN[1, 5:] = False
    picks_BNE = picks_BNE * real_BN[..., None]
    each = [
        balance_by_hand(probs[real], picks[real], 2)
        for probs, picks, real in zip(probs_BNE, picks_BNE, real_BN, strict=True)
    ]
    flat = probs_BNE.flatten(0, 1), picks_BNE.flatten(0, 1)
    found = losses.sequence_balance(*flat, length=N, real_T=real_BN.flatten())
    torch.testing.assert_close(found, torch.stack(each).mean())
    real_BN[2] = False  # a sequence of padding counts nowhere
    flat = flat[0], (picks_BNE * real_BN[..., None]).flatten(0, 1)
    found = losses.sequence_balance(*flat, length=N, real_T=real_BN.flatten())
    torch.testing.assert_close(found, torch.stack(each[:2]).mean())
    assert not torch.isclose(found, losses.sequence_balance(*flat, real_T=real_BN.flatten()))


@pytest.mark.parametrize("name", ROUTERS)
def test_any_router_adds_them(name: str, x_BND: Tensor) -> None:
    """Layers tell the router where sequences end: mean over samples of the loss of each alone."""

    def aux(x: Tensor, **options: float) -> Tensor:
        torch.manual_seed(1)
        layer = MoELayer(nn.Linear(DIM, DIM), DIM, partial(ROUTERS[name], **options), EXPERTS)
        for p in layer.router.parameters():
            p.data = p.data * 10
        with record_routing(layer) as tape:
            layer.eval()(x)
        return aux_loss(tape)

    plain = aux(x_BND)
    z = aux(x_BND, z_weight=0.5) - plain
    assert z > 0
    torch.testing.assert_close(z, 5 * (aux(x_BND, z_weight=0.1) - plain), rtol=1e-3, atol=1e-5)
    by_sequence = aux(x_BND, sequence_weight=1.0) - plain
    alone = [aux(x[None], sequence_weight=1.0) - aux(x[None]) for x in x_BND]
    torch.testing.assert_close(by_sequence, torch.stack(alone).mean())
    as_one = aux(x_BND.view(-1, DIM), sequence_weight=1.0) - plain
    assert not torch.isclose(as_one, by_sequence)


def test_sequences_of_rows_are_those_of_the_mask(x_BND: Tensor) -> None:
    layer = MoELayer(nn.Linear(DIM, DIM), DIM, partial(TopKRouter, sequence_weight=9.0), EXPERTS)
    layer.router.weight.data *= 50  # type: ignore[operator]
    real_BN = torch.ones(B, N, dtype=torch.bool)
    real_BN[0, 6:] = False
    found = []
    for x in (x_BND, x_BND.view(-1, DIM)):
        with record_routing(layer) as tape:
            layer(x, real_BN)
        found.append(aux_loss(tape))
    torch.testing.assert_close(*found)


def test_deepseeks_loss_is_of_choices_without_bias(x_BND: Tensor) -> None:
    router = BiasedTopKRouter(DIM, EXPERTS, sequence_weight=1.0)
    router.bias_E[0] = 9.0
    scores_TE = (x_BND.view(-1, DIM) @ router.weight.t()).sigmoid()
    picks_TE = F.one_hot(scores_TE.topk(2).indices, EXPERTS).sum(1)
    share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    each = [
        balance_by_hand(share, picks, 2)
        for share, picks in zip(share_TE.split(N), picks_TE.split(N), strict=True)
    ]
    found = router(x_BND.view(-1, DIM), range(EXPERTS), shape=(B, N)).aux
    torch.testing.assert_close(found, torch.stack(each).mean())


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_in_turn(top_k: int, x_BND: Tensor) -> None:
    router = TopKRouter(DIM, EXPERTS, top_k=top_k, forced_balance=True)
    x_TD = x_BND.view(-1, DIM)
    routing = router(x_TD, range(EXPERTS))
    assert routing.mask_TE.sum(0).tolist() == [B * N * top_k / EXPERTS] * EXPERTS
    assert (routing.mask_TE.sum(1) == top_k).all()
    probs_TE = (x_TD @ router.weight.t()).softmax(1) * routing.mask_TE
    want_TE = probs_TE if top_k == 1 else probs_TE / probs_TE.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_TE, want_TE)
    real_T = torch.arange(B * N) % 3 != 0
    padded = router(x_TD, range(EXPERTS), real_T)
    assert padded.mask_TE.sum(0).tolist() == [real_T.sum() * top_k / EXPERTS] * EXPERTS

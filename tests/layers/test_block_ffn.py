"""BlockFFN's router and its losses against the authors' functions, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import cases
from torch import Tensor

from dynmoe.layers import BlockFFNRouter
from dynmoe.layers.block_ffn import chunk_activation, locality
from dynmoe.layers.routers import StepTotals


def official(case: Any, **options: Any) -> BlockFFNRouter:
    weight_ED = torch.tensor(case["weight_ED"])
    made = BlockFFNRouter(
        weight_ED.shape[1],
        len(weight_ED),
        chunk_length=case["chunk_length"],
        steepness=case["sigmoid_steep"],
        eps=case["eps"],
        **{"chunk_weight": 0.0, "locality_weight": 0.0, **options},
    )
    made.weight.data = weight_ED
    made.gain_E.data = torch.tensor(case["rms_gain_E"])
    return made


@pytest.mark.parametrize("case", cases("blockffn"), ids=lambda case: case["name"])
def test_router_and_losses_are_the_authors(case: Any) -> None:
    x_TD, live = torch.tensor(case["x_TD"]), range(len(case["weight_ED"]))
    routing = official(case)(x_TD, live)
    assert routing.mask_TE.int().tolist() == case["mask_TE"]
    torch.testing.assert_close(
        routing.weights_TE, torch.tensor(case["weights_TE"]), atol=1e-5, rtol=0
    )
    # Token -1 is the one before the first: one sequence.
    assert case["left_token_of_T"] == list(range(-1, len(x_TD) - 1))
    real_T = torch.tensor(case["seq_mask_T"]) > 0
    for name, weights, mask_T in (
        ("chunk", {"chunk_weight": 1.0}, real_T),
        ("locality", {"locality_weight": case["transfer_lambda"]}, None),
    ):
        router = official(case, **weights)
        aux = router(x_TD, live, mask_T).aux
        torch.testing.assert_close(aux, torch.tensor(case[f"{name}_loss"]), atol=1e-5, rtol=0)
        aux.backward()
        want_ED = torch.tensor(case[f"{name}_grad_weight_ED"])
        assert router.weight.grad is not None
        torch.testing.assert_close(router.weight.grad, want_ED, atol=1e-5, rtol=1e-4)


def test_chunks_by_hand() -> None:
    """Two sequences of 5 tokens in chunks of 2: the last of each has one token."""
    share_TE = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)) / 2
    real_T = torch.ones(10, dtype=torch.bool)
    real_T[8:] = False  # all of the last chunk, half of the one before
    want = 0.0
    for tokens in ((0, 1), (2, 3), (4,), (5, 6), (7,)):
        want += (1 - (1 - share_TE[list(tokens)]).prod(0)).mean()
    found = chunk_activation(share_TE, 2, 5, real_T)
    torch.testing.assert_close(found, torch.tensor([want, 5]), atol=1e-4, rtol=0)


def test_neighbours_are_of_one_sequence_and_real() -> None:
    logits_TE = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    real_T = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0]).bool()

    def pair(left: int, right: int) -> Tensor:
        p, q = logits_TE[left].sigmoid(), logits_TE[right].sigmoid()
        return -(q * p.log() + (1 - q) * (1 - p).log()).mean()

    pairs = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7)]
    want = torch.stack([pair(*each) for each in pairs])
    torch.testing.assert_close(locality(logits_TE, 4), want.mean())
    torch.testing.assert_close(locality(logits_TE, 4, real_T), want[[0, 1, 3]].mean())


def test_a_token_without_a_positive_score_is_left_to_the_residual() -> None:
    router = BlockFFNRouter(2, 3)
    router.weight.data = torch.tensor([[1.0, 0], [2, 0], [0, -1]])
    routing = router(torch.tensor([[-1.0, 1.0], [1.0, 1.0]]), range(3))
    assert routing.mask_TE.tolist() == [[False] * 3, [True, True, False]]
    assert routing.unserved_T.tolist() == [True, False] and not routing.weights_TE[0].any()
    # Root mean square over all experts, those of score 0 included.
    want = torch.tensor([1.0, 2.0, 0.0]) / (5 / 3) ** 0.5
    torch.testing.assert_close(routing.weights_TE[1], want, atol=1e-5, rtol=0)


def test_the_chunk_losss_weight_follows_its_value() -> None:
    """Means 0.8, 0.4, 0.6 of windows of 2 steps: halved after the second, no more than 1 ever."""
    router = BlockFFNRouter(2, 3, schedule_every=2, schedule_start=4)
    factors = []
    for step, loss in enumerate([0.8, 0.8, 0.3, 0.5, 0.6, 0.6, 9.0, 9.0, 9.0, 9.0], start=1):
        own = StepTotals(
            load_S=torch.zeros(3),
            k_hist=torch.ones(4),
            observed=torch.tensor([loss * 7, 7.0]),
            calls=torch.tensor(1),
            step=step,
            num_steps=100,
        )
        router.update(own, [own, own])
        factors.append(round(router.factor.item(), 4))
    assert factors == [1, 1, 1, 1, 0.75, 0.5, 0.625, 0.75, 0.875, 1]

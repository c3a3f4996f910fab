"""Auxiliary losses against sums written out by hand, with fewer living experts than slots."""

from __future__ import annotations

import pytest
import torch

from dynmoe.layers import TopAnyRouter, losses

DIM, SLOTS, LIVE = 6, 5, (0, 2, 3)


@pytest.fixture
def x_TD() -> torch.Tensor:
    return torch.randn(40, DIM, generator=torch.Generator().manual_seed(0))


def aux_and_mask(x_TD: torch.Tensor, **options: object) -> tuple[float, list[list[bool]]]:
    torch.manual_seed(1)
    routing = TopAnyRouter(DIM, SLOTS, **options)(x_TD, LIVE)  # type: ignore[arg-type]
    return routing.aux.item(), routing.mask_TE.tolist()


def test_gshard_over_living_experts(x_TD: torch.Tensor) -> None:
    """tutel/impls/losses.py: E * sum_e mean gate_e * mean of first choices, E the living ones."""
    aux, mask = aux_and_mask(x_TD, aux="gshard")
    expected = 0.0
    for e in range(3):
        gate = sum(row[e] for row in mask) / 40
        first = sum(any(row) and row.index(True) == e for row in mask) / 40
        expected += 3 * gate * first
    assert aux == pytest.approx(expected)


def test_balance_and_efficiency_over_the_pool(x_TD: torch.Tensor) -> None:
    """DynMoE's DeepSpeed code: balance over tokens with k > 0, mean k as a share of all slots."""
    base, mask = aux_and_mask(x_TD)
    served = [row for row in mask if any(row)]
    assert 0 < len(served) < 40
    balance = sum(
        (sum(row[e] / sum(row) for row in served) / len(served))
        * (sum(row[e] for row in served) / len(served))
        for e in range(3)
    )
    mean_k = sum(map(sum, mask)) / 40
    with_balance, _ = aux_and_mask(x_TD, balance_weight=1.0)
    with_efficiency, _ = aux_and_mask(x_TD, efficiency_weight=1.0)
    assert with_balance - base == pytest.approx(SLOTS * balance, rel=1e-4)
    assert with_efficiency - base == pytest.approx(mean_k / SLOTS, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_diversity_by_hand(smoothing: float) -> None:
    w = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    raw = (3.0**2 + 2 * 2.0**2 + 1.0**2 + smoothing**2) ** 0.5 - smoothing
    assert losses.diversity(w, False, smoothing).item() == pytest.approx(raw)
    cos = 2**-0.5
    normalised = (2 * cos**2 + smoothing**2) ** 0.5 - smoothing
    assert losses.diversity(w, True, smoothing).item() == pytest.approx(normalised)
    assert losses.simplicity(w).item() == pytest.approx((2 + 2**0.5) / 2)

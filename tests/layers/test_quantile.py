"""A cut tracked by counts near it comes to the quantile that sorting finds."""

from __future__ import annotations

import pytest
import torch

from dynmoe.layers.quantile import BINS, count_distances, distance_to, edges


def test_counts_by_hand() -> None:
    distance_TC = torch.tensor([[-torch.inf, 0.0], [5.0, 0.75], [torch.inf, -0.3], [0.1, 9.0]])
    where_TC = torch.ones_like(distance_TC, dtype=torch.bool)
    where_TC[3, 0] = False
    counts_CB = count_distances(distance_TC, where_TC)
    found = edges(distance_TC).tolist()
    assert len(found) == BINS - 1 and found == sorted(found) and found[-1] == 4
    assert counts_CB.shape == (2, BINS) and counts_CB.sum(1).tolist() == [3, 4]
    assert counts_CB[0, 0] == 1 and counts_CB[0, -1] == 2
    assert counts_CB[1, found.index(0.0)] == 1  # at the cut, not above it
    assert counts_CB[1, found.index(1.0)] == 1 and counts_CB[1, found.index(-0.25)] == 1


@pytest.mark.parametrize("spread", [0.01, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_cut_comes_to_the_quantile(spread: float, share: float) -> None:
    values_T = 0.3 + spread * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    cut = torch.tensor([-1.0])
    where_TC = torch.ones(4000, 1, dtype=torch.bool)
    for _ in range(12):
        counts_CB = count_distances((values_T - cut)[:, None], where_TC)
        cut += distance_to(torch.tensor([4000 * share]), counts_CB)
    assert (values_T > cut).float().mean().item() == pytest.approx(share, rel=0.01)
    counts_CB = count_distances((values_T - cut)[:, None], where_TC)
    before = cut.clone()
    cut += distance_to(torch.tensor([(values_T > before).sum().item()]), counts_CB)
    assert torch.equal(cut, before)  # there: it stays


def test_more_than_there_are_and_none() -> None:
    where_TC = torch.ones(3, 1, dtype=torch.bool)
    counts_CB = count_distances(torch.tensor([[0.5], [1.5], [2.5]]), where_TC)
    assert distance_to(torch.tensor([9.0]), counts_CB).item() == 0  # all are above it
    assert distance_to(torch.tensor([0.0]), counts_CB).item() == 4
    assert distance_to(torch.tensor([1.0]), counts_CB).item() == 2  # from 1.5 to 2.5 there is 1
    below_CB = count_distances(torch.tensor([[-0.5], [-1.5], [-2.5]]), where_TC)
    assert distance_to(torch.tensor([3.0]), below_CB).item() == -4
    assert distance_to(torch.tensor([2.0]), below_CB).item() == -2
    assert distance_to(torch.tensor([1.0]), torch.zeros(1, BINS)).item() == 0

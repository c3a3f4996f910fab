"""Quantiles of many numbers from few counts: the controllers of routers.

A cut is to be moved to where a wanted number of values lie above it. The values are counted by
their distance from the present cut, in bins that are narrow near it and wide far away. Counts can
be summed over micro-batches and ranks, and the cut moves after the step. A few steps bring it from
anywhere to where interpolation between narrow bins is exact, whatever the spread of the values.

Shape suffixes: T tokens, C cuts, B bins, E edges between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 17
"""Edges on either side of a cut, at distances of 4, 2, 1, ... 6e-5."""
BINS = 2 * REACH + 2


def edges(like: Tensor) -> Tensor:
    """The bins' edges, ascending, on the device and in the dtype of ``like``."""
    # NOTE: made on the device: a list would be sent there, and the device waited for.
    side = torch.exp2(2 - torch.arange(REACH, device=like.device, dtype=like.dtype))
    return torch.cat([-side, side.new_zeros(1), side.flip(0)])


def count_distances(distance_TC: Tensor, where_TC: Tensor) -> Tensor:
    """Count the values of each column by their distance from its cut, [C, B], fp32.

    ``where_TC`` (bool) is False on values that do not count. Infinite distances do.
    """
    columns = distance_TC.shape[1]
    # NOTE: (a, b] are the bins: a value that equals its cut is not above it.
    bin_TC = torch.bucketize(distance_TC.detach().contiguous(), edges(distance_TC))
    bin_TC = bin_TC + BINS * torch.arange(columns, device=bin_TC.device)
    # The default type is bf16 in runs of ``trainer.precision=bf16-true``.
    counts = torch.zeros(columns * BINS, device=bin_TC.device, dtype=torch.float32)
    counts.index_add_(0, bin_TC.flatten(), where_TC.flatten().to(counts.dtype))
    return counts.view(columns, BINS)


def distance_to(wanted_C: Tensor, counts_CB: Tensor) -> Tensor:
    """How far each cut is from where ``wanted_C`` of its values lie above it, [C].

    0 where it is there to half a value already. At most 4 either way.
    """
    edges_E = edges(counts_CB)
    total_C = counts_CB.sum(1)
    above_CE = (total_C[:, None] - counts_CB.cumsum(1))[:, :-1]  # above each edge: falls
    wanted_C = torch.minimum(wanted_C.to(counts_CB.dtype), total_C)
    too_many_C = above_CE[:, REACH] > wanted_C
    # The nearest place, where several have as many above them.
    more_CE = above_CE > wanted_C[:, None]
    more_CE |= (above_CE == wanted_C[:, None]) & ~too_many_C[:, None]
    upper_C = more_CE.sum(1).clamp(1, len(edges_E) - 1)
    lower_C = upper_C - 1
    many_C, few_C = (above_CE.gather(1, i[:, None])[:, 0] for i in (lower_C, upper_C))
    share_C = ((many_C - wanted_C) / (many_C - few_C).clamp(min=1e-9)).clamp(0, 1)
    distance_C = edges_E[lower_C] + share_C * (edges_E[upper_C] - edges_E[lower_C])
    there_C = (above_CE[:, REACH] - wanted_C).abs() <= 0.5
    return torch.where(there_C, 0.0, distance_C)

"""Weights on a grid of few levels: round to nearest, and GPTQ (arXiv 2210.17323).

As QuantMoE-Bench does (arXiv 2406.08155; UNITES-Lab/moe-quantization,
auto_gptq/quantization/quantizer.py and gptq.py): a grid for each output row and group of
neighbouring input columns.

Shape suffixes: O outputs, I inputs of a linear layer, G groups of input columns, g columns of one
group, N rows of input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Columns after which GPTQ spreads their errors over the later ones. It is more than a matter of
speed: the grid of a group is that of the weights at the start of its block."""
SHRINKS = 80
"""Ranges that the search of the smallest error tries, one per cent smaller each."""
NORM = 2.4
"""Power of the error that it compares."""
LEAST_DAMP = 1e-6
"""Share of the mean diagonal that an undamped Hessian gets if it cannot be inverted."""


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    ``bits``: 2 to 8. ``group_size``: input columns with a grid of their own in every row; -1: all.
    ``sym``: a grid around 0 that is as wide as the largest weight to both sides, whose positive
    end is one level short; else from the smallest to the largest weight. ``mse``: search for the
    range with the smallest error among shrunk ones.
    """

    bits: int
    group_size: int = 128
    sym: bool = True
    mse: bool = False

    def columns(self, inputs: int) -> int:
        """Columns of a group of a layer with so many inputs; the last group may have fewer."""
        return inputs if self.group_size == -1 else self.group_size

    def groups(self, inputs: int) -> int:
        return -(-inputs // self.columns(inputs))


class Grid(NamedTuple):
    """Levels ``scale * (level - zero)``, level 0 to 2^bits - 1, of each row of a group."""

    scale_O1: Tensor
    zero_O1: Tensor
    bits: int

    def levels(self, weight_Og: Tensor) -> Tensor:
        """Return the nearest level of each weight, whole numbers in its dtype."""
        levels_Og = torch.round(weight_Og / self.scale_O1) + self.zero_O1
        return levels_Og.clamp_(0, 2**self.bits - 1)

    def rounded(self, weight_Og: Tensor) -> Tensor:
        """Return the weights of the nearest levels."""
        return self.scale_O1 * (self.levels(weight_Og) - self.zero_O1)


def find_grid(weight_Og: Tensor, how: Rounding) -> Grid:
    """Return the grid of a group's weights, fp32.

    A row of zeros gets the range from -1 to 1. Symmetric grids are so for rows without a negative
    weight too, which the official code gives half of their range.
    """
    low_O = weight_Og.amin(1).clamp(max=0)
    high_O = weight_Og.amax(1).clamp(min=0)
    if how.sym:
        high_O = torch.maximum(-low_O, high_O)
        low_O = -high_O
    empty_O = (low_O == 0) & (high_O == 0)
    low_O, high_O = low_O.masked_fill(empty_O, -1), high_O.masked_fill(empty_O, 1)
    grid = _grid_of(low_O, high_O, how)
    if not how.mse:
        return grid
    best_O1 = torch.full_like(grid.scale_O1, torch.inf)
    for shrink in range(SHRINKS):
        left = 1 - shrink / 100
        tried = _grid_of(left * low_O, left * high_O, how)
        error_O1 = (tried.rounded(weight_Og) - weight_Og).abs().pow(NORM).sum(1, keepdim=True)
        better_O1 = error_O1 < best_O1
        best_O1 = torch.where(better_O1, error_O1, best_O1)
        grid = Grid(
            torch.where(better_O1, tried.scale_O1, grid.scale_O1),
            torch.where(better_O1, tried.zero_O1, grid.zero_O1),
            how.bits,
        )
    return grid


def _grid_of(low_O: Tensor, high_O: Tensor, how: Rounding) -> Grid:
    scale_O1 = ((high_O - low_O) / (2**how.bits - 1))[:, None]
    if how.sym:
        return Grid(scale_O1, torch.full_like(scale_O1, 2 ** (how.bits - 1)), how.bits)
    return Grid(scale_O1, torch.round(-low_O[:, None] / scale_O1), how.bits)


class Quantized(NamedTuple):
    """A weight whose values lie on grids."""

    weight_OI: Tensor
    """Dequantised, fp32."""
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor
    """The group of each input column: with ``desc_act`` they are no neighbours."""


def round_to_nearest(weight_OI: Tensor, how: Rounding) -> Quantized:
    """Round every weight to the nearest level of its group's grid (RTN)."""
    weight_OI = weight_OI.float()
    size = how.columns(weight_OI.shape[1])
    parts = weight_OI.split(size, 1)
    grids = [find_grid(part_Og, how) for part_Og in parts]
    pairs = zip(grids, parts, strict=True)
    rounded_OI = torch.cat([grid.rounded(part_Og) for grid, part_Og in pairs], 1)
    group_I = torch.arange(weight_OI.shape[1], device=weight_OI.device) // size
    return _quantized(rounded_OI, grids, group_I)


def _quantized(weight_OI: Tensor, grids: list[Grid], group_I: Tensor) -> Quantized:
    scale_OG = torch.cat([grid.scale_O1 for grid in grids], 1)
    zero_OG = torch.cat([grid.zero_O1 for grid in grids], 1)
    return Quantized(weight_OI, scale_OG, zero_OG, group_I)


def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    how: Rounding,
    percdamp: float = 0.01,
    desc_act: bool = False,
    static_groups: bool = False,
) -> Quantized:
    """Round column after column, each time moving the later columns against the error so far.

    ``hessian_II``: the sum of x x^T over the layer's inputs, finite; its size does not matter.
    Columns without any input become 0, all of them where there was no input at all: round to
    nearest then. ``percdamp``: the share of its mean diagonal that is added to the diagonal; ten
    times as much, as often as it takes, where the sum cannot be inverted (of 0: ``LEAST_DAMP``
    first). ``desc_act``: columns with much input first. ``static_groups``: groups of neighbours,
    with the grids of the weights as given.
    """
    weight_OI = weight_OI.float().clone()
    inputs = weight_OI.shape[1]
    size = how.columns(inputs)
    # NOTE: before columns without input become 0, as in the official code; groups come after it.
    grids = [find_grid(weight_OI, how)] if how.group_size == -1 else []
    diagonal_I = hessian_II.diagonal().float()
    dead_I = diagonal_I == 0
    weight_OI[:, dead_I] = 0
    if static_groups and not grids:
        grids = [find_grid(part_Og, how) for part_Og in weight_OI.split(size, 1)]
    static = bool(grids)
    order_I = torch.arange(inputs, device=weight_OI.device)
    if desc_act:
        order_I = diagonal_I.masked_fill(dead_I, 1).argsort(descending=True)
        weight_OI, dead_I = weight_OI[:, order_I], dead_I[order_I]
        hessian_II = hessian_II[order_I[:, None], order_I]
    places = order_I.tolist() if static else list(range(inputs))
    upper_II = _inverse_factor(hessian_II, dead_I, percdamp)
    diagonal = upper_II.diagonal().tolist()
    rounded_OI = torch.empty_like(weight_OI)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        # Rows of the transposed block are its columns: contiguous, hence fast.
        block_bO = weight_OI[:, start:end].t().contiguous()
        errors_bO = torch.empty_like(block_bO)
        upper_bb = upper_II[start:end, start:end]
        for column in range(end - start):
            place = places[start + column]
            if not static and place % size == 0:
                grids.append(find_grid(weight_OI[:, place : place + size], how))
            grid = grids[place // size]
            value_O = block_bO[column]
            rounded_O = grid.rounded(value_O[:, None])[:, 0]
            rounded_OI[:, start + column] = rounded_O
            error_O = (value_O - rounded_O) / diagonal[start + column]
            errors_bO[column] = error_O
            block_bO[column + 1 :].addr_(upper_bb[column, column + 1 :], error_O, alpha=-1)
        weight_OI[:, end:].addmm_(errors_bO.t(), upper_II[start:end, end:], alpha=-1)
    back_I = order_I.argsort()
    # Groups of neighbours in the order of the columns: their own, if grids are static.
    group_I = order_I // size if static else torch.arange(inputs, device=order_I.device) // size
    return _quantized(rounded_OI[:, back_I], grids, group_I[back_I])


def _inverse_factor(hessian_II: Tensor, dead_I: Tensor, percdamp: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian.

    Beside the Hessian there are two more matrices of its size at most.
    """
    mean = float(hessian_II.diagonal().float().masked_fill(dead_I, 1).mean())
    damps = [percdamp * mean]
    while (upper_II := _factor_with(hessian_II, dead_I, damps)) is None:
        damps.append(10 * damps[-1] or LEAST_DAMP * mean)
    return upper_II


def _factor_with(hessian_II: Tensor, dead_I: Tensor, damps: Sequence[float]) -> Tensor | None:
    """The factor with so much damping; None if it is not enough."""
    damped_II = hessian_II.to(torch.float32, copy=True)
    diagonal_I = damped_II.diagonal()
    diagonal_I[dead_I] = 1
    for damp in damps:
        diagonal_I.add_(damp)
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    del damped_II, diagonal_I
    if failed:
        return None
    inverse_II = torch.cholesky_inverse(lower_II)
    del lower_II
    upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
    return None if failed else upper_II


def output_error(change_OI: Tensor, hessian_II: Tensor) -> float:
    """Return the sum of squares of the outputs of a weight, over the inputs of ``hessian_II``.

    Of a difference of weights: the squared error of the outputs.
    """
    return float(((change_OI @ hessian_II) * change_OI).sum(dtype=torch.float64))


def outlier_score(weight_OI: Tensor) -> float:
    """Return the largest ratio, over input columns, of the largest to the mean absolute weight.

    QuantMoE-Bench's score of linear layers that deserve more bits
    (dump-mixtral-outlier-metric.py).
    """
    sizes_OI = weight_OI.detach().float().abs()
    mean_I = sizes_OI.mean(0)
    return float((sizes_OI.amax(0) / mean_I)[mean_I > 0].amax()) if mean_I.any() else 0.0

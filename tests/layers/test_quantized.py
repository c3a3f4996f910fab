"""Rounding and GPTQ against the official code's outputs, and what holds for any weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from golden_cases import cases
from torch import Tensor

from dynmoe.layers.quantized import (
    LEAST_DAMP,
    Rounding,
    find_grid,
    gptq,
    outlier_score,
    output_error,
    round_to_nearest,
)

CLOSE: Any = {"rtol": 0, "atol": 1e-5}
ROUNDED = [case for case in cases("quantmoe") if "weight_OI" in case]


def drawn(seed: int, outputs: int = 6, inputs: int = 32, rows: int = 64) -> tuple[Tensor, Tensor]:
    """A weight and inputs whose columns are correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mix_II = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator)
    return weight_OI, torch.randn(rows, inputs, generator=generator) @ mix_II


@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case["name"])
def test_the_official_code_rounds_so(case: dict[str, Any]) -> None:
    weight_OI, rows_NI = torch.tensor(case["weight_OI"]), torch.tensor(case["calib_NI"])
    how = Rounding(case["bits"], case["group_size"], case["sym"], case["mse"])
    options = {key: case[key] for key in ("percdamp", "desc_act", "static_groups")}
    for name, found in (
        ("rtn", round_to_nearest(weight_OI, how)),
        ("gptq", gptq(weight_OI, rows_NI.t() @ rows_NI, how, **options)),
    ):
        for part in ("weight_OI", "scale_OG", "zero_OG"):
            expected = torch.tensor(case[f"{name}_{part}"])
            torch.testing.assert_close(getattr(found, part), expected, **CLOSE)
        mse = float(((weight_OI - found.weight_OI) @ rows_NI.t()).square().mean())
        assert mse == pytest.approx(case[f"{name}_output_mse"], rel=1e-4)
    assert found.group_I.tolist() == case["gptq_group_of_column_I"]
    assert outlier_score(weight_OI) == pytest.approx(case["outlier_score"], abs=1e-5)


def naive_gptq(weight_OI: Tensor, hessian_II: Tensor, how: Rounding, percdamp: float) -> Tensor:
    """Optimal brain quantisation of a row's columns in their order: after each, the best change of
    the later ones, given the inverse Hessian of what is left. One group, in fp64."""
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double().clone()
    hessian_II += percdamp * hessian_II.diagonal().mean() * torch.eye(len(hessian_II)).double()
    grid = find_grid(weight_OI, how)
    for i in range(weight_OI.shape[1]):
        left_LL = torch.linalg.inv(hessian_II[i:, i:])
        rounded_O = grid.rounded(weight_OI[:, i : i + 1])[:, 0]
        error_O = (weight_OI[:, i] - rounded_O) / left_LL[0, 0]
        weight_OI[:, i:] -= error_O[:, None] * left_LL[0]
        weight_OI[:, i] = rounded_O
    return weight_OI.float()


@pytest.mark.parametrize("inputs", [24, 150])  # less and more than a block of columns
def test_gptq_is_the_naive_reference(inputs: int) -> None:
    weight_OI, rows_NI = drawn(3, inputs=inputs, rows=200)
    how = Rounding(3, -1)
    found = gptq(weight_OI, rows_NI.t() @ rows_NI, how).weight_OI
    naive = naive_gptq(weight_OI, rows_NI.t() @ rows_NI, how, 0.01)
    # A value in a thousand may lie so near a border that fp32 decides otherwise.
    assert ((found - naive).abs() > 1e-4).float().mean() < 5e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_errs_less_on_the_outputs(bits: int, sym: bool) -> None:
    weight_OI, rows_NI = drawn(bits, outputs=16)
    how, hessian_II = Rounding(bits, 16, sym), rows_NI.t() @ rows_NI
    rtn, better = round_to_nearest(weight_OI, how), gptq(weight_OI, hessian_II, how)
    errors = [output_error(weight_OI - found.weight_OI, hessian_II) for found in (rtn, better)]
    assert errors[1] < errors[0]
    outputs = (weight_OI - rtn.weight_OI) @ rows_NI.t()
    assert errors[0] == pytest.approx(float(outputs.square().sum()), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"static_groups": True}])
def test_rows_do_not_meet(options: dict[str, bool]) -> None:
    weight_OI, rows_NI = drawn(5, inputs=144)
    how, hessian_II = Rounding(4, 16), rows_NI.t() @ rows_NI
    order_O = torch.tensor([3, 0, 5, 1, 4, 2])
    found = gptq(weight_OI, hessian_II, how, **options)
    other = gptq(weight_OI[order_O], hessian_II, how, **options)
    torch.testing.assert_close(other.weight_OI, found.weight_OI[order_O])


@pytest.mark.parametrize(("sym", "mse"), [(True, False), (False, False), (True, True)])
def test_rounded_weights_stay_on_their_levels(sym: bool, mse: bool) -> None:
    weight_OI, _ = drawn(7)
    grid = find_grid(weight_OI, Rounding(3, -1, sym, mse))
    once = grid.rounded(weight_OI)
    assert torch.equal(grid.levels(once), grid.levels(weight_OI))
    assert grid.levels(weight_OI).unique().numel() <= 8


def test_ends_of_a_grid() -> None:
    """At 2 bits a symmetric grid has -1.33, -0.67, 0 and 0.67 of the largest weight."""
    weight_Og = torch.tensor([[0.9, -0.3, 0.1], [0.2, 0.3, 0.9], [0.0, 0.0, 0.0]])
    grid = find_grid(weight_Og, Rounding(2))
    assert grid.scale_O1[:, 0].tolist() == pytest.approx([0.6, 0.6, 2 / 3])
    assert grid.rounded(weight_Og)[:, 0].tolist() == pytest.approx([0.6, 0.0, 0.0])
    asymmetric = find_grid(weight_Og, Rounding(2, sym=False))
    assert asymmetric.scale_O1[:2, 0].tolist() == pytest.approx([0.4, 0.3])
    assert asymmetric.zero_O1[:2, 0].tolist() == [1.0, 0.0]


def test_a_searched_range_errs_less() -> None:
    weight_OI, _ = drawn(11, inputs=64)
    weight_OI[0, 0] = 20.0
    plain, searched = (
        round_to_nearest(weight_OI, Rounding(3, 64, mse=mse)).weight_OI for mse in (False, True)
    )
    error, least = ((weight_OI - found).abs().pow(2.4).sum() for found in (plain, searched))
    assert least < error


def test_a_last_group_may_be_smaller() -> None:
    weight_OI, rows_NI = drawn(13, inputs=20)
    for found in (
        round_to_nearest(weight_OI, Rounding(4, 16)),
        gptq(weight_OI, rows_NI.t() @ rows_NI, Rounding(4, 16)),
    ):
        assert found.scale_OG.shape == (6, 2) and found.group_I.tolist() == [0] * 16 + [1] * 4


def test_one_row_of_input_is_enough() -> None:
    """Its sum of products has rank 1."""
    weight_OI, rows_NI = drawn(17, rows=1)
    how, hessian_II = Rounding(4, -1), rows_NI.t() @ rows_NI
    found = gptq(weight_OI, hessian_II, how).weight_OI
    assert found.isfinite().all()
    rtn = round_to_nearest(weight_OI, how).weight_OI
    assert output_error(weight_OI - found, hessian_II) < output_error(weight_OI - rtn, hessian_II)


def test_inputs_that_cannot_be_inverted_are_damped_even_if_damping_is_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cholesky, tries = torch.linalg.cholesky_ex, itertools.count()

    def tried(*given: Any, **named: Any) -> Any:
        assert next(tries) < 100, "for ever"
        return cholesky(*given, **named)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", tried)
    weight_OI, rows_NI = drawn(0, rows=3)
    hessian_II, how = rows_NI.t() @ rows_NI, Rounding(3, 8)
    found = gptq(weight_OI, hessian_II, how, percdamp=0.0).weight_OI
    torch.testing.assert_close(found, gptq(weight_OI, hessian_II, how, LEAST_DAMP).weight_OI)
    rounded_OI = round_to_nearest(weight_OI, how).weight_OI
    error, rtn_error = (output_error(weight_OI - w, hessian_II) for w in (found, rounded_OI))
    assert error < rtn_error

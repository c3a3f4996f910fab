"""Costs as tables and sentences."""

from __future__ import annotations

import math
from collections import defaultdict

from dynmoe.report.costs import (
    Bill,
    Mode,
    Range,
    SearchCost,
    Timing,
    Timings,
    generation_rows,
    model_costs,
)
from dynmoe.report.run import Problem, Run, conditions, counted, every, settings
from dynmoe.report.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean

MISSING = "X"


def cost_table(collection: Collection, problem: Problem) -> Table:
    """Parameters and FLOPs of every setting, by formula."""
    runs = collection.of(problem)
    costs = model_costs(runs)
    unknown = [name for name, cost in costs.items() if math.isnan(cost.flops)]
    note = (
        "Mean over runs, at the reported step. Total: in training, empty slots included; exported: "
        f"living experts only; activated: per token of the {runs[0].words.place}, every living "
        f"expert scored and k computed. FLOPs: one forward pass of a {runs[0].words.sample}, 2 per "
        "multiply-add."
    )
    if unknown:
        note += f" X: records do not tell it ({', '.join(unknown)})."
    return Table(
        f"Size of every setting on {problem.dataset}",
        (
            "setting",
            "runs",
            "experts per layer",
            "mean k",
            "total, M",
            "exported, M",
            "activated, M",
            "FLOPs per sample, M",
        ),
        tuple(
            (
                name,
                str(cost.runs),
                *(
                    ("-", "-")
                    if name in dense(collection, problem)
                    else (number(cost.experts), number(cost.mean_k))
                ),
                *(
                    number(value / 1e6)
                    for value in (cost.total, cost.exported, cost.activated, cost.flops)
                ),
            )
            for name, cost in costs.items()
        ),
        note=note,
        conditions=conditions(runs),
    )


def unmeasured(collection: Collection, timings: Timings) -> str:
    """Why there is no table of times; empty if there is one."""
    if timings.refused:
        return f"Times and memory are not compared: {timings.refused}."
    if not timings.by_setting:
        command = f"dynmoe-bench step --runs {collection.folders[0]}"
        return f"Times and memory are not measured: {command} does it."
    return ""


def timing_table(collection: Collection, problem: Problem, timings: Timings) -> Table:
    """Measured times and memory of every setting."""
    runs = collection.of(problem)
    rows = []
    for name in settings(runs):
        by_mode = [timings.by_setting.get((name, mode)) for mode in _modes()]
        peak = by_mode[0].peak_bytes if by_mode[0] else None
        memory = MISSING if peak is None else number(peak / 2**30)
        rows.append((name, *(cell for timing in by_mode for cell in _times(timing)), memory))
    note = (
        "Median with quartiles, of a trained model on batches of its own data; "
        f"{timings.conditions}."
    )
    if any(timing.contaminated for timing in timings.by_setting.values()):
        note += " *: other processes were busy during more than half of the samples."
    return Table(
        f"Measured cost of every setting on {problem.dataset}",
        (
            "setting",
            "training step, ms",
            "training, samples/s",
            "inference step, ms",
            "inference, samples/s",
            "peak memory of a training step beyond weights and optimizer, GiB",
        ),
        tuple(rows),
        note=note,
        conditions=conditions(runs),
    )


def search_table(collection: Collection, cost: SearchCost) -> Table:
    """What the grid was trained for beside what an adaptive setting was trained for."""
    problem = cost.problem
    runs = collection.of(problem)
    note = (
        f"All runs of the same {runs[0].words.part}s and repetitions, draws and searched values "
        "that lost included. FLOPs: 3 x the forward pass of a "
        f"{runs[0].words.sample} x samples, with the experts and k "
        "recorded in training. Recorded hours: training and evaluation; runs side by side on one "
        "machine slow one another."
    )
    if any(run.has_lora for run in runs):
        note += " X: with LoRA most weights are frozen, and such a step's FLOPs are not counted."
    if any(run.is_partly_frozen for run in runs):
        note += " Frozen weights, of which no gradient is computed, are counted like all others."
    columns = ["", "runs", "training, TFLOP", "hours, recorded"]
    if not math.isnan(cost.grid.measured + cost.own.measured):
        columns.append("hours at the measured step")
        note += " At the measured step: training alone, steps x the time of the table above."
    if cost.machines:
        note += f" Recorded hours are not compared, machines differ: {', '.join(cost.machines)}."
    if any(entry.problem in (None, problem) for entry in collection.absent):
        note += " Runs without a result are not counted, so the grid may have cost more."
    rows = (
        (f"the grid ({counted(cost.grid_settings, 'setting')})", *_bill(cost, cost.grid)),
        (cost.setting, *_bill(cost, cost.own)),
        ("ratio", _ratio(cost.grid.runs, cost.own.runs), *map(_times_as_much, ratios(cost))),
    )
    return Table(
        f"What the search cost on {problem.dataset}",
        tuple(columns),
        tuple(row[: len(columns)] for row in rows),
        note=note,
        conditions=conditions(runs),
    )


def search_sentence(cost: SearchCost) -> str:
    """The bill in a sentence; recorded hours, which depend on what else ran, are in the table."""
    if not cost.grid.runs:
        return f"{cost.setting}: there is no grid whose search it could save."
    flops, _, measured = ratios(cost)
    shares = {"the training FLOPs": flops, "the training time, at the measured step,": measured}
    parts = [
        f"{_times_as_much(ratio)} {what}" for what, ratio in shares.items() if not math.isnan(ratio)
    ]
    return (
        f"The search over the grid ({counted(cost.grid_settings, 'setting')}, "
        f"{counted(cost.grid.runs, 'run')}) took {' and '.join(parts) or 'an unknown multiple'} of "
        f"{cost.setting} ({counted(cost.own.runs, 'run')})."
    )


def ratios(cost: SearchCost) -> tuple[float, float, float]:
    """The grid's over the adaptive setting's: FLOPs, hours recorded (if comparable), measured."""
    recorded = math.nan if cost.machines else _divide(cost.grid.recorded, cost.own.recorded)
    measured = _divide(cost.grid.measured, cost.own.measured)
    return _divide(cost.grid.flops, cost.own.flops), recorded, measured


def dense(collection: Collection, problem: Problem) -> set[str]:
    return {run.setting for run in collection.of(problem) if run.kind == "dense"}


def number(value: float) -> str:
    """Three significant digits; X for what was not recorded."""
    if math.isnan(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(middle: float, quartiles: Range) -> str:
    """`106 [105, 108]`: a median and its quartiles."""
    return f"{number(middle)} [{', '.join(map(number, quartiles))}]"


def _modes() -> tuple[Mode, Mode]:
    return "train", "inference"


def _times(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return MISSING, MISSING
    mark = "*" if timing.contaminated else ""
    return (
        spread(timing.milliseconds, timing.quartiles) + mark,
        spread(timing.samples_per_second, timing.samples_quartiles) + mark,
    )


def _bill(cost: SearchCost, bill: Bill) -> tuple[str, str, str, str]:
    recorded = "refused" if cost.machines else number(bill.recorded)
    return str(bill.runs), number(bill.flops / 1e12), recorded, number(bill.measured)


def _ratio(one: float, other: float) -> str:
    return _times_as_much(_divide(one, other))


def _divide(one: float, other: float) -> float:
    return one / other if other else math.nan


def _times_as_much(ratio: float) -> str:
    return MISSING if math.isnan(ratio) else f"{number(ratio)} x"


# How fast the settings answer, as a table.


def generation_table(collection: Collection, problem: Problem) -> Table | None:
    """Every measured setting of a problem; None if none was measured.

    Raises:
        RecordError: a damaged `generation.json`.
    """
    runs = collection.of(problem)
    names = {run.folder.path.name: run.setting for run in runs}
    measured = [generation_rows(folder) for folder in collection.folders]
    own = [each for each in measured if any(row.run in names for row in each.rows)]
    rows = [row for each in own for row in each.rows if row.run in names]
    if not rows:
        return None
    note = (
        "Medians with quartiles, measured in turns. First token: the time to read a batch of "
        "questions and their images. Ratio: over the speed of the reference in the same rounds. "
        f"Measured on: {every(each.conditions for each in own)}."
    )
    if any(2 * row.contaminated > row.rounds for row in rows):
        note += " *: other processes were busy during more than half of the rounds."
    return Table(
        f"How fast every setting answers on {problem.dataset}",
        (
            *("setting", "first token, ms", "each further token, ms", "tokens/s"),
            f"over {every(row.reference for row in rows)}",
            "peak memory beyond weights, GiB",
        ),
        tuple(
            (
                names[row.run],
                spread(row.prompt_ms, row.prompt_quartiles_ms),
                number(row.token_ms),
                spread(row.tokens_per_s, row.tokens_per_s_quartiles)
                + "*" * (2 * row.contaminated > row.rounds),
                f"{spread(row.ratio, row.ratio_quartiles)} x",
                number(row.peak_bytes / 2**30),
            )
            for row in rows
        ),
        note=note,
        conditions=conditions(runs),
    )


# The values that a protocol searches over, as GLUE's learning rates: what each of them gave.
#
# `read_runs` takes one value for all repetitions of a setting, by mean validation.


def taken(collection: Collection, problem: Problem) -> dict[str, str]:
    """By setting, `3e-05 (of 3)`: the value that its runs have, of how many that were tried.

    Empty where nothing was searched.
    """
    return {
        setting: f"{_value(chosen[0])} (of {len(by_value)})"
        for setting, by_value in _tried(collection, problem).items()
        if (chosen := [run for run in collection.of(problem) if run.setting == setting])
    }


def values_table(collection: Collection, problem: Problem) -> Table | None:
    """Every value of every setting with its mean validation and result; None without a search."""
    tried = _tried(collection, problem)
    if not tried:
        return None
    standing = {run.folder.path: run for run in collection.of(problem)}
    first = next(iter(standing.values()))
    rows: list[tuple[str, ...]] = []
    for setting, by_value in tried.items():
        for value, runs in by_value.items():
            outcomes = [run.outcome for run in runs]
            validation = format_mean([outcome.validation for outcome in outcomes])
            result = format_mean([outcome.accuracy for outcome in outcomes])
            if runs[0].folder.path in standing:
                validation = Strong(validation)
            rows.append((setting, value, validation, result, str(len(runs))))
    return Table(
        f"The search on {problem.dataset}",
        (
            "setting",
            ", ".join(first.searched),
            f"validation, {first.words.scale}",
            first.words.column,
            "n",
        ),
        tuple(rows),
        note="Bold: the value of the best mean validation, among those with the most repetitions; "
        "its runs are all that is reported above.",
        conditions=conditions(collection.of(problem)),
    )


def _tried(collection: Collection, problem: Problem) -> dict[str, dict[str, list[Run]]]:
    """Runs by setting and value, in order; none if no setting has several values."""
    found: defaultdict[str, dict[str, list[Run]]] = defaultdict(dict)
    runs = [run for run in (*collection.runs, *collection.others) if run.problem == problem]
    for run in sorted(runs, key=lambda run: str(run.searched)):
        if run.searched:
            found[run.setting].setdefault(_value(run), []).append(run)
    if all(len(by_value) == 1 for by_value in found.values()):
        return {}
    order = dict.fromkeys(run.setting for run in runs)
    return {setting: found[setting] for setting in order if setting in found}


def _value(run: Run) -> str:
    return ", ".join(map(str, run.searched.values()))

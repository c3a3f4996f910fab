"""Costs as tables and sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dynmoe.report.costs import (
    Range,
    SearchCost,
    Timings,
    generation_rows,
    is_contaminated,
    model_costs,
)
from dynmoe.report.run import Problem, Run, by_setting, conditions, counted, every, settings
from dynmoe.report.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean

MISSING = "X"
BUSY = " *: other processes were busy during more than half of the {}."


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
        note += f" X: not known from the records ({', '.join(unknown)})."
    rows = []
    for run in {run.setting: run for run in runs}.values():
        cost = costs[run.setting]
        routed = (cost.experts, cost.mean_k)
        sizes = (cost.total, cost.exported, cost.activated, cost.flops)
        cells = ("-", "-") if run.kind == "dense" else map(number, routed)
        millions = (number(size / 1e6) for size in sizes)
        rows.append((run.setting, str(cost.runs), *cells, *millions))
    return Table(
        f"Size of every setting on {problem.dataset}",
        (
            *("setting", "runs", "experts per layer", "mean k"),
            *("total, M", "exported, M", "activated, M", "FLOPs per sample, M"),
        ),
        tuple(rows),
        note=note,
        conditions=conditions(runs),
    )


def router_table(runs: Sequence[Run]) -> Table | None:
    """Every mixture's k beside its target; None where no router decides how many experts."""
    if not any(run.kind == "varying" for run in runs):
        return None
    rows = []
    for setting, members in by_setting(runs).items():
        layers = [layer for run in members for layer in run.layers]
        if not layers:
            continue
        trained, tested = (
            float(np.mean([getattr(layer, key) for layer in layers]))
            for key in ("k_train", "k_test")
        )
        target = members[0].target_k
        off = "-" if target is None else f"{100 * (trained / target - 1):+.1f}"
        held = "-" if target is None else number(target)
        score = format_mean([run.outcome.accuracy for run in members], members[0].scale)
        unrouted = 100 * float(np.mean([layer.unrouted for layer in layers]))
        cells = (held, number(trained), off, number(tested), number(unrouted), score)
        rows.append((setting, *cells, str(len(members))))
    words = runs[0].words
    return Table(
        f"How many experts a token activates on {runs[0].problem.dataset}",
        (
            *("setting", "target k", "mean k, training", "off by, %", f"mean k, {words.place}"),
            *("without an expert, %", words.column, "n"),
        ),
        tuple(rows),
        note="Means over MoE layers and runs at the reported step; in training those since the "
        "evaluation before. Off by: mean k in training over the target. Without an expert: share "
        "of training tokens. Which code each router was checked against: docs/routers.md.",
        conditions=conditions(runs),
    )


def unmeasured(collection: Collection, timings: Timings) -> str:
    """Return why there is no table of times; empty if there is one."""
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
        cells, memory = [], MISSING
        for mode in ("train", "inference"):
            timing = timings.by_setting.get((name, mode))
            if timing is None:
                cells += [MISSING, MISSING]
                continue
            mark = "*" * timing.contaminated
            cells += [
                spread(timing.milliseconds, timing.quartiles) + mark,
                spread(timing.samples_per_second, timing.samples_quartiles) + mark,
            ]
            if mode == "train" and timing.peak_bytes is not None:
                memory = number(timing.peak_bytes / 2**30)
        rows.append((name, *cells, memory))
    note = (
        "Median with quartiles, of a trained model on batches of its own data; "
        f"{timings.conditions}."
    )
    if any(timing.contaminated for timing in timings.by_setting.values()):
        note += BUSY.format("samples")
    return Table(
        f"Measured cost of every setting on {problem.dataset}",
        (
            *("setting", "training step, ms", "training, samples/s"),
            *("inference step, ms", "inference, samples/s"),
            "peak memory of a training step beyond weights and optimizer, GiB",
        ),
        tuple(rows),
        note=note,
        conditions=conditions(runs),
    )


def search_table(collection: Collection, cost: SearchCost) -> Table:
    """Cost of training the grid beside that of training an adaptive setting."""
    problem = cost.problem
    runs = collection.of(problem)
    note = (
        f"All runs of the same {runs[0].words.part}s and repetitions, draws and searched values "
        "that lost included. FLOPs: 3 x the forward pass of a "
        f"{runs[0].words.sample} x samples, with the experts and k "
        "recorded in training. Recorded hours: training and evaluation; runs side by side on one "
        "machine slow one another."
    )
    if any(run.is_mostly_frozen for run in runs):
        note += (
            " X: with LoRA or adapters most weights are frozen, and such a step's FLOPs are not "
            "counted."
        )
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
    bills = {f"the grid ({counted(cost.grid_settings, 'setting')})": cost.grid}
    rows: list[tuple[str, ...]] = []
    for name, bill in (bills | {cost.setting: cost.own}).items():
        recorded = "refused" if cost.machines else number(bill.recorded)
        sizes = (str(bill.runs), number(bill.flops / 1e12))
        rows.append((name, *sizes, recorded, number(bill.measured)))
    shares = (_divide(cost.grid.runs, cost.own.runs), *ratios(cost))
    rows.append(("ratio", *map(_times_as_much, shares)))
    return Table(
        f"Cost of the search on {problem.dataset}",
        tuple(columns),
        tuple(row[: len(columns)] for row in rows),
        note=note,
        conditions=conditions(runs),
    )


def search_sentence(cost: SearchCost) -> str:
    """Return the ratios that do not depend on other processes; recorded hours are in the table."""
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
    """Grid over adaptive setting: FLOPs, hours recorded (NaN if not comparable), measured."""
    recorded = math.nan if cost.machines else _divide(cost.grid.recorded, cost.own.recorded)
    measured = _divide(cost.grid.measured, cost.own.measured)
    return _divide(cost.grid.flops, cost.own.flops), recorded, measured


def number(value: float) -> str:
    """Three significant digits; X for what was not recorded."""
    if math.isnan(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(middle: float, quartiles: Range) -> str:
    """`106 [105, 108]`: a median and its quartiles; the median alone of a single round."""
    if quartiles[0] == quartiles[1]:
        return number(middle)
    return f"{number(middle)} [{', '.join(map(number, quartiles))}]"


def _divide(one: float, other: float) -> float:
    return one / other if other else math.nan


def _times_as_much(ratio: float) -> str:
    return MISSING if math.isnan(ratio) else f"{number(ratio)} x"


def generation_table(collection: Collection, problem: Problem) -> Table | None:
    """Speed of answering of every measured setting; None if none was measured.

    Raises:
        RecordError: a damaged `generation.json`.
    """
    runs = collection.of(problem)
    names = {run.folder.path.name: run.setting for run in runs}
    measured = [generation_rows(folder) for folder in collection.folders]
    own = [each for each in measured if any(row["run"] in names for row in each.rows)]
    rows = [row for each in own for row in each.rows if row["run"] in names]
    if not rows:
        return None
    note = (
        "Medians with quartiles of interleaved measurements. First token: the time to read a batch "
        "of questions and their images. Ratio: over the speed of the reference in the same rounds. "
        f"Measured on: {every(each.conditions for each in own)}."
    )
    if any(map(is_contaminated, rows)):
        note += BUSY.format("rounds")
    shown = []
    for row in rows:
        first = spread(row["prompt_ms"], row["prompt_quartiles_ms"])
        speed = spread(row["tokens_per_s"], row["tokens_per_s_quartiles"])
        ratio = spread(row["ratio"], row["ratio_quartiles"])
        mark, peak = "*" * is_contaminated(row), number(row["peak_bytes"] / 2**30)
        cells = (first, number(row["token_ms"]), speed + mark, f"{ratio} x", peak)
        shown.append((names[row["run"]], *cells))
    return Table(
        f"How fast every setting answers on {problem.dataset}",
        (
            *("setting", "first token, ms", "each further token, ms", "tokens/s"),
            f"over {every(row['reference'] for row in rows)}",
            "peak memory beyond weights, GiB",
        ),
        tuple(shown),
        note=note,
        conditions=conditions(runs),
    )


# Results of the values that a protocol searches over, as GLUE's learning rates. `read_runs` takes
# one value for all repetitions of a setting, by mean validation.


def taken(collection: Collection, problem: Problem) -> dict[str, str]:
    """Return by setting `3e-05 (of 3)`: the value of its runs, and the number of values tried.

    Empty where nothing was searched.
    """
    chosen = {run.setting: _value(run) for run in collection.of(problem)}
    return {
        setting: f"{chosen[setting]} (of {len(by_value)})"
        for setting, by_value in _tried(collection, problem).items()
        if setting in chosen
    }


def values_table(collection: Collection, problem: Problem) -> Table | None:
    """Every value of every setting with its mean validation and result; None without a search."""
    tried = _tried(collection, problem)
    if not tried:
        return None
    reported = collection.of(problem)
    chosen, first = {run.folder.path for run in reported}, reported[0]
    rows: list[tuple[str, ...]] = []
    for setting, by_value in tried.items():
        for value, runs in by_value.items():
            validation = format_mean([run.outcome.validation for run in runs], first.scale)
            result = format_mean([run.outcome.accuracy for run in runs], first.scale)
            if runs[0].folder.path in chosen:
                validation = Strong(validation)
            rows.append((setting, value, validation, result, str(len(runs))))
    return Table(
        f"The search on {problem.dataset}",
        (
            *("setting", ", ".join(first.searched)),
            *(f"validation, {first.scale.name}", first.words.column, "n"),
        ),
        tuple(rows),
        note="Bold: the value of the best mean validation, among those with the most repetitions; "
        "its runs are all that is reported above.",
        conditions=conditions(reported),
    )


def _tried(collection: Collection, problem: Problem) -> dict[str, dict[str, list[Run]]]:
    """Return runs by setting and value, in order; none if no setting has several values."""
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

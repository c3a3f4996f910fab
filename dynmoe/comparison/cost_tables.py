"""Costs as tables and sentences."""

from __future__ import annotations

import math

from dynmoe.comparison.conditions import conditions, counted
from dynmoe.comparison.costs import Bill, SearchCost, model_costs, search_cost
from dynmoe.comparison.run import Problem, settings
from dynmoe.comparison.runs import Collection
from dynmoe.comparison.timings import Mode, Range, Timing, read_timings
from dynmoe.report.tables import Table

MISSING = "X"


def cost_table(collection: Collection, problem: Problem) -> Table:
    """Parameters and FLOPs of every setting, by formula."""
    runs = collection.of(problem)
    costs = model_costs(runs)
    unknown = [name for name, cost in costs.items() if math.isnan(cost.flops)]
    note = (
        "Mean over runs, at the reported step. Total: in training, empty slots included; exported: "
        "living experts only; activated: per token of the test environment, every living expert "
        "scored and k computed. FLOPs: one forward pass of a sample, 2 per multiply-add."
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


def timing_table(collection: Collection, problem: Problem) -> Table:
    """Measured times and memory of every setting; refused where machines differ."""
    runs = collection.of(problem)
    timings = read_timings(collection, problem)
    names = settings(runs)
    rows = []
    for name in names:
        by_mode = [timings.by_setting.get((name, mode)) for mode in _modes()]
        peak = by_mode[0].peak_bytes if by_mode[0] else None
        memory = MISSING if peak is None else number(peak / 2**30)
        cells = (*(cell for timing in by_mode for cell in _times(timing)), memory)
        rows.append((name, *(("refused",) * len(cells) if timings.refused else cells)))
    note = (
        "Median with quartiles, of a trained model on batches of its own data; memory is that of a "
        f"training step beyond weights and optimizer state; {timings.conditions}."
    )
    if timings.refused:
        note = f"Times are not compared: {timings.refused}."
    elif not timings.by_setting:
        note = f"Not measured: dynmoe-bench step --runs {collection.folders[0]} does it."
    elif any(timing.contaminated for timing in timings.by_setting.values()):
        note += " *: other processes were busy during more than half of the samples."
    return Table(
        f"Measured cost of every setting on {problem.dataset}",
        (
            "setting",
            "training step, ms",
            "training, samples/s",
            "inference step, ms",
            "inference, samples/s",
            "peak memory in training, GiB",
        ),
        tuple(rows),
        note=note,
        conditions=conditions(runs),
    )


def search_table(collection: Collection, problem: Problem, setting: str) -> Table:
    """What the grid was trained for beside what an adaptive setting was trained for."""
    cost = search(collection, problem, setting)
    note = (
        "All runs of the same environments and repetitions, draws of hyper-parameters that lost "
        "included. FLOPs: 3 x the forward pass x samples, with the experts and k recorded in "
        "training. Recorded hours: training and evaluation; runs side by side on one machine slow "
        "one another. At the measured step: training alone, steps x the time of the table above."
    )
    if cost.machines:
        note += f" Recorded hours are not compared, machines differ: {', '.join(cost.machines)}."
    if any(entry.problem in (None, problem) for entry in collection.absent):
        note += " Runs without a result are not counted, so the grid may have cost more."
    grid, own = _bill(cost, cost.grid), _bill(cost, cost.own)
    return Table(
        f"What the search cost on {problem.dataset}",
        ("", "runs", "training, TFLOP", "hours, recorded", "hours at the measured step"),
        (
            (f"the grid ({counted(cost.grid_settings, 'setting')})", *grid),
            (setting, *own),
            ("ratio", _ratio(cost.grid.runs, cost.own.runs), *map(_times_as_much, ratios(cost))),
        ),
        note=note,
        conditions=conditions(collection.of(problem)),
    )


def search_sentence(cost: SearchCost) -> str:
    """The bill in a sentence."""
    if not cost.grid.runs:
        return f"{cost.setting}: there is no grid whose search it could save."
    flops, recorded, measured = ratios(cost)
    time = (recorded, "the recorded hours")
    if not math.isnan(measured):
        time = (measured, "the training time, at the measured step,")
    parts = [
        f"{_times_as_much(ratio)} {what}"
        for ratio, what in ((flops, "the training FLOPs"), time)
        if not math.isnan(ratio)
    ]
    refused = f" Recorded hours are not compared, machines differ: {', '.join(cost.machines)}."
    return (
        f"The search over the grid ({counted(cost.grid_settings, 'setting')}, "
        f"{counted(cost.grid.runs, 'run')}) took {' and '.join(parts) or 'an unknown multiple'} of "
        f"{cost.setting} ({counted(cost.own.runs, 'run')})."
        f"{refused if cost.machines else ''}"
    )


def search(collection: Collection, problem: Problem, setting: str) -> SearchCost:
    """The search's bill, with the step times that were measured."""
    timings = read_timings(collection, problem).by_setting
    step_ms = {name: each.milliseconds for (name, mode), each in timings.items() if mode == "train"}
    return search_cost(collection, problem, setting, step_ms)


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


def _modes() -> tuple[Mode, Mode]:
    return "train", "inference"


def _times(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return MISSING, MISSING
    mark = "*" if timing.contaminated else ""
    return (
        _spread(timing.milliseconds, timing.quartiles) + mark,
        _spread(timing.samples_per_second, timing.samples_quartiles) + mark,
    )


def _spread(middle: float, quartiles: Range) -> str:
    return f"{number(middle)} [{', '.join(map(number, quartiles))}]"


def _bill(cost: SearchCost, bill: Bill) -> tuple[str, str, str, str]:
    recorded = "refused" if cost.machines else number(bill.recorded)
    return str(bill.runs), number(bill.flops / 1e12), recorded, number(bill.measured)


def _ratio(one: float, other: float) -> str:
    return _times_as_much(_divide(one, other))


def _divide(one: float, other: float) -> float:
    return one / other if other else math.nan


def _times_as_much(ratio: float) -> str:
    return MISSING if math.isnan(ratio) else f"{number(ratio)} x"

"""Quality at equal or lower cost: settings that decide their k against the fixed ones they replace.

A router or a training that finds k by itself has to be as good as what the same FLOPs buy without
it. So each such setting is compared with all fixed and dense settings that cost no more, on matched
repetitions, by paired t tests that are corrected for their number (`dynmoe.report.paired`). The
best of them is chosen by the reported measure itself, which is optimistic for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynmoe.report.claim import MEAN, columns, matched, resolution, score_cells
from dynmoe.report.cost_tables import number
from dynmoe.report.costs import ModelCost, model_costs
from dynmoe.report.paired import LEVEL, POWER, PairedTest, corrected, detectable, paired
from dynmoe.report.run import Problem, Run, conditions
from dynmoe.report.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean, format_points
from dynmoe.report.words import capital

SLACK = 0.02
"""Part by which a fixed setting may cost more and still be a rival: mean k is held, not fixed."""


@dataclass(frozen=True)
class Stand:
    """A setting that decides its k, and the fixed settings that cost no more."""

    setting: str
    flops: float
    """Of the forward pass, over those of `unit_of`."""
    mean_k: float
    accuracies: tuple[float, ...]
    """By repetition."""
    tests: Mapping[str, PairedTest]
    """It minus each rival; p is corrected for their number."""
    best: str
    """The rival with the best mean; empty without rivals."""
    left_out: tuple[str, ...]
    """Rivals that lack repetitions."""

    @property
    def better(self) -> list[str]:
        """Rivals that are significantly better at equal or lower cost."""
        return [name for name, test in self.tests.items() if test.verdict == "is below"]


def stands(collection: Collection, problem: Problem) -> list[Stand]:
    """Return how every setting that decides its k stands; none where costs are not known."""
    runs = collection.of(problem)
    place, costs, cells = columns(runs)[-1], model_costs(runs), score_cells(runs)
    kinds = {run.setting: run.kind for run in runs}
    fixed = [name for name, kind in kinds.items() if kind in ("fixed", "dense")]
    unit = costs[unit_of(runs, costs)].flops
    finest, scale = resolution(runs, place), runs[0].scale
    found = []
    for name in kinds:
        if name in fixed or not cells[name, place]:
            continue
        rivals = [r for r in fixed if costs[r].flops <= (1 + SLACK) * costs[name].flops]
        held = matched(cells[name, place], [cells[rival, place] for rival in rivals])
        if not held:
            continue
        results = {
            each: [cells[each, place][repetition].accuracy for repetition in held]
            for each in (name, *rivals)
            if set(held) <= cells[each, place].keys()
        }
        own = results.pop(name)
        tests = {
            rival: PairedTest(paired(own, theirs), finest, scale)
            for rival, theirs in results.items()
        }
        best = max(results, key=lambda r: scale.better * float(np.mean(results[r])), default="")
        left_out = tuple(rival for rival in rivals if rival not in results)
        flops, mean_k = costs[name].flops / unit, costs[name].mean_k
        found.append(Stand(name, flops, mean_k, tuple(own), corrected(tests), best, left_out))
    return [each for each in found if not math.isnan(each.flops)]


def unit_of(runs: Sequence[Run], costs: Mapping[str, ModelCost]) -> str:
    """The setting whose FLOPs are 1: the cheapest dense one, else the cheapest of all."""
    kinds = {run.setting: run.kind for run in runs}

    def place(name: str) -> tuple[bool, bool, float]:
        flops = costs[name].flops
        return math.isnan(flops), kinds[name] != "dense", flops

    return min(costs, key=place)


def frontier_table(collection: Collection, problem: Problem) -> Table | None:
    """Every setting that decides its k beside the best fixed one that costs no more; None without
    either."""
    found = [each for each in stands(collection, problem) if each.tests]
    if not found:
        return None
    runs = collection.of(problem)
    words, scale, unit = runs[0].words, runs[0].scale, unit_of(runs, model_costs(runs))
    rows = []
    for each in sorted(found, key=lambda stand: stand.flops):
        test = each.tests[each.best]
        style = Strong if test.is_significant else str
        rows.append(
            (
                each.setting,
                number(each.mean_k),
                f"{each.flops:.2f}",
                format_mean(each.accuracies, scale),
                each.best,
                *map(style, (test.points, *test.p_cells)),
                _count_better(each),
                str(len(each.accuracies)),
            )
        )
    place = columns(runs)[-1]
    where = f" ({place})" if place == MEAN else ""
    return Table(
        f"{capital(words.measure)} at equal or lower cost on {problem.dataset}{where}",
        (
            *("setting", "mean k", f"FLOPs, x {unit}", words.column),
            *("best fixed that costs no more", f"difference, {scale.steps}", "p", "by Holm"),
            *("fixed that are better", "n"),
        ),
        tuple(rows),
        note=f"FLOPs of the forward pass over those of {unit}. Fixed "
        f"settings and dense that need at most {SLACK:.0%} more of them are rivals; the best is "
        f"chosen by the reported {words.noun} itself. Paired t tests on matched repetitions with "
        "95 % intervals, by Holm for the rivals of a setting. Better: significantly "
        f"(by Holm < {LEVEL}). {_incomplete(found)}{power_sentence(runs)}",
        conditions=conditions(runs),
    )


def _count_better(stand: Stand) -> str:
    """`1 of 3` rivals that could be tested; a dash where none could."""
    tested = sum(test.p is not None for test in stand.tests.values())
    return f"{len(stand.better)} of {tested}" if tested else "-"


def _incomplete(found: Sequence[Stand]) -> str:
    names = dict.fromkeys(name for each in found for name in each.left_out)
    return f"Left out, since they lack repetitions: {', '.join(names)}. " if names else ""


def power_sentence(runs: Sequence[Run]) -> str:
    """The smallest differences between two settings that the repetitions can show; empty where
    fewer than two settings have the same three repetitions."""
    place, cells = columns(runs)[-1], score_cells(runs)
    pool = {name: cells[name, place] for name in dict.fromkeys(run.setting for run in runs)}
    every = {key: score for cell in pool.values() for key, score in cell.items()}
    held = matched(every, pool.values())
    whole = [[cell[r].accuracy for r in held] for cell in pool.values() if set(held) <= cell.keys()]
    if len(whole) < 2 or len(held) < 3:
        return ""
    results = np.array(whole)
    rest = results - results.mean(0) - results.mean(1, keepdims=True) + results.mean()
    freedom = (results.shape[0] - 1) * (results.shape[1] - 1)
    spread = math.sqrt(2 * float((rest**2).sum()) / freedom)
    scale = runs[0].scale
    smallest = {
        count: format_points(detectable(spread, count), scale).lstrip("+")
        for count in sorted({len(held), 10, 30})
    }
    return (
        f"Paired differences of two settings have a standard deviation of "
        f"{format_points(spread, scale).lstrip('+')} {scale.steps} here. A test at {LEVEL:.0%}, "
        f"not corrected, finds with a power of {POWER:.0%} a difference of "
        + ", ".join(f"{size} by {count} repetitions" for count, size in smallest.items())
        + "."
    )

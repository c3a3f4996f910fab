"""Two runs side by side: the difference of their configurations, their scores, their costs.

Accuracies are those of the model that each run's selection rule chose. One run each says nothing
about chance: for that, sweep over seeds. Measured times are compared only where machine, device,
threads and versions agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dynmoe.report.costs import MACHINE, different_facts, model_costs
from dynmoe.report.run import Run, conditions, counted, short_name
from dynmoe.report.tables import Strong, Table, format_number, format_points
from dynmoe.report.words import METRICS, is_points, kind_name, kinds_of, metrics_of


@dataclass(frozen=True)
class Comparison:
    """Sentences and tables on two runs, ready to be shown."""

    sentences: list[str]
    tables: list[Table]
    """The configuration's difference, scores if both report on the same, costs."""
    warnings: list[str]


def compare(a: Run, b: Run) -> Comparison:
    """Run `a` beside run `b`; differences are B minus A."""
    tables = [_configuration(a, b)]
    if _same_test(a, b):
        tables.append(_scores(a, b))
    obstacles = _obstacles(a, b)
    tables.append(_costs(a, b, timed=not obstacles))
    return Comparison(list(_sentences(a, b)), tables, list(_warnings(a, b, obstacles)))


def _same_test(a: Run, b: Run) -> bool:
    return (a.facts["dataset"], a.environment) == (b.facts["dataset"], b.environment)


def _sentences(a: Run, b: Run) -> Iterator[str]:
    for name, run in (("A", a), ("B", b)):
        yield f"{name} is {run.setting or short_name(run)}: {run.folder.path}"
    if not _same_test(a, b):
        tests = (f"{run.facts['dataset']}, {run.environment}" for run in (a, b))
        nouns = "Accuracies" if a.words.nouns == b.words.nouns == "accuracies" else "Scores"
        yield "{} are not compared: A is tested on {}, B on {}.".format(nouns, *tests)
        return
    first, second = a.outcome.accuracy, b.outcome.accuracy
    points = format_points(abs(second - first))[1:]
    verdict = f"{points} points {'above' if second > first else 'below'}"
    yield (
        f"On {a.environment}, B is {'level with' if second == first else verdict} A: "
        f"{_amount(b, second)} against {_amount(a, first)}."
    )
    seeds = [f"seed {seed}, trial seed {trial}" for seed, trial in (a.repetition, b.repetition)]
    if a.repetition == b.repetition:
        yield f"They are matched: both ran with {seeds[0]}. Only more seeds rule out chance."
    else:
        yield f"They are not matched: A ran with {seeds[0]}, B with {seeds[1]}."


def _warnings(a: Run, b: Run, obstacles: list[str]) -> Iterator[str]:
    facts = [a.facts, b.facts]
    rules = different_facts(facts, ("protocol", "selection"))
    if rules:
        yield f"Rules differ, so the {a.words.nouns} mean different things: {', '.join(rules)}."
    data = different_facts(facts, ("data_hash",))
    if data and _same_test(a, b):
        yield f"Other data or other splits of them: {data[0]}."
    if obstacles:
        yield f"Times and memory are not compared: {', '.join(obstacles)}."


def _obstacles(a: Run, b: Run) -> list[str]:
    """Reasons not to compare measured times."""
    facts = [a.facts, b.facts]
    versions: list[dict[str, Any]] = [fact.get("versions") or {} for fact in facts]
    unknown = [key for key in (*MACHINE, "versions") if any(not fact.get(key) for fact in facts)]
    return [
        *(f"{key} is not recorded" for key in unknown),
        *different_facts(facts, [key for key in MACHINE if key not in unknown]),
        *different_facts(versions, sorted(versions[0] | versions[1]) if all(versions) else []),
    ]


def _configuration(a: Run, b: Run) -> Table:
    keys = sorted(a.config.keys() | b.config.keys())
    rows = [(key, _value(a.config, key), _value(b.config, key)) for key in keys]
    differing = tuple((key, first, second) for key, first, second in rows if first != second)
    count = f"{counted(len(differing), 'key')} differ{'s' * (len(differing) == 1)}"
    return Table(
        f"Configuration: {count}",
        ("key", "A", "B"),
        differing,
        note="–: the key is absent." if any("–" in row for row in differing) else "",
        in_words=True,
    )


def _scores(a: Run, b: Run) -> Table:
    """On each set that both have: what is reported, each metric, where several make the score, and
    each kind of question."""
    reported = a.facts["reported"]
    rows: list[tuple[str, ...]] = []
    for name in (name for name in a.scores if name in b.scores):
        ours, theirs = a.scores[name], b.scores[name]
        measures = {reported["measure"]: a.words.measure}
        measures |= {key: METRICS[key] for key in metrics_of(ours)}
        measures |= {key: kind_name(key) for key in kinds_of(ours) if not is_points(key)}
        for key, measure in measures.items():
            row = _shares(ours.get(key, math.nan), theirs.get(key, math.nan))
            is_reported = name in reported["sets"] and key == reported["measure"]
            rows.append((name, measure, *(map(Strong, row) if is_reported else row)))
    validation = _shares(a.outcome.validation, b.outcome.validation)
    if len(a.facts["selects"]["sets"]) > 1:
        rows.append(("mean of those that select", a.words.measure, *validation))
    return Table(
        f"Scores times 100, A at step {a.outcome.step}, B at step {b.outcome.step}",
        (a.words.part, "measure", "A", "B", "B − A, points"),
        tuple(rows),
        conditions=conditions([a, b]),
    )


def _shares(first: float, second: float) -> tuple[str, ...]:
    difference = second - first
    points = "–" if math.isnan(difference) else format_points(difference)
    return format_number(100 * first, ".1f"), format_number(100 * second, ".1f"), points


def _costs(a: Run, b: Run, timed: bool) -> Table:
    first, second = (model_costs([run])[run.setting] for run in (a, b))
    rows = [
        ("experts per MoE layer", first.experts, second.experts, ".1f"),
        (f"experts per token (mean k on {a.environment})", first.mean_k, second.mean_k, ".2f"),
        ("parameters in training", first.total, second.total, ",.0f"),
        ("parameters of living experts and the rest", first.exported, second.exported, ",.0f"),
        ("parameters activated per token", first.activated, second.activated, ",.0f"),
        ("FLOPs per sample, forward", first.flops, second.flops, ",.0f"),
    ]
    names, forms = ("training, s", "training step, s", "peak memory, GiB"), (",.0f", ".3f", ".2f")
    measured = [_cost(*row) for row in zip(names, _measured(a), _measured(b), forms, strict=True)]
    if not timed:
        measured = [(*cells, "–") for *cells, _ in measured]
    return Table(
        "Cost",
        ("", "A", "B", "B / A"),
        (*(_cost(*row) for row in rows), *measured),
        note="Counts are of the reported models, but those in training; experts and k "
        "are means over MoE layers. Times are those of the runs, which may have shared their "
        "machine; `dynmoe-bench step` measures them interleaved.",
        conditions=conditions([a, b]),
    )


def _measured(run: Run) -> tuple[float, float, float]:
    """Seconds of all training steps, of one, and GiB."""
    return run.steps_taken * run.step_seconds, run.step_seconds, run.peak_memory


def _cost(name: str, first: float, second: float, form: str) -> tuple[str, ...]:
    ratio = second / first if first else math.nan
    return (
        name,
        format_number(first, form),
        format_number(second, form),
        format_number(ratio, ".2f"),
    )


def _value(config: dict[str, Any], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else "–"


def _amount(run: Run, share: float) -> str:
    return f"{100 * share:.1f}{run.words.unit}"

"""Two runs side by side: what differs in their configurations, what came out, what it cost.

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
from dynmoe.report.summary import summarize
from dynmoe.report.tables import Strong, Table, format_number, format_points
from dynmoe.report.words import METRICS, is_points, kind_name, kinds_of, metrics_of


@dataclass(frozen=True)
class Comparison:
    """What two runs have to say about each other, ready to be shown."""

    sentences: list[str]
    tables: list[Table]
    """The configuration's difference, accuracies if both are about one problem, costs."""
    warnings: list[str]


def compare(a: Run, b: Run) -> Comparison:
    """Run `a` beside run `b`; differences are B minus A."""
    tables = [_configuration(a, b)]
    if _same_test(a, b):
        tables.append(_scores(a, b) if a.problem.on_sets else _accuracy(a, b))
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
        yield f"They are matched: both ran with {seeds[0]}. Only more seeds tell chance apart."
    else:
        yield f"They are not matched: A ran with {seeds[0]}, B with {seeds[1]}."


def _warnings(a: Run, b: Run, obstacles: list[str]) -> Iterator[str]:
    facts = [a.facts, b.facts]
    rules = different_facts(facts, ("protocol", "selection"))
    if rules:
        yield f"Other rules, so the {a.words.nouns} mean different things: {', '.join(rules)}."
    data = different_facts(facts, ("data_hash",))
    if data and _same_test(a, b):
        what = "examples" if a.problem.on_sets else "images"
        yield f"Other {what} or other splits of them: {data[0]}."
    if obstacles:
        yield f"Times and memory are not compared: {', '.join(obstacles)}."


def _obstacles(a: Run, b: Run) -> list[str]:
    """What forbids to compare measured times."""
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


def _accuracy(a: Run, b: Run) -> Table:
    """On both splits of each environment; what the protocol reports stands out."""
    first, second = a.reported, b.reported
    rows: list[tuple[str, ...]] = []
    for index, name in enumerate(a.facts["env_names"]):
        is_test = index in a.facts["test_envs"]
        for split in ("in", "out"):
            key = f"env{index}_{split}_acc"
            row = _accuracies(first.get(key, math.nan), second.get(key, math.nan))
            cells = map(Strong, row) if is_test and split == "in" else row
            rows.append((f"{name} (test)" if is_test else name, split, *cells))
    validation = _accuracies(a.outcome.validation, b.outcome.validation)
    rows.append(("training mean", "out", *validation))
    return Table(
        f"Accuracy in per cent, A at step {a.outcome.step}, B at step {b.outcome.step}",
        ("environment", "split", "A", "B", "B − A, points"),
        tuple(rows),
        conditions=conditions([a, b]),
    )


def _scores(a: Run, b: Run) -> Table:
    """On each evaluation set that both have, by each metric, where several make the score, and by
    kind of question."""
    names = [name for name in a.facts["env_names"] if name in b.facts["env_names"]]
    metrics = metrics_of(a.reported, names[0])
    measures = {"score": a.words.measure} | {key: METRICS[key] for key in metrics}
    rows: list[tuple[str, ...]] = []
    for name in names:
        kinds = kinds_of(a.reported, name, a.facts["env_names"])
        shares = {key: kind_name(key) for key in kinds if not is_points(key)}
        for key, measure in (measures | shares).items():
            values = (run.reported.get(f"{name}_{key}", math.nan) for run in (a, b))
            row = _accuracies(*values)
            is_reported = name == a.environment and key == "score"
            rows.append((name, measure, *(map(Strong, row) if is_reported else row)))
    return Table(
        f"Scores times 100, A at step {a.outcome.step}, B at step {b.outcome.step}",
        (a.words.place, "measure", "A", "B", "B − A, points"),
        tuple(rows),
        conditions=conditions([a, b]),
    )


def _accuracies(first: float, second: float) -> tuple[str, ...]:
    difference = second - first
    points = "–" if math.isnan(difference) else format_points(difference)
    return format_number(100 * first, ".1f"), format_number(100 * second, ".1f"), points


def _costs(a: Run, b: Run, timed: bool) -> Table:
    first, second = (model_costs([run])[run.setting] for run in (a, b))
    tested = a.environment if a.problem.on_sets else "test"
    rows = [
        ("experts per MoE layer", first.experts, second.experts, ".1f"),
        (f"experts per token (mean k on {tested})", first.mean_k, second.mean_k, ".2f"),
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
        note="Counts are of the models that selection chose, but those in training; experts and k "
        "are means over MoE layers. Times are those of the runs, which may have shared their "
        "machine; `dynmoe-bench step` measures in turns.",
        conditions=conditions([a, b]),
    )


def _measured(run: Run) -> tuple[float, float, float]:
    """Seconds of all training steps, of one, and GiB."""
    summary = summarize(run.folder)
    seconds = 1 / summary.steps_per_second
    return (summary.last_step + 1) * seconds, seconds, summary.peak_memory


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

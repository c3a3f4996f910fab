"""One run, or two side by side, on the console: title, scores, experts, costs, configurations.

The summary of one run is also its summary.md. Scores, k and parameters describe one model: the one
at the step that the selection rule chose, or the last one where a single run cannot decide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from dynmoe.metrics.efficiency import activated, exported
from dynmoe.report import mixing
from dynmoe.report.costs import MACHINE, model_costs
from dynmoe.report.run import DENSE, NOT_FINITE, Run, conditions, counted, different_facts
from dynmoe.report.runs import different_tokens
from dynmoe.report.set_tables import kind_tables, parts_table
from dynmoe.report.tables import (
    Scale,
    Strong,
    Table,
    format_number,
    format_points,
    format_result,
    to_rich,
)
from dynmoe.report.tables import to_markdown as to_markdown_rows
from dynmoe.report.words import (
    METRICS,
    capital,
    is_points,
    kind_name,
    kinds_of,
    layer_name,
    measure_number,
    metrics_of,
    scale_of,
    set_notes,
)
from dynmoe.selection import RULES


def to_console(run: Run) -> RenderableType:
    """For `rich.print`."""
    facts = RichTable.grid(padding=(0, 2))
    for name, value in _facts(run):
        facts.add_row(Text(name, style="dim"), Text(value))
    parts: list[RenderableType] = [Text(_title(run), style="bold"), Text(_setting(run))]
    for table in _tables(run):
        parts += ["", to_rich(table)]
    return Group(*parts, "", facts)


def to_markdown(run: Run) -> str:
    """For `summary.md` in the run folder; figures are linked relative to it."""
    parts = [f"# {_title(run)}", _setting(run)]
    for table in _tables(run):
        parts += [f"## {table.title}", to_markdown_rows(table), table.note]
    parts += ["## Run", "\n".join(f"- {name}: {value}" for name, value in _facts(run))]
    if figures := _figures(run):
        parts.append("## Figures")
        parts += [f"![{name.removesuffix('.png')}](figures/{name})" for name in figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(run: Run) -> str:
    name = DENSE if run.kind == "dense" else run.facts["algorithm"]
    title = f"{name} on {run.facts['dataset']}"
    return f"{title}, {run.words.place} {run.environment}" if run.tested else title


def _setting(run: Run) -> str:
    facts, stage = run.facts, ""
    if facts.get("stage") is not None:
        start = run.config.get("stage.start")
        stage = f"Stage {facts['stage']}{f', started from {start}' if start else ''}. "
    return (
        f"{stage}Protocol {facts['protocol']}, selection {RULES[facts['selection']]}; "
        f"seed {facts['seed']}, trial seed {facts['trial_seed']}, "
        f"hparams seed {facts['hparams_seed']}; backbone {facts['backbone']}, {facts['weights']}"
    )


def _tables(run: Run) -> Iterator[Table]:
    yield _scores(run)
    for table in kind_tables([run]).values():
        yield replace(table, conditions="")
    if run.layers:
        yield _experts(run)
    sources = mixing.sources_table(run)
    if sources is not None:
        yield sources
    parts = parts_table([run])
    if parts is not None:
        yield replace(parts, conditions="")


def _scores(run: Run) -> Table:
    """A row for each set; a column for what is reported, for the metrics that it is the mean of,
    if there are several, and for the loss."""
    measure = run.facts["reported"]["measure"]
    metrics = list(dict.fromkeys(key for each in run.scores.values() for key in metrics_of(each)))
    columns = list(dict.fromkeys([measure, *metrics, "loss"]))
    roles = {name: "selects" for name in run.facts["selects"]["sets"] if run.problem.validates}
    roles |= dict.fromkeys(run.facts["reported"]["sets"], "reported")
    rows: list[tuple[str, ...]] = []
    for name, scores in run.scores.items():
        role = roles.get(name)
        first, *others = (measure_number(key, scores.get(key, float("nan"))) for key in columns)
        shown = Strong(first) if role == "reported" else first
        rows.append((f"{name} ({role})" if role else name, shown, *others))
    if len(run.scores) > 1 and run.tested == run.facts["reported"]["sets"] != run.tested[:1]:
        shown = Strong(measure_number(measure, run.outcome.accuracy))
        rows.append(("mean of those reported", shown, *[""] * (len(columns) - 1)))
    if list(roles.values()).count("selects") > 1:
        mean = measure_number(measure, run.outcome.validation)
        rows.append(("mean of those that select", mean, *[""] * (len(columns) - 1)))
    return Table(
        f"Scores at {_step(run)}",
        (run.words.part, run.words.column, *(METRICS.get(key, key) for key in columns[1:])),
        tuple(rows),
        note="\n".join([*set_notes(list(run.scores)), *_baseline(run)]),
    )


def _baseline(run: Run) -> Iterator[str]:
    baseline = run.facts["baseline"] or {"scores": {}}
    reported, scale = run.facts["reported"], run.scale
    for name in reported["sets"]:
        share = baseline["scores"].get(name, {}).get(reported["measure"])
        if share is not None:
            yield f"{baseline['name']}: {format_result(share, scale)} on {name}"
    if "majority" in baseline:
        yield f"most frequent answer of all: {100 * baseline['majority']:.1f} %"
    if run.facts.get("stage") == "align":
        yield "This stage trains on captions alone; answers come with the next one."


def _experts(run: Run) -> Table:
    at_step, rows = f"at step {run.outcome.step}", []
    for layer in run.layers:
        changes = f" (+{layer.added}, −{layer.removed})" if layer.added or layer.removed else ""
        experts = (f"{layer.start} → {layer.end}{changes}", str(layer.experts))
        k = (format_number(each, ".2f") for each in (layer.k_train, layer.k_test))
        unrouted = format_number(100 * layer.unrouted, ".1f", " %")
        rows.append((layer_name(layer.name), *experts, *k, unrouted))
    k_test = f"mean k, {run.environment or 'all'}"
    return Table(
        "Experts",
        ("MoE layer", "experts", at_step, "mean k, train", k_test, "unrouted"),
        tuple(rows),
        note="experts: start → end of the run; k: experts per token; unrouted: training tokens "
        f"that chose none; all but the first {at_step}.",
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    facts = run.facts
    steps, taken = facts["steps"], run.steps_taken
    if run.nonfinite_step is not None:
        yield "diverged", f"{NOT_FINITE.format(run.nonfinite_step)}; reports leave this run out"
    if run.results[-1].get("stopped_early"):
        yield "stopped early", f"after {taken} of {steps} steps (patience {facts['patience']})"
    elif taken < steps:
        yield "unfinished", f"{taken} of {steps} steps are recorded"
    experts = {layer.name: layer.experts for layer in run.layers}
    total = exported(facts["costs"], experts)
    if run.layers:
        used = activated(facts["costs"], experts, {each.name: each.k_test for each in run.layers})
        yield "parameters", f"{total:,} (living experts only)"
        where = run.environment or "all"
        yield "activated per token", f"{format_number(used, ',.0f')} (at the mean k on {where})"
    else:
        why = "no MoE layer" if run.kind == "dense" else "no routing of single tokens"
        yield "parameters", f"{total:,}, all of them active ({why})"
    if "mean_tokens" in facts:
        yield "length", f"{facts['mean_tokens']:.1f} tokens per {run.words.example}, on average"
    if probes := mixing.probe_time(run):
        yield "data mixing", probes
    loss = format_number(run.results[-1].get("loss", float("nan")), ".4f")
    yield "training loss", f"{loss} (mean over the last window)"
    cut = {name: count for name, count in run.reported.get("cut_answers", {}).items() if count}
    if cut:
        shown = [f"{count} of {facts['sizes'][name]} on {name}" for name, count in cut.items()]
        yield "cut answers", f"{', '.join(shown)} (data.max_new_tokens allows longer ones)"
    yield "speed", f"{1 / run.step_seconds:.2f} steps/s on {facts['device']}"
    settings = facts["runtime"]
    attention, optimizer = (
        "fused" if settings[key] else "plain" for key in ("fused_attention", "fused_optimizer")
    )
    waits = f" ({settings['wait']})" if "wait" in settings else ""  # of older runs nobody knows
    yield (
        "runtime",
        f"{facts['threads']} threads{waits}, {settings['precision']}, "
        f"matmul {settings['matmul_precision']}, malloc {settings['malloc']}, "
        f"{attention} attention, {optimizer} optimizer",
    )
    gain = facts.get("bf16_gain") or 1
    if gain >= WORTH_SAYING:
        yield (
            "faster here",
            f"trainer.precision=bf16-mixed: this CPU has bf16 matrix units; products of this "
            f"model's size ran {gain:.1f} x as fast as in fp32",
        )
    yield "peak memory", f"{run.peak_memory:.2f} GiB"
    yield "figures", ", ".join(_figures(run)) or "none"


WORTH_SAYING = 2.0
"""Ratio of speeds of products, of which a step has other parts too."""


def _figures(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder.path / "figures").glob("*.png"))


def _step(run: Run) -> str:
    step = f"{run.outcome.step} of {run.facts['steps']}"
    if "epoch" in run.reported:
        step += f" (epoch {run.reported['epoch']:.1f})"
    if not run.problem.validates:
        return f"the last step, {step}"
    if run.outcome.is_selected:
        return f"the selected step, {step}"
    rule = RULES[run.facts["selection"]]
    return f"the last step, {step}; {rule} does not decide within one run"


# Two runs: one run each says nothing about chance; for that, sweep over seeds. Measured times are
# compared only where machine, device, threads and versions agree.


@dataclass(frozen=True)
class Comparison:
    """Sentences and tables on two runs, ready to be shown."""

    sentences: list[str]
    tables: list[Table]
    """The configuration's difference, scores if both report on the same, costs."""
    warnings: list[str]


def compare(a: Run, b: Run) -> Comparison:
    """Run `a` beside run `b`; differences are B minus A."""
    versions = [a.facts["versions"], b.facts["versions"]]
    obstacles = [  # to a comparison of measured times
        *different_facts([a.facts, b.facts], MACHINE),
        *different_facts(versions, sorted(versions[0] | versions[1])),
    ]
    tables = [
        _configuration(a, b),
        *([_scores_of_both(a, b)] if _same_test(a, b) else []),
        _costs_of_both(a, b, timed=not obstacles),
    ]
    return Comparison(list(_sentences(a, b)), tables, list(_warnings(a, b, obstacles)))


def _same_test(a: Run, b: Run) -> bool:
    return (a.facts["dataset"], a.environment) == (b.facts["dataset"], b.environment)


def _sentences(a: Run, b: Run) -> Iterator[str]:
    for name, run in (("A", a), ("B", b)):
        yield f"{name} is {run.setting}: {run.folder.path}"
    if not _same_test(a, b):
        tests = (f"{run.facts['dataset']}, {run.environment}" for run in (a, b))
        nouns = capital(a.words.nouns if a.words.nouns == b.words.nouns else "scores")
        yield "{} are not compared: A is tested on {}, B on {}.".format(nouns, *tests)
        return
    first, second = a.outcome.accuracy, b.outcome.accuracy
    points = f"{format_points(abs(second - first), a.scale)[1:]} {a.scale.steps}"
    verdict = f"{points} {'above' if second > first else 'below'}"
    theirs, ours = (format_result(run.outcome.accuracy, run.scale) for run in (b, a))
    yield (
        f"On {a.environment}, B is {'level with' if second == first else verdict} A: "
        f"{theirs} against {ours}."
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
    for warning in different_tokens(facts) if _same_test(a, b) else ():
        yield f"{capital(warning)}."
    if obstacles:
        yield f"Times and memory are not compared: {', '.join(obstacles)}."


def _configuration(a: Run, b: Run) -> Table:
    """Differences among the keys that both have; the others, such as those of another router, are
    named once."""
    ours, theirs = (
        {key: json.dumps(value, ensure_ascii=False) for key, value in run.config.items()}
        for run in (a, b)
    )
    differing = tuple(
        (key, ours[key], theirs[key])
        for key in sorted(ours.keys() & theirs.keys())
        if ours[key] != theirs[key]
    )
    count = f"{counted(len(differing), 'key')} differ{'s' * (len(differing) == 1)}"
    alone = {"A": ours.keys() - theirs.keys(), "B": theirs.keys() - ours.keys()}
    return Table(
        f"Configuration: {count}",
        ("key", "A", "B"),
        differing,
        note="\n".join(
            f"Only {name} has {', '.join(sorted(keys))}." for name, keys in alone.items() if keys
        ),
        in_words=True,
    )


def _scores_of_both(a: Run, b: Run) -> Table:
    """On each set that both have: what is reported, each metric, where several make the score, and
    each kind of question."""
    reported = a.facts["reported"]
    in_shares = a.scale.factor == 100  # as the title says; beside a loss each row names its unit
    rows: list[tuple[str, ...]] = []
    for name in (name for name in a.scores if name in b.scores):
        ours, theirs = a.scores[name], b.scores[name]
        measures = {reported["measure"]: a.words.measure}
        measures |= {key: METRICS[key] for key in metrics_of(ours)}
        measures |= {key: kind_name(key) for key in kinds_of(ours) if not is_points(key)}
        for key, measure in measures.items():
            scale = scale_of(key, measure)
            row = _both(ours.get(key, math.nan), theirs.get(key, math.nan), scale)
            if not in_shares and scale.name != measure:
                measure = f"{measure}, {scale.name}"
            is_reported = name in reported["sets"] and key == reported["measure"]
            rows.append((name, measure, *(map(Strong, row) if is_reported else row)))
    validation = _both(a.outcome.validation, b.outcome.validation, a.scale)
    times, unit = (" times 100", f", {a.scale.steps}") if in_shares else ("", "")
    if len(a.facts["selects"]["sets"]) > 1:
        rows.append(("mean of those that select", a.words.measure, *validation))
    return Table(
        f"Scores{times}, A at step {a.outcome.step}, B at step {b.outcome.step}",
        (a.words.part, "measure", "A", "B", f"B − A{unit}"),
        tuple(rows),
        conditions=conditions([a, b]),
    )


def _both(first: float, second: float, scale: Scale) -> tuple[str, ...]:
    difference, form = second - first, f".{scale.digits}f"
    points = "–" if math.isnan(difference) else format_points(difference, scale)
    numbers = (format_number(scale.factor * value, form) for value in (first, second))
    return *numbers, points


def _costs_of_both(a: Run, b: Run, timed: bool) -> Table:
    first, second = (model_costs([run])[run.setting] for run in (a, b))
    counts: list[tuple[str, float, float, str]] = [
        ("experts per MoE layer", first.experts, second.experts, ".1f"),
        (f"experts per token (mean k on {a.environment})", first.mean_k, second.mean_k, ".2f"),
        ("parameters in training", first.total, second.total, ",.0f"),
        ("parameters of living experts and the rest", first.exported, second.exported, ",.0f"),
        ("parameters activated per token", first.activated, second.activated, ",.0f"),
        ("FLOPs per sample, forward", first.flops, second.flops, ",.0f"),
    ]
    ours, theirs = (run.steps_taken * run.step_seconds for run in (a, b))
    measured = [
        ("training, s", ours, theirs, ",.0f"),
        ("training step, s", a.step_seconds, b.step_seconds, ".3f"),
        ("peak memory, GiB", a.peak_memory, b.peak_memory, ".2f"),
    ]
    rows: list[tuple[str, ...]] = []
    for name, ours, theirs, form in (*counts, *measured):
        comparable = ours and (timed or len(rows) < len(counts))
        ratio = theirs / ours if comparable else math.nan
        cells = (format_number(ours, form), format_number(theirs, form))
        rows.append((name, *cells, format_number(ratio, ".2f")))
    return Table(
        "Cost",
        ("", "A", "B", "B / A"),
        tuple(rows),
        note="Counts are of the reported models, but those in training; experts and k "
        "are means over MoE layers. Times are those of the runs, which may have shared their "
        "machine; `dynmoe-bench step` measures them interleaved.",
        conditions=conditions([a, b]),
    )

"""The summary of one run: the same title, tables and facts on the console and in summary.md.

Scores, k, and parameters describe one model: the one at the step that the selection rule chose, or
the last one where a single run cannot decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from dynmoe.metrics.efficiency import activated, exported
from dynmoe.report.run import Layer, Run
from dynmoe.report.set_tables import kind_tables, parts_table
from dynmoe.report.tables import Strong, Table, format_number, to_rich
from dynmoe.report.tables import to_markdown as to_markdown_rows
from dynmoe.report.words import METRICS, layer_name, measure_number, metrics_of, set_notes
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
    title = f"{run.facts['algorithm']} on {run.facts['dataset']}"
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
    parts = parts_table([run])
    if parts is not None:
        yield replace(parts, conditions="")


def _scores(run: Run) -> Table:
    """A row for each set; a column for what is reported, for the metrics that it is the mean of,
    if there are several, and for the loss."""
    measure = run.facts["reported"]["measure"]
    metrics = list(dict.fromkeys(key for each in run.scores.values() for key in metrics_of(each)))
    columns = [measure, *metrics, "loss"]
    roles = {name: "selects" for name in run.facts["selects"]["sets"] if run.problem.validates}
    roles |= dict.fromkeys(run.facts["reported"]["sets"], "reported")
    rows: list[tuple[str, ...]] = []
    for name, scores in run.scores.items():
        role = roles.get(name)
        first, *others = (measure_number(key, scores.get(key, float("nan"))) for key in columns)
        shown = Strong(first) if role == "reported" else first
        rows.append((f"{name} ({role})" if role else name, shown, *others))
    if list(roles.values()).count("selects") > 1:
        mean = measure_number(measure, run.outcome.validation)
        rows.append(("mean of those that select", mean, *[""] * (len(columns) - 1)))
    return Table(
        f"Scores at {_step(run)}",
        (run.words.part, run.words.column, *(METRICS[key] for key in metrics), "loss"),
        tuple(rows),
        note="\n".join([*set_notes(list(run.scores)), *_baseline(run)]),
    )


def _baseline(run: Run) -> Iterator[str]:
    baseline = run.facts["baseline"] or {"scores": {}}
    reported, unit = run.facts["reported"], run.words.unit
    for name in reported["sets"]:
        share = baseline["scores"].get(name, {}).get(reported["measure"])
        if share is not None:
            yield f"{baseline['name']}: {format_number(100 * share, '.1f', unit)} on {name}"
    if "majority" in baseline:
        yield f"most frequent answer of all: {100 * baseline['majority']:.1f} %"
    if run.facts.get("stage") == "align":
        yield "This stage trains on captions alone; answers come with the next one."


def _experts(run: Run) -> Table:
    at_step = f"at step {run.outcome.step}"
    return Table(
        "Experts",
        (
            "MoE layer",
            "experts",
            at_step,
            "mean k, train",
            f"mean k, {run.environment or 'all'}",
            "unrouted",
        ),
        tuple(
            (
                layer_name(layer.name),
                _growth(layer),
                str(layer.experts),
                format_number(layer.k_train, ".2f"),
                format_number(layer.k_test, ".2f"),
                format_number(100 * layer.unrouted, ".1f", " %"),
            )
            for layer in run.layers
        ),
        note="experts: start → end of the run; k: experts per token; unrouted: training tokens "
        f"that chose none; all but the first {at_step}.",
    )


def _growth(layer: Layer) -> str:
    if layer.added == layer.removed == 0:
        return f"{layer.start} → {layer.end}"
    return f"{layer.start} → {layer.end} (+{layer.added}, −{layer.removed})"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    facts = run.facts
    steps, taken = facts["steps"], run.steps_taken
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
        yield "parameters", f"{total:,}, all of them active (no MoE layer)"
    if "mean_tokens" in facts:
        yield "length", f"{facts['mean_tokens']:.1f} tokens per {run.words.example}, on average"
    loss = format_number(run.results[-1].get("loss", float("nan")), ".4f")
    yield "training loss", f"{loss} (mean over the last window)"
    yield "speed", f"{format_number(1 / run.step_seconds, '.2f')} steps/s on {facts['device']}"
    yield "runtime", _runtime(facts)
    yield "peak memory", format_number(run.peak_memory, ".2f", " GiB")
    yield "figures", ", ".join(_figures(run)) or "none"


def _runtime(facts: dict[str, Any]) -> str:
    settings = facts["runtime"]
    attention, optimizer = (
        "fused" if settings[key] else "plain" for key in ("fused_attention", "fused_optimizer")
    )
    return (
        f"{facts['threads']} threads, {settings['precision']}, "
        f"matmul {settings['matmul_precision']}, "
        f"malloc {settings['malloc']}, {attention} attention, {optimizer} optimizer"
    )


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

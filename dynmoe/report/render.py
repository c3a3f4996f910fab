"""A summary for people: the same title, tables and facts on the console and in summary.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from dynmoe.metrics.selection import RULES
from dynmoe.report.summary import Layer, Summary
from dynmoe.report.tables import Strong, Table, format_number, to_rich
from dynmoe.report.tables import to_markdown as to_markdown_rows


def to_console(summary: Summary) -> RenderableType:
    """For `rich.print`."""
    facts = RichTable.grid(padding=(0, 2))
    for name, value in _facts(summary):
        facts.add_row(Text(name, style="dim"), Text(value))
    parts: list[RenderableType] = [Text(_title(summary), style="bold"), Text(_setting(summary))]
    for table in _tables(summary):
        parts += ["", to_rich(table)]
    return Group(*parts, "", facts)


def to_markdown(summary: Summary) -> str:
    """For `summary.md` in the run folder; figures are linked relative to it."""
    parts = [f"# {_title(summary)}", _setting(summary)]
    for table in _tables(summary):
        parts += [f"## {table.title}", to_markdown_rows(table), table.note]
    parts += ["## Run", "\n".join(f"- {name}: {value}" for name, value in _facts(summary))]
    if summary.figures:
        parts.append("## Figures")
        parts += [f"![{name.removesuffix('.png')}](figures/{name})" for name in summary.figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(summary: Summary) -> str:
    title = f"{summary.run['algorithm']} on {summary.run['dataset']}"
    tested = [environment.name for environment in summary.environments if environment.is_test]
    return f"{title}, tested on {', '.join(tested)}" if tested else title


def _setting(summary: Summary) -> str:
    run = summary.run
    return (
        f"Protocol {run['protocol']}, selection {RULES[run['selection']]}; "
        f"seed {run['seed']}, trial seed {run['trial_seed']}, "
        f"hparams seed {run['hparams_seed']}; backbone {run['backbone']}, {run['weights']}"
    )


def _tables(summary: Summary) -> Iterator[Table]:
    if summary.environments:
        yield _accuracy(summary)
    if summary.layers:
        yield _experts(summary)


def _accuracy(summary: Summary) -> Table:
    rows: list[tuple[str, ...]] = []
    for environment in summary.environments:
        in_cell, out_cell = _percent(environment.in_accuracy), _percent(environment.out_accuracy)
        if environment.is_test:
            rows.append((f"{environment.name} (test)", "", "", Strong(in_cell), out_cell))
        else:
            rows.append((environment.name, in_cell, out_cell, "", ""))
    training = [environment for environment in summary.environments if not environment.is_test]
    if len(training) > 1:
        mean_in = sum(environment.in_accuracy for environment in training) / len(training)
        mean_out = sum(environment.out_accuracy for environment in training) / len(training)
        rows.append(("training mean", _percent(mean_in), _percent(mean_out), "", ""))
    return Table(
        f"Accuracy at {_step(summary)}",
        ("environment", "train-in", "train-out", "test-in (reported)", "test-out"),
        tuple(rows),
        note="\n".join(_baseline(summary)),
    )


def _baseline(summary: Summary) -> Iterator[str]:
    baseline = summary.run["baseline"] or {}
    for index, environment in enumerate(summary.environments):
        if environment.is_test and f"env{index}_in_acc" in baseline:
            accuracy = _percent(baseline[f"env{index}_in_acc"])
            yield f"{baseline['name']}, same split: {accuracy} on {environment.name}, test-in"


def _experts(summary: Summary) -> Table:
    at_step = f"at step {summary.step}"
    return Table(
        "Experts",
        (
            "MoE layer",
            "experts",
            at_step,
            "mean k, train",
            "mean k, test",
            "unrouted",
        ),
        tuple(
            (
                layer.name,
                _growth(layer),
                str(layer.experts),
                format_number(layer.k_train, ".2f"),
                format_number(layer.k_test, ".2f"),
                _percent(layer.unrouted),
            )
            for layer in summary.layers
        ),
        note="experts: start → end of the run; k: experts per token; unrouted: training tokens "
        f"that chose none; all but the first {at_step}.",
    )


def _growth(layer: Layer) -> str:
    if layer.added == layer.removed == 0:
        return f"{layer.start} → {layer.end}"
    return f"{layer.start} → {layer.end} (+{layer.added}, −{layer.removed})"


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    steps = summary.run["steps"]
    if summary.last_step + 1 < steps:
        yield "unfinished", f"{summary.last_step + 1} of {steps} steps are recorded"
    if summary.layers:
        yield "parameters", f"{summary.total_parameters:,} (living experts only)"
        activated = format_number(summary.activated_parameters, ",.0f")
        yield "activated per token", f"{activated} (at the mean k on test)"
    else:
        yield "parameters", f"{summary.total_parameters:,}, all of them active (no MoE layer)"
    yield "training loss", f"{format_number(summary.loss, '.4f')} (mean over the last window)"
    yield (
        "speed",
        f"{format_number(summary.steps_per_second, '.2f')} steps/s on {summary.run['device']}",
    )
    if "runtime" in summary.run:  # which runs of early versions did not record
        yield "runtime", _runtime(summary.run)
    yield "peak memory", format_number(summary.peak_memory, ".2f", " GiB")
    yield "figures", ", ".join(summary.figures) or "none"


def _runtime(run: dict[str, Any]) -> str:
    settings = run["runtime"]
    attention, optimizer = (
        "fused" if settings[key] else "plain" for key in ("fused_attention", "fused_optimizer")
    )
    return (
        f"{run['threads']} threads, {settings['precision']}, "
        f"matmul {settings['matmul_precision']}, "
        f"malloc {settings['malloc']}, {attention} attention, {optimizer} optimizer"
    )


def _step(summary: Summary) -> str:
    if summary.is_selected:
        return f"the selected step, {summary.step} of {summary.run['steps']}"
    rule = RULES[summary.run["selection"]]
    return f"the last step, {summary.step} ({rule} does not decide within one run)"


def _percent(share: float) -> str:
    return format_number(100 * share, ".1f", " %")

"""A summary for people: the same title, tables and facts on the console and in summary.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from dynmoe.report.summary import Layer, Scores, Summary
from dynmoe.report.tables import Strong, Table, format_number, to_rich
from dynmoe.report.tables import to_markdown as to_markdown_rows
from dynmoe.report.words import (
    METRICS,
    PARTS,
    has_fixed_k,
    is_vision_language,
    kind_name,
    kind_number,
    layer_name,
    set_notes,
    unit_of,
    words_of,
)
from dynmoe.selection import RULES, SELECTING_SET, judging_set, reported_key


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
        f"{stage_of(summary)}Protocol {run['protocol']}, selection {RULES[run['selection']]}; "
        f"seed {run['seed']}, trial seed {run['trial_seed']}, "
        f"hparams seed {run['hparams_seed']}; backbone {run['backbone']}, {run['weights']}"
    )


def _tables(summary: Summary) -> Iterator[Table]:
    if summary.environments:
        yield _accuracy(summary)
    if summary.scores:
        yield _scores(summary)
        yield from kind_tables(summary)
    if summary.layers:
        yield _experts(summary)
    parts = parts_table(summary, _tested(summary))
    if parts is not None:
        yield parts


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


def _scores(summary: Summary) -> Table:
    """A column for the score, and for each of the metrics if it is the mean of several."""
    metrics = [key for key in METRICS if any(key in each.metrics for each in summary.scores)]
    selecting = judging_set(summary.run)
    rows: list[tuple[str, ...]] = []
    for each in summary.scores:
        role = "reported" if each.is_reported else "selects" if each.name == selecting else ""
        numbers = (each.score, *(each.metrics.get(key, math.nan) for key in metrics))
        score, *others = (format_number(100 * number, ".1f") for number in numbers)
        name = f"{each.name} ({role})" if role else each.name
        rows.append((name, Strong(score) if each.is_reported else score, *others))
    words = words_of(summary.run)
    return Table(
        f"Scores at {_step(summary)}",
        (words.place, words.column, *(METRICS[key] for key in metrics)),
        tuple(rows),
        note="\n".join(score_notes(summary) or _baseline(summary)),
    )


def _baseline(summary: Summary) -> Iterator[str]:
    run = summary.run
    baseline = run["baseline"] or {}
    for index in sorted(run["test_envs"]):
        key = reported_key(run, index)
        if key in baseline:
            what, split = ("set", "") if summary.scores else ("split", ", test-in")
            number = format_number(100 * baseline[key], ".1f", words_of(run).unit)
            yield f"{baseline['name']}, same {what}: {number} on {run['env_names'][index]}{split}"


def _experts(summary: Summary) -> Table:
    at_step = f"at step {summary.step}"
    return Table(
        "Experts",
        (
            "MoE layer",
            "experts",
            at_step,
            "mean k, train",
            f"mean k, {_tested(summary)}",
            "unrouted",
        ),
        tuple(
            (
                layer_name(layer.name),
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
    if summary.has_stopped_early:
        yield (
            "stopped early",
            f"after {summary.last_step + 1} of {steps} steps (patience {summary.run['patience']})",
        )
    elif summary.last_step + 1 < steps:
        yield "unfinished", f"{summary.last_step + 1} of {steps} steps are recorded"
    if summary.layers:
        yield "parameters", f"{summary.total_parameters:,} (living experts only)"
        activated = format_number(summary.activated_parameters, ",.0f")
        yield "activated per token", f"{activated} (at the mean k on {_tested(summary)})"
    else:
        yield "parameters", f"{summary.total_parameters:,}, all of them active (no MoE layer)"
    if "mean_tokens" in summary.run:
        has_image = is_vision_language(summary.run)
        example = "conversation, its image included" if has_image else "example"
        yield "length", f"{summary.run['mean_tokens']:.1f} tokens per {example}, on average"
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


def _tested(summary: Summary) -> str:
    return ", ".join(each.name for each in summary.scores if each.is_reported) or "test"


def _step(summary: Summary) -> str:
    if SELECTING_SET.get(summary.run["selection"], "") is None:
        return (
            f"the last step, {summary.step} of {summary.run['steps']} (epoch {summary.epoch:.1f})"
        )
    if summary.is_selected:
        epoch = f" (epoch {summary.epoch:.1f})" if summary.scores else ""
        return f"the selected step, {summary.step} of {summary.run['steps']}{epoch}"
    rule = RULES[summary.run["selection"]]
    return f"the last step, {summary.step} ({rule} does not decide within one run)"


def _percent(share: float) -> str:
    return format_number(100 * share, ".1f", " %")


# Tables of a run about images: scores by kind of question, and k by what a token is.


def kind_tables(summary: Summary) -> Iterator[Table]:
    """A row for each kind of question; sets of the same kinds share a table."""
    groups: dict[tuple[str, ...], list[Scores]] = {}
    for each in summary.scores:
        if each.kinds:
            groups.setdefault(tuple(each.kinds), []).append(each)
    for kinds, sets in groups.items():
        names = [each.name for each in sets]
        yield Table(
            f"By kind of question, in {unit_of(kinds)}",
            ("kind", *names),
            tuple(
                (kind_name(kind), *(kind_number(kind, each.kinds[kind]) for each in sets))
                for kind in kinds
            ),
        )


def parts_table(summary: Summary, tested: str) -> Table | None:
    """Mean k of every MoE layer for image, prompt and answer tokens; None if they are not told
    apart, or all have the same k."""
    layers = [layer for layer in summary.layers if layer.k_test_by_part]
    if not layers or has_fixed_k(summary.run):
        return None
    k = {
        layer_name(layer.name): [
            each.get(part, np.nan)
            for each in (layer.k_test_by_part, layer.k_train_by_part)
            for part in PARTS
        ]
        for layer in layers
    }
    if len(layers) > 1:
        k["mean"] = np.mean(list(k.values()), axis=0).tolist()
    return Table(
        "Mean k by part of the conversation",
        ("MoE layer", *(f"{part}, {where}" for where in (tested, "train") for part in PARTS)),
        tuple((name, *(format_number(each, ".2f") for each in row)) for name, row in k.items()),
        note=f"image: patches; prompt: other tokens before the answer; answer: what was said, in "
        f"training what is right, on {tested} what the model said.",
    )


def score_notes(summary: Summary) -> list[str]:
    """How to read the scores of sets of questions; empty for other runs."""
    run = summary.run
    if not is_vision_language(run):
        return []
    notes = set_notes([each.name for each in summary.scores])
    if run["baseline"]:
        reported = judging_set(run)
        same, majority = (100 * run["baseline"][key] for key in (f"{reported}_score", "majority"))
        notes.append(
            f"Without images {reported} gives {same:.1f} % by the most frequent answer to the same "
            f"question, {majority:.1f} % by the most frequent answer of all."
        )
    if run["stage"] == "align":
        notes.append("This stage trains on captions alone; answers come with the next one.")
    return notes


def stage_of(summary: Summary) -> str:
    """`Stage moe, started from vl_instruct/... . `; empty for runs without stages."""
    run = summary.run
    if not is_vision_language(run):
        return ""
    start = run["config"].get("stage.start")
    return f"Stage {run['stage']}{f', started from {start}' if start else ''}. "

"""Figures of one run, drawn from its records: legible in print, safe for colour-blind readers.

Where the curves of many layers would hide one another, each layer has its own panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from dynmoe.records import Record, RunFolder
from dynmoe.report.drawing import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    RED,
    STEP,
    heat_map,
    lay_out,
    over_steps,
    percent_of_rows,
    save,
    whole_numbers,
)
from dynmoe.report.example_figures import draw_examples
from dynmoe.report.part_figures import draw_k_by_part, draw_load_by_part
from dynmoe.report.words import has_fixed_k, is_vision_language, layer_name, words_of
from dynmoe.selection import judging_set, on_sets, reported_key, selected


def draw_all(folder: RunFolder) -> list[Path]:
    """Write the figures of a run into `figures/`, and leave out those with nothing to show."""
    run = folder.read_run()
    results, routing, events = (folder.read(kind) for kind in ("results", "routing", "events"))
    training = [line for line in routing if line["source"] == "train"]
    evaluation = [line for line in routing if line["source"] != "train"]
    with_thresholds = [line for line in training if line["thresholds"] is not None]
    figures: dict[str, Figure] = {}
    if results and on_sets(run["selection"]):
        figures["scores"] = draw_scores(run, results)
    elif results:
        figures["accuracy"] = draw_accuracy(run, results)
    if events:
        figures["experts"] = draw_experts(run, events)
    if training:
        figures["k_per_layer"] = draw_k(run, training)
    if evaluation:
        figures["load"] = draw_load(run, evaluation)
    if with_thresholds:
        figures["thresholds"] = draw_thresholds(run, with_thresholds)
    if results and is_vision_language(run):
        figures |= draw_vision_language(run, results, routing, folder.read("examples"))
    return [
        save(figure, folder.path / "figures" / f"{name}.png") for name, figure in figures.items()
    ]


def draw_accuracy(run: Record, results: Sequence[Record]) -> Figure:
    """Accuracy per environment and split, the selected step, and the baseline if there is one."""
    figure, (axes,) = lay_out(1, width=7.6, height=4)
    steps = [record["step"] for record in results]
    legend = []
    for index in range(len(run["env_names"])):
        is_test = index in run["test_envs"]
        style: dict[str, Any] = {
            "color": "black" if is_test else COLOURS[index % len(COLOURS)],
            "linewidth": 2.6 if is_test else 1.3,
            "zorder": 3 if is_test else 2,
        }
        for split, dash in (("in", "-"), ("out", "--")):
            values = [record.get(f"env{index}_{split}_acc", math.nan) for record in results]
            axes.plot(steps, values, linestyle=dash, **style)
        legend.append(Line2D([], [], label=_environment(run, index), **style))
    legend += [
        Line2D([], [], color=GREY, linestyle="-", label="in split"),
        Line2D([], [], color=GREY, linestyle="--", label="out split"),
    ]
    legend += _marks(axes, run, results, ", in split")
    axes.set(xlabel=STEP, ylabel="accuracy", title=_title(run))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    over_steps(axes)
    figure.legend(handles=legend, loc="outside right center", frameon=False, title="environment")
    return figure


def draw_scores(run: Record, results: Sequence[Record]) -> Figure:
    """The score on every evaluation set, the selected step, and the baseline if there is one."""
    figure, (axes,) = lay_out(1, width=7.6, height=4)
    steps = [record["step"] for record in results]
    reported = [run["env_names"][index] for index in run["test_envs"]]
    names = list(dict.fromkeys([*run["env_names"], judging_set(run)]))
    legend = []
    for index, name in enumerate(names):
        values = [100 * record.get(f"{name}_score", math.nan) for record in results]
        legend += axes.plot(
            steps,
            values,
            color="black" if name in reported else COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=2.6 if name in reported else 1.3,
            marker=".",
            label=f"{name} (reported)" if name in reported else name,
        )
    legend += _marks(axes, run, results, scale=100)
    axes.set(xlabel=STEP, ylabel=words_of(run).column, title=_title(run))
    over_steps(axes)
    last = results[-1]
    steps_per_epoch = (last["step"] + 1) / last["epoch"]  # steps are counted from 0
    epochs = axes.secondary_xaxis(
        "top",
        functions=(
            lambda step: np.add(step, 1) / steps_per_epoch,
            lambda epoch: np.multiply(epoch, steps_per_epoch) - 1,
        ),
    )
    epochs.set_xlabel("epoch")
    epochs.xaxis.set_major_locator(whole_numbers())
    figure.legend(handles=legend, loc="outside right center", frameon=False, title="evaluated on")
    return figure


def _marks(
    axes: Axes, run: Record, results: Sequence[Record], split: str = "", scale: float = 1
) -> list[Line2D]:
    """Lines for the selected step and the baseline, for the legend."""
    lines = []
    choice = selected(results, run["selection"], run["test_envs"])
    if choice is not None:
        line = axes.axvline(choice["step"], color=GREY, linewidth=1, linestyle="-.")
        line.set_label(f"selected step ({choice['step']})")
        lines.append(line)
    baseline = run["baseline"] or {}
    for index in run["test_envs"]:
        key = reported_key(run, index)
        if key in baseline:
            line = axes.axhline(scale * baseline[key], color=GREY, linewidth=1, linestyle=":")
            line.set_label(f"{baseline['name']},\n{run['env_names'][index]}{split}")
            lines.append(line)
    return lines


def _title(run: Record) -> str:
    return f"{run['algorithm']} on {run['dataset']}, protocol {run['protocol']}"


def draw_experts(run: Record, events: Sequence[Record]) -> Figure:
    """Experts per layer over the steps; triangles mark the updates that added or removed some."""
    layers = _layers(run)
    figure, panels = lay_out(len(layers), share=True)
    last_step = max(event["step"] for event in events)
    for layer, axes in zip(layers, panels, strict=True):
        updates = [event for event in events if event["layer"] == layer]
        counts = [run["start_experts"][layer], *(event["after"] for event in updates)]
        steps = [0, *(event["step"] for event in updates), last_step]
        axes.step(steps, [*counts, counts[-1]], where="post", color="black", linewidth=1.4)
        added = [event["step"] for event in updates if event["added"] is not None]
        removed = [event["step"] for event in updates if event["removed"]]
        # At the edges of the panel, where the marks of dense updates cannot hide the curve.
        at_edge: dict[str, Any] = {
            "linestyle": "none",
            "markersize": 4,
            "transform": axes.get_xaxis_transform(),
        }
        axes.plot(added, [0.93] * len(added), marker="^", color=BLUE, **at_edge)
        axes.plot(removed, [0.07] * len(removed), marker="v", color=RED, **at_edge)
        lost = sum(len(event["removed"]) for event in updates)
        axes.set_title(f"{layer_name(layer)}: {counts[0]} → {counts[-1]} (+{len(added)}, −{lost})")
        axes.yaxis.set_major_locator(whole_numbers())
        over_steps(axes)
    panels[0].margins(y=0.25)
    figure.supxlabel(STEP)
    figure.supylabel("experts")
    figure.suptitle("Experts per MoE layer")
    legend = [
        Line2D([], [], linestyle="none", marker="^", color=BLUE, label="expert added"),
        Line2D([], [], linestyle="none", marker="v", color=RED, label="experts removed"),
    ]
    figure.legend(handles=legend, loc="outside right center", frameon=False)
    return figure


def draw_k(run: Record, training: Sequence[Record]) -> Figure:
    """Mean k per layer over the steps; beside it how k spreads over tokens at the end."""
    layers = _layers(run)
    figure, (curves, spread) = lay_out(2, width=6, height=max(3, 0.9 + 0.32 * len(layers)))
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    histograms = []
    for index, layer in enumerate(layers):
        lines = _of(training, layer, "train")
        curves.plot(
            [line["step"] for line in lines],
            [line["mean_k"] for line in lines],
            color=colours[index],
            linestyle=DASHES[index % len(DASHES)],  # Neighbours have almost the same colour.
            marker="." if len(lines) == 1 else None,  # of one point there is no line to see
            label=layer_name(layer),
        )
        histograms.append(lines[-1]["k_hist"])
    curves.set(xlabel=STEP, ylabel="mean k (experts per training token)", title="over training")
    over_steps(curves)
    k = range(max(map(len, histograms)))
    rows = list(map(layer_name, layers))
    heat_map(spread, percent_of_rows(histograms, len(k)), rows=rows, columns=k)
    spread.set(xlabel="k (experts per token)", title="at the end: share of training tokens, in %")
    figure.suptitle("How many experts a token activates")
    figure.legend(loc="outside right center", frameon=False, title="MoE layer")
    return figure


def draw_load(run: Record, evaluation: Sequence[Record]) -> Figure:
    """Which experts serve which environment, at the last evaluation."""
    layers, environments = _layers(run), range(len(run["env_names"]))
    figure, panels = lay_out(len(layers), width=4.2, height=0.9 + 0.27 * len(environments))
    for layer, axes in zip(layers, panels, strict=True):
        lines = {index: _of(evaluation, layer, f"env{index}") for index in environments}
        last = {_environment(run, index): found[-1] for index, found in lines.items() if found}
        slots = next(iter(last.values()))["slots"]
        loads = [line["load"] for line in last.values()]
        heat_map(axes, percent_of_rows(loads, len(slots)), rows=list(last), columns=slots)
        axes.set_title(layer_name(layer))
    figure.supxlabel("living expert (slot)")
    part = words_of(run).part
    figure.supylabel(part)
    figure.suptitle(f"Expert load: share of an {part}'s routed tokens, in %")
    return figure


def draw_thresholds(run: Record, training: Sequence[Record]) -> Figure:
    """The threshold of every living expert over the steps; a gap where its slot was empty."""
    layers = _layers(run)
    figure, panels = lay_out(len(layers), share=True)
    slots = sorted({slot for line in training for slot in line["slots"]})
    styles: dict[int, dict[str, Any]] = {
        slot: {
            "color": COLOURS[slot % len(COLOURS)],
            "linestyle": DASHES[slot // len(COLOURS) % len(DASHES)],
            "marker": ".",  # An expert that lived for one evaluation has no line.
            "markersize": 3,
        }
        for slot in slots
    }
    for layer, axes in zip(layers, panels, strict=True):
        lines = _of(training, layer, "train")
        steps = [line["step"] for line in lines]
        by_slot = [dict(zip(line["slots"], line["thresholds"], strict=True)) for line in lines]
        for slot in slots:
            axes.plot(steps, [values.get(slot, math.nan) for values in by_slot], **styles[slot])
        axes.set_title(layer_name(layer))
        over_steps(axes)
    figure.supxlabel(STEP)
    figure.supylabel("threshold")
    figure.suptitle("Thresholds of living experts")
    legend = [Line2D([], [], label=str(slot), **styles[slot]) for slot in slots]
    figure.legend(handles=legend, loc="outside right center", frameon=False, title="slot")
    return figure


def _of(routing: Sequence[Record], layer: str, source: str) -> list[Record]:
    return [line for line in routing if line["layer"] == layer and line["source"] == source]


def _layers(run: Record) -> list[str]:
    return list(run["parameters"]["layers"])


def _environment(run: Record, index: int) -> str:
    name = run["env_names"][index]
    is_test = index in run["test_envs"] and not on_sets(run["selection"])
    return f"{name} (test)" if is_test else name


# The figures that only runs about images have, of the step that is reported.


def draw_vision_language(
    run: Record,
    results: Sequence[Record],
    routing: Sequence[Record],
    examples: Sequence[Record],
) -> dict[str, Figure]:
    """By name; none of a model without MoE layers."""
    step = (selected(results, run["selection"], run["test_envs"]) or results[-1])["step"]
    reported = run["test_envs"][0]
    lines = [line for line in routing if line["step"] == step]
    training, evaluation = (
        [line for line in lines if line["source"] == source]
        for source in ("train", f"env{reported}")
    )
    if not (training and evaluation):
        return {}
    layers, tested = list(run["parameters"]["layers"]), run["env_names"][reported]
    figures = {"load_by_part": draw_load_by_part(layers, evaluation, tested)}
    if not has_fixed_k(run):
        figures["k_by_part"] = draw_k_by_part(layers, training, evaluation, tested)
    at_step = [example for example in examples if example["step"] == step]
    slots = {line["layer"]: line["slots"] for line in evaluation}
    answered = draw_examples(at_step, slots, run["config"].get("data.fit", "pad"))
    return figures if answered is None else {**figures, "examples": answered}

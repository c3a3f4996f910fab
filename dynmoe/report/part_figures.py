"""Pictures of what the tokens of images, prompts and answers use.

A picture without anything to show is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dynmoe.records import Record
from dynmoe.report.document import Picture
from dynmoe.report.drawing import COLOURS, heat_map, lay_out, name_axes, percent_of_rows
from dynmoe.report.routing_figures import layers_of, load_panels, of_layer, on_tests
from dynmoe.report.run import Run, settings
from dynmoe.report.set_tables import has_parts, with_parts
from dynmoe.report.words import PARTS, by_part, k_by_part, layer_name

# Arguments of `Axes.plot` for each part.
LOOKS: dict[str, dict[str, Any]] = {
    "image": {"color": COLOURS[0], "marker": "s", "linestyle": "-"},
    "prompt": {"color": COLOURS[1], "marker": "o", "linestyle": "--"},
    "answer": {"color": COLOURS[2], "marker": "^", "linestyle": ":"},
}
EXPERTS: dict[str, Any] = {"color": "black", "marker": "_", "markersize": 14, "linestyle": "none"}


def draw_k_by_part(runs: Sequence[Run]) -> Picture | None:
    """Mean k by layer for image, prompt and answer tokens, in every setting where k varies."""
    adaptive = with_parts(runs)
    names = settings(adaptive)
    if not names:
        return None
    alike = len({tuple(layers_of(run)) for run in adaptive}) == 1  # axes name their layers
    figure, panels = lay_out(len(names), width=4.6, height=2.8, columns=2, beside=1.6, share=alike)
    for setting, axes in zip(names, panels, strict=True):
        members = [run for run in adaptive if run.setting == setting]
        layers = layers_of(members[0])
        tested = [[of_layer(on_tests(run), layer) for layer in layers] for run in members]
        k = [[k_by_part(lines) for lines in of_run] for of_run in tested]
        for part in PARTS:
            values = np.array([[each[part] for each in of_run] for of_run in k])
            mean = values.mean(axis=0)
            reach = np.abs([values.min(axis=0), values.max(axis=0)] - mean)
            axes.errorbar(range(len(layers)), mean, reach, capsize=3, **LOOKS[part], label=part)
        experts = [[len(lines[0]["slots"]) for lines in of_run] for of_run in tested]
        axes.plot(np.mean(experts, axis=0), **EXPERTS, label="living experts")
        over_layers(axes, layers)
        axes.set_title(setting)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="tokens")
    name_axes(figure, "MoE layer, from the first up", "experts per token")
    tested_on = adaptive[0].environment
    return Picture(
        "k_by_part",
        figure,
        "Experts that a token of an image, of a prompt or of an answer activates, by MoE layer",
        f"Mean k on the evaluation set {tested_on}, mean over runs; bars span the lowest to the "
        "highest run. Image: patches; prompt: other tokens before the answer; answer: what the "
        "model said. Black: the experts there are, which none can exceed.",
    )


def draw_load_by_part(runs: Sequence[Run]) -> Picture | None:
    """Which experts serve images, prompts and answers, in the given runs."""

    def draw(axes: Axes, run: Run, lines: Sequence[Record]) -> None:
        show_load_by_part(axes, [line for line in lines if line["source"] in run.tested])

    figure = load_panels([run for run in runs if has_parts(run)], "tokens", len(PARTS), draw)
    if figure is None:
        return None
    return Picture(
        "load_by_part",
        figure,
        "Share of the routed tokens of images, prompts and answers that each expert serves",
        "A row is a part of the conversations, its numbers the per cent of its routed tokens that "
        "go to each living expert; equal rows mean that all parts use the same experts. "
        "Shades are each panel's own.",
    )


def over_layers(axes: Axes, layers: Sequence[str]) -> None:
    """Layers across, k up from 0; call it when all is drawn."""
    names = list(map(layer_name, layers))
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0)
    axes.margins(x=0.25 if len(names) < 3 else 0.08, y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def show_load_by_part(axes: Axes, lines: Sequence[Record]) -> None:
    """Draw a row for each part, from routing records of one layer."""
    parts, slots = by_part(lines), lines[0]["slots"]
    shares: np.ndarray = percent_of_rows([parts[part].load for part in PARTS], len(slots))
    heat_map(axes, shares, rows=PARTS, columns=slots)

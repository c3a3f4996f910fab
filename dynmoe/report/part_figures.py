"""Figures of a run about images: what the tokens of images, prompts and answers use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.document import Picture
from dynmoe.report.drawing import COLOURS, heat_map, lay_out, name_axes, percent_of_rows
from dynmoe.report.routing_figures import layers_of, load_panels, of_layer, on_tests
from dynmoe.report.run import Run, settings
from dynmoe.report.set_tables import has_parts
from dynmoe.report.words import PARTS, by_part, k_by_part, layer_name

# For `Axes.plot`, of each part.
LOOKS: dict[str, dict[str, Any]] = {
    "image": {"color": COLOURS[0], "marker": "s", "linestyle": "-"},
    "prompt": {"color": COLOURS[1], "marker": "o", "linestyle": "--"},
    "answer": {"color": COLOURS[2], "marker": "^", "linestyle": ":"},
}
EXPERTS: dict[str, Any] = {"color": "black", "marker": "_", "markersize": 14, "linestyle": "none"}


def draw_k_by_part(
    layers: Sequence[str], training: Sequence[Record], evaluation: Sequence[Record], tested: str
) -> Figure:
    """Mean k of every layer for image, prompt and answer tokens, beside the experts there are.

    `training` and `evaluation` are routing records of one step; `tested` names the latter.
    """
    width = max(3.4, 1 + 0.4 * len(layers))
    figure, panels = lay_out(2, width, height=2.9, share=True, beside=1.6)
    titles = ("in training", f"on {tested}")
    for axes, title, lines in zip(panels, titles, (training, evaluation), strict=True):
        of_layer = [[line for line in lines if line["layer"] == layer] for layer in layers]
        k = [k_by_part(found) for found in of_layer]
        for part in PARTS:
            axes.plot([each[part] for each in k], **LOOKS[part], label=part)
        axes.plot(
            [len(found[-1]["slots"]) for found in of_layer], **EXPERTS, label="living experts"
        )
        over_layers(axes, layers)
        axes.set_title(title)
    figure.supylabel("mean k (experts per token)", fontsize="medium")
    figure.suptitle("How many experts a token activates, by what it is")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="tokens")
    return figure


def over_layers(axes: Axes, layers: Sequence[str]) -> None:
    """Layers across, k up from 0; call it when all is drawn."""
    names = list(map(layer_name, layers))
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0)
    axes.margins(x=0.25 if len(names) < 3 else 0.08, y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def draw_load_by_part(layers: Sequence[str], evaluation: Sequence[Record], tested: str) -> Figure:
    """Which experts serve images, prompts and answers, of routing records of one step."""
    figure, panels = lay_out(len(layers), width=4.2, height=1.7)
    for layer, axes in zip(layers, panels, strict=True):
        show_load_by_part(axes, [line for line in evaluation if line["layer"] == layer])
        axes.set_title(layer_name(layer))
    figure.supxlabel("living expert (slot)", fontsize="medium")
    figure.suptitle(f"Expert load on {tested}: share of a part's routed tokens, in %")
    return figure


def show_load_by_part(axes: Axes, lines: Sequence[Record]) -> None:
    """A row for each part, of routing records of one layer."""
    parts, slots = by_part(lines), lines[0]["slots"]
    shares: np.ndarray = percent_of_rows([parts[part].load for part in PARTS], len(slots))
    heat_map(axes, shares, rows=PARTS, columns=slots)


# Pictures of runs about images: what tokens of images, prompts and answers use.
#
# A picture without anything to show is None.


def compare_k_by_part(runs: Sequence[Run]) -> Picture | None:
    """Mean k by layer for image, prompt and answer tokens, in every adaptive setting."""
    adaptive = [run for run in runs if run.kind == "adaptive" and has_parts(run)]
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


def compare_load_by_part(runs: Sequence[Run]) -> Picture | None:
    """Which experts serve images, prompts and answers, in the given runs."""

    def draw(axes: Axes, run: Run, lines: Sequence[Record]) -> None:
        sources = {f"env{index}" for index in run.facts["test_envs"]}
        show_load_by_part(axes, [line for line in lines if line["source"] in sources])

    figure = load_panels([run for run in runs if has_parts(run)], "tokens", len(PARTS), draw)
    if figure is None:
        return None
    return Picture(
        "load_by_part",
        figure,
        "Share of the routed tokens of images, prompts and answers that each expert serves",
        "A row is a part of the conversations, its numbers the per cent of its routed tokens that "
        "go to each living expert; equal rows mean that experts do not tell the parts apart. "
        "Shades are each panel's own.",
    )

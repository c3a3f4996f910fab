"""Figures of a run about images: what the tokens of images, prompts and answers use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.drawing import COLOURS, heat_map, lay_out, percent_of_rows
from dynmoe.report.parts import PARTS, by_part, k_by_part
from dynmoe.report.words import layer_name

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

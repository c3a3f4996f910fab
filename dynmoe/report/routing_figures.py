"""Figures of the routing of one run or many: experts, k, load, and the overlap of environments.

All but the first describe each run's model at the step that its selection rule chose, from the
records of that evaluation. A figure without anything to show is None.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.document import Picture
from dynmoe.report.drawing import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    STEP,
    heat_map,
    lay_out,
    legend_below,
    name_axes,
    over_steps,
    percent_of_rows,
    whole_numbers,
)
from dynmoe.report.run import Run, by_setting, environments
from dynmoe.report.words import PARTS, SHUFFLED, by_part, k_by_part, layer_name

# A heat map cannot name more classes than this.
MOST_CLASSES = 20

# Arguments of `Axes.plot` for each part of a conversation, and for the number of experts.
LOOKS: dict[str, dict[str, Any]] = {
    "image": {"color": COLOURS[0], "marker": "s", "linestyle": "-"},
    "prompt": {"color": COLOURS[1], "marker": "o", "linestyle": "--"},
    "answer": {"color": COLOURS[2], "marker": "^", "linestyle": ":"},
}
EXPERTS: dict[str, Any] = {"color": "black", "marker": "_", "markersize": 14, "linestyle": "none"}
POOL: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": "--"}
SHADES = "Shades are each panel's own."


def draw_experts(runs: Sequence[Run]) -> Picture | None:
    """Living experts over training, in every layer of every adaptive setting."""
    settings = by_setting([run for run in runs if run.events])
    places = list(_places(settings))
    if not places:
        return None
    # Of several settings each has a row, if its layers fit.
    most = max(len(layers_of(members[0])) for members in settings.values())
    columns = most if len(settings) > 1 and most < 3 else 3
    figure, panels = lay_out(
        len(places), width=3.6, height=2.5, beside=0, share=True, columns=columns
    )
    highest = 0.0
    for (setting, layer), axes in zip(places, panels, strict=True):
        members = settings[setting]
        curves = [experts_over_steps(run, layer) for run in members]
        # NOTE: shifted a little, else runs with equally many experts hide one another.
        shifts = np.linspace(-0.2, 0.2, len(curves)) if len(curves) > 1 else [0.0]
        for (steps, counts), shift in zip(curves, shifts, strict=True):
            line = np.asarray(counts) + shift
            axes.step(steps, line, where="post", color=GREY, linewidth=0.7, alpha=0.6)
        changes = np.unique(np.concatenate([steps for steps, _ in curves]))
        mean = np.mean([experts_at(changes, *curve) for curve in curves], axis=0)
        axes.step(changes, mean, where="post", color=BLUE, linewidth=2.4, label="living experts")
        # The mark is the end, also where the last update is close to it.
        axes.plot(changes[-1], mean[-1], "o", color=BLUE, markersize=6)
        pool = max(run.facts["costs"]["slots"][layer] for run in members)
        axes.axhline(pool, **POOL, label="slots of the pool")
        axes.set_title(_title(setting, layer, settings))
        axes.yaxis.set_major_locator(whole_numbers())
        over_steps(axes)
        highest = max(highest, pool)
    panels[0].set_ylim(0, 1.08 * highest)
    handles, _ = panels[0].get_legend_handles_labels()
    legend_below(figure, panels, handles, STEP, columns=2)
    name_axes(figure, "", "living experts")
    return Picture(
        "experts",
        figure,
        "Living experts in each MoE layer over training",
        f"Each thin line is one run (one seed and {runs[0].words.place}), shifted a little; the "
        "thick line is their mean, its mark the end of training. A step up is an expert added, a "
        "step down experts removed. Dashed: the slots of the pool, the most experts there can be.",
    )


def draw_k(runs: Sequence[Run]) -> Picture | None:
    """Mean k beside the number of living experts, by layer, for every adaptive setting."""

    def draw(axes: Axes, members: Sequence[Run]) -> None:
        k = np.array([[layer.k_test for layer in run.layers] for run in members])
        # A line of one layer would be a point.
        mark = "_" if k.shape[1] == 1 else None
        axes.plot(k.T, color=GREY, linewidth=0.8, alpha=0.6, marker=mark)
        axes.plot(k.mean(axis=0), color=BLUE, linewidth=2.2, marker="o", label="mean k")

    adaptive = [run for run in runs if run.kind == "adaptive" and on_tests(run)]
    figure = _k_panels(adaptive, draw)
    if figure is None:
        return None
    words, names = runs[0].words, environments(runs)
    tested = f"{words.place} {names[0]}" if len(names) == 1 else f"{words.place}s"
    return Picture(
        "k_by_layer",
        figure,
        f"Experts that a {words.token} activates, by MoE layer",
        f"Blue: experts that a token of the {tested} activates on average; thin "
        "lines: single runs. Black: the experts there are. Blue near black means that nearly all "
        "are used.",
    )


def draw_budget(runs: Sequence[Run]) -> Picture | None:
    """Mean k over training as a share of the target, for every setting that has one."""
    controlled = by_setting([run for run in runs if run.target_k])
    if not any(run.kind == "varying" for run in runs) or not controlled:
        return None
    figure, (axes,) = lay_out(1, width=6, height=max(3, 0.22 * len(controlled)), beside=2)
    for index, (setting, members) in enumerate(controlled.items()):
        target, found = members[0].target_k, defaultdict[int, list[float]](list)
        assert target is not None
        for run in members:
            for line in run.training_routing:
                found[line["step"]].append(line["mean_k"])
        shares = [float(np.mean(found[step])) / target for step in sorted(found)]
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)]}
        look["linestyle"] = DASHES[index % len(DASHES)]
        axes.plot(sorted(found), shares, marker=".", label=setting, **look)
    axes.axhline(1, color="black", linewidth=0.8, zorder=1)
    axes.axhspan(0.95, 1.05, color=GREY, alpha=0.15, linewidth=0)
    axes.set(xlabel=STEP, ylabel="mean k / target")
    over_steps(axes)
    figure.legend(loc="outside right center", frameon=False)
    return Picture(
        "budget",
        figure,
        "Experts that a training token activates over training, as a share of the target",
        "Mean over MoE layers and runs, of the tokens since the evaluation before. Grey: within "
        "5 % of the target.",
    )


def draw_k_by_part(runs: Sequence[Run]) -> Picture | None:
    """Mean k by layer for image, prompt and answer tokens, in every setting where k varies."""

    def draw(axes: Axes, members: Sequence[Run]) -> None:
        k = [
            [k_by_part(of_layer(on_tests(run), layer)) for layer in layers_of(run)]
            for run in members
        ]
        for part in PARTS:
            values = np.array([[each[part] for each in of_run] for of_run in k])
            mean = values.mean(axis=0)
            reach = np.abs([values.min(axis=0), values.max(axis=0)] - mean)
            axes.errorbar(
                range(len(mean)), mean, reach, capsize=3, **LOOKS[part], label=f"{part} tokens"
            )

    adaptive = with_parts(runs)
    figure = _k_panels(adaptive, draw)
    if figure is None:
        return None
    return Picture(
        "k_by_part",
        figure,
        "Experts that a token of an image, of a prompt or of an answer activates, by MoE layer",
        f"Mean k on the evaluation set {adaptive[0].environment}, mean over runs; bars span the "
        "lowest to the highest run. Image: patches; prompt: other tokens before the answer; "
        "answer: what the model said. Black: the experts there are, which none can exceed.",
    )


def _k_panels(runs: Sequence[Run], draw: Callable[[Axes, Sequence[Run]], None]) -> Figure | None:
    """Draw one panel for each setting: k of its layers, and the number of living experts."""
    settings = by_setting(runs)
    if not settings:
        return None
    alike = len({tuple(layers_of(run)) for run in runs}) == 1  # axes name their layers
    figure, panels = lay_out(
        len(settings), width=4.6, height=2.8, columns=2, beside=1.6, share=alike
    )
    for (setting, members), axes in zip(settings.items(), panels, strict=True):
        draw(axes, members)
        experts = [[layer.experts for layer in run.layers] for run in members]
        axes.plot(np.mean(experts, axis=0), **EXPERTS, label="living experts")
        names = list(map(layer_name, layers_of(members[0])))
        axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0)
        axes.margins(x=0.25 if len(names) < 3 else 0.08, y=0.1)
        axes.set(title=setting, ylim=(0, None))
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    name_axes(figure, "MoE layer, from the first up", f"experts per {runs[0].words.token}")
    return figure


def draw_k_by_position(runs: Sequence[Run]) -> Picture | None:
    """Mean k by layer and position of the token, for every adaptive setting."""
    adaptive = [run for run in runs if run.kind == "adaptive"]
    settings = by_setting(
        [run for run in adaptive if any("k_by_position" in line for line in on_tests(run))]
    )
    if not settings:
        return None
    layers = max((layers_of(members[0]) for members in settings.values()), key=len)
    height = 0.7 + 0.35 * len(layers)
    figure, panels = lay_out(len(settings), width=8, height=height, columns=1, beside=0)
    for (setting, members), axes in zip(settings.items(), panels, strict=True):
        layers = layers_of(members[0])
        k = np.mean([[k_by_position(run, layer) for layer in layers] for run in members], axis=0)
        heat_map(
            axes, k, list(map(layer_name, layers)), range(k.shape[1]), form=".1f", lightest=k.min()
        )
        axes.set_title(setting)
    name_axes(figure, f"token position (0: {runs[0].words.positions})")
    return Picture(
        "k_by_position",
        figure,
        f"Experts that a {runs[0].words.token} activates, by MoE layer and token position",
        "Mean k of the tokens at each position, mean over runs: darker tokens activate more "
        "experts; the shades span the smallest to the largest value.",
    )


def draw_load_by_environment(runs: Sequence[Run]) -> Picture | None:
    """Share of each environment's tokens that each expert serves, in the given runs.

    None for a single set whose parts (image, prompt, answer) are recorded: they have a figure."""

    def loads(run: Run, lines: Sequence[Record]) -> Loads:
        mark = f" ({run.words.mark})"
        rows = [name + mark * (name in run.tested) for name in evaluated(run)]
        return rows, [line["load"] for line in lines]

    rows = max((len(evaluated(run)) for run in runs), default=0)
    if rows == 1 and all("parts" in line for run in runs for line in evaluation(run)):
        return None
    part = runs[0].words.part if runs else ""
    figure = _load_panels([run for run in runs if evaluation(run)], part, rows, loads)
    if figure is None:
        return None
    equal = f"; equal rows mean that experts do not distinguish the {part}s" if rows > 1 else ""
    return Picture(
        "load_by_environment",
        figure,
        f"Share of each {part}'s routed tokens that each expert serves",
        f"A row is an {part}, its numbers the per cent of its routed tokens that go to each "
        f"living expert{equal}. {SHADES}",
    )


def draw_load_by_class(runs: Sequence[Run]) -> Picture | None:
    """Share of each class's tokens that each expert serves, over all environments."""

    def loads(run: Run, lines: Sequence[Record]) -> Loads:
        counts = np.sum([line["load_by_class"] for line in lines], axis=0)
        shares = percent_of_rows(counts.tolist(), counts.shape[1])
        apart = np.abs(shares - shares.mean(axis=0)).sum(axis=1)
        shown = np.sort(np.argsort(-apart, kind="stable")[:MOST_CLASSES])
        return [str(run.facts["class_names"][row]) for row in shown], counts[shown].tolist()

    with_classes = [run for run in runs if any("load_by_class" in line for line in evaluation(run))]
    classes = max((len(run.facts["class_names"]) for run in with_classes), default=0)
    figure = _load_panels(with_classes, "class", min(classes, MOST_CLASSES), loads)
    if figure is None:
        return None
    some = (
        f" Shown are the {MOST_CLASSES} of {classes} classes whose rows differ most from the mean."
    )
    return Picture(
        "load_by_class",
        figure,
        "Share of each class's routed tokens that each expert serves",
        f"A row is a class, its numbers the per cent of its routed tokens, over all "
        f"{runs[0].words.part}s, that go to each living expert; an expert of one class is a dark "
        f"cell in a pale column. {SHADES}" + (some if classes > MOST_CLASSES else ""),
    )


def draw_load_by_part(runs: Sequence[Run]) -> Picture | None:
    """Share of the tokens of images, prompts and answers that each expert serves."""

    def loads(run: Run, lines: Sequence[Record]) -> Loads:
        parts = by_part(line for line in lines if line["source"] in run.tested)
        return PARTS, [parts[part].load for part in PARTS]

    figure = _load_panels([run for run in runs if _has_parts(run)], "tokens", len(PARTS), loads)
    if figure is None:
        return None
    return Picture(
        "load_by_part",
        figure,
        "Share of the routed tokens of images, prompts and answers that each expert serves",
        "A row is a part of the conversations, its numbers the per cent of its routed tokens that "
        f"go to each living expert; equal rows mean that all parts use the same experts. {SHADES}",
    )


Loads = tuple[Sequence[str], Sequence[Sequence[float]]]
"""Names of rows, and for each the tokens that each living expert served."""


def _load_panels(
    runs: Sequence[Run],
    what: str,
    rows: int,
    loads: Callable[[Run, Sequence[Record]], Loads],
) -> Figure | None:
    """Draw one panel for each layer of each run."""
    places = [(run, layer) for run in runs for layer in layers_of(run)]
    if not places:
        return None
    height, columns = 1.1 + 0.27 * rows, _columns([(run.setting, layer) for run, layer in places])
    figure, panels = lay_out(len(places), 4.1, height, columns=columns, beside=0)
    for (run, layer), axes in zip(places, panels, strict=True):
        lines = of_layer(evaluation(run), layer)
        (names, counts), slots = loads(run, lines), lines[0]["slots"]
        heat_map(axes, percent_of_rows(counts, len(slots)), names, slots)
        axes.set_title(f"{run.setting}\n{layer_name(layer)}")
    name_axes(figure, "living expert (slot); numbers: % of a row's routed tokens", what)
    return figure


def draw_overlap(runs: Sequence[Run]) -> Picture | None:
    """How far two environments use the same experts, per layer, as the mean of each setting."""
    most = max(map(evaluated, runs), key=len, default=[])
    settings = by_setting([run for run in runs if len(most) > 1 and evaluated(run) == most])
    places = list(_places(settings))
    if not places:
        return None
    matrices = [
        np.mean([overlap(of_layer(evaluation(run), layer)) for run in settings[setting]], axis=0)
        for setting, layer in places
    ]
    letters = max(len(name) for run in runs for name in evaluated(run))
    side = 0.9 + 0.36 * max(map(len, matrices)) + 0.06 * letters
    width = max(3.2, side + 0.4)
    figure, panels = lay_out(len(places), width, side, columns=_columns(places), beside=0)
    apart = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices])
    shades = {"lightest": apart.min(), "darkest": apart.max()}
    for (setting, layer), matrix, axes in zip(places, matrices, panels, strict=True):
        names = evaluated(settings[setting][0])
        heat_map(axes, matrix, names, names, form=".2f", **shades)
        axes.set_title(_title(setting, layer, settings))
        if letters > 4:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
    part = runs[0].words.part
    name_axes(figure, part, part)
    return Picture(
        "overlap",
        figure,
        f"Routing overlap between {part}s in each MoE layer",
        f"The share of routing that two {part}s have in common, mean over runs: 1 means the "
        "same use of experts, 0 disjoint experts; shades span the values off the diagonal.",
    )


def _places(settings: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, str]]:
    """Yield every layer of every setting; each has its own panel."""
    for setting, members in settings.items():
        for layer in layers_of(members[0]):
            yield setting, layer


def _columns(places: Sequence[tuple[str, str]]) -> int:
    """Return 2, for which a page has room; 1 if that puts layers side by side."""
    return 2 if sum(setting == places[0][0] for setting, _ in places) > 1 else 1


def _title(setting: str, layer: str, settings: Mapping[str, Sequence[Run]]) -> str:
    name = layer_name(layer)
    return name if len(settings) == 1 else f"{setting}\n{name}"


# Numbers from a run's routing records.


def evaluation(run: Run) -> list[Record]:
    """Return the routing on every environment at the reported step, in the environments' order.

    The set of exchanged images is left out: it has the questions of another set.
    """
    left_out = ("train", SHUFFLED)
    return [line for line in run.routing_at_outcome if line["source"] not in left_out]


def on_tests(run: Run) -> list[Record]:
    """Return the routing on the test environments at the reported step."""
    return [line for line in evaluation(run) if line["source"] in run.tested]


def training(run: Run) -> list[Record]:
    """Return the routing in training, over the window that ends at the reported step."""
    return [line for line in run.routing_at_outcome if line["source"] == "train"]


def of_layer(lines: Iterable[Record], layer: str) -> list[Record]:
    return [line for line in lines if line["layer"] == layer]


def layers_of(run: Run) -> list[str]:
    """Names of its MoE layers, from the first up."""
    return list(run.facts["start_experts"])


def evaluated(run: Run) -> list[str]:
    """Names of the environments or sets that were evaluated."""
    return list(dict.fromkeys(line["source"] for line in evaluation(run)))


def _has_parts(run: Run) -> bool:
    return any("parts" in line for line in on_tests(run))


def with_parts(runs: Sequence[Run]) -> list[Run]:
    """Return the runs in which the k of parts is recorded, and varies."""
    return [run for run in runs if "moe.top_k" not in run.config and _has_parts(run)]


def k_by_position(run: Run, layer: str) -> np.ndarray:
    """Experts per token of the test environments, by position of the token."""
    return np.mean([line["k_by_position"] for line in of_layer(on_tests(run), layer)], axis=0)


def experts_over_steps(run: Run, layer: str) -> tuple[list[int], list[int]]:
    """Steps at which the number of living experts changes, and the number from then on."""
    updates = [event for event in run.events if event["layer"] == layer]
    start, last = run.facts["start_experts"][layer], run.results[-1]["step"]
    counts = [start, *(event["after"] for event in updates)]
    return [0, *(event["step"] for event in updates), last], [*counts, counts[-1]]


def experts_at(steps: np.ndarray, changes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Number of living experts at `steps`, from the result of `experts_over_steps`."""
    return np.asarray(counts)[np.searchsorted(changes, steps, side="right") - 1]


def overlap(lines: Sequence[Record]) -> np.ndarray:
    """sum_e min(p_i(e), p_j(e)) for environments i, j, where p_i are the shares of i's load."""
    p = np.array([np.asarray(line["load"]) / max(1, sum(line["load"])) for line in lines])
    return np.minimum(p[:, None], p[None]).sum(axis=-1)

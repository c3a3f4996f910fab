"""Pictures of what the routers of many runs do: experts, k, load, and the overlap of domains.

All but the first describe each run's model at the step that its selection rule chose, from the
evaluation's records. A picture without anything to show is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmoe.report.document import Picture
from dynmoe.report.drawing import (
    BLUE,
    GREY,
    STEP,
    heat_map,
    lay_out,
    over_steps,
    percent_of_rows,
    whole_numbers,
)
from dynmoe.report.records import Record
from dynmoe.report.runs import Run

# More classes than this are more than a heat map can name.
MOST_CLASSES = 20


def draw_experts(runs: Sequence[Run]) -> Picture | None:
    """Living experts over training, in every layer of every adaptive setting."""
    settings = _settings(run for run in runs if run.events)
    places = list(_places(settings))
    if not places:
        return None
    figure, panels = lay_out(len(places), width=3.6, height=2.3, beside=0, share=True)
    for (setting, layer), axes in zip(places, panels, strict=True):
        curves = [_experts(run, layer) for run in settings[setting]]
        for steps, counts in curves:
            axes.step(steps, counts, where="post", color=GREY, linewidth=0.8, alpha=0.6)
        changes = np.unique(np.concatenate([steps for steps, _ in curves]))
        mean = np.mean([_at(changes, *curve) for curve in curves], axis=0)
        axes.step(changes, mean, where="post", color=BLUE, linewidth=2.6)
        axes.set_title(_title(setting, layer, settings))
        axes.yaxis.set_major_locator(whole_numbers())
        over_steps(axes)
    figure.supxlabel(STEP)
    figure.supylabel("living experts")
    return Picture(
        "experts",
        figure,
        "Living experts in each MoE layer over training",
        "Each thin line is one run (one seed and test environment), the thick line their mean; "
        "a step up is an expert added, a step down experts removed.",
    )


def draw_k(runs: Sequence[Run]) -> Picture | None:
    """Mean k beside the number of living experts, by layer, for every adaptive setting."""
    settings = _settings(run for run in runs if run.kind == "adaptive" and _tests(run))
    if not settings:
        return None
    figure, panels = lay_out(len(settings), width=4.6, height=2.8, columns=2, beside=0, share=True)
    for (setting, members), axes in zip(settings.items(), panels, strict=True):
        layers = _layers(members[0])
        places = range(len(layers))
        k = np.array([[_mean_k(run, layer) for layer in layers] for run in members])
        experts = [
            [len(_of(_tests(run), layer)[0]["slots"]) for layer in layers] for run in members
        ]
        for values in k:
            axes.plot(places, values, color=GREY, linewidth=0.8, alpha=0.6)
        axes.plot(places, k.mean(axis=0), color=BLUE, linewidth=2.2, marker="o", label="mean k")
        axes.plot(places, np.mean(experts, axis=0), "k:s", markersize=4, label="living experts")
        axes.set_xticks(places, layers, rotation=30 if len(layers) > 4 else 0)
        axes.set(title=setting, ylim=(0, None))
        axes.margins(x=0.15)
        axes.grid(alpha=0.25)
    panels[0].legend(frameon=False)
    figure.supxlabel("MoE layer, from the first up")
    figure.supylabel("experts per test token")
    return Picture(
        "k_by_layer",
        figure,
        "Experts that a test token activates, by MoE layer",
        "Blue: experts that a token of the test environments activates on average; thin lines: "
        "single runs. Black: the experts there are. Blue near black means that nearly all are "
        "used.",
    )


def draw_k_by_position(runs: Sequence[Run]) -> Picture | None:
    """Mean k by layer and position of the token, for every adaptive setting."""
    with_positions = (
        run
        for run in runs
        if run.kind == "adaptive" and any("k_by_position" in line for line in _tests(run))
    )
    settings = _settings(with_positions)
    if not settings:
        return None
    layers = max((_layers(members[0]) for members in settings.values()), key=len)
    height = 0.7 + 0.35 * len(layers)
    figure, panels = lay_out(len(settings), width=8, height=height, columns=1, beside=0)
    for (setting, members), axes in zip(settings.items(), panels, strict=True):
        layers = _layers(members[0])
        k = np.mean([[_k_by_position(run, layer) for layer in layers] for run in members], axis=0)
        heat_map(axes, k, layers, range(k.shape[1]), form=".1f", lightest=k.min())
        axes.set_title(setting)
    figure.supxlabel("token position (0: class token; then patches, row by row)")
    return Picture(
        "k_by_position",
        figure,
        "Experts that a test token activates, by MoE layer and token position",
        "Mean k of the tokens at each position, mean over runs: darker tokens activate more "
        "experts; the shades span the smallest to the largest value.",
    )


def draw_load_by_environment(runs: Sequence[Run]) -> Picture | None:
    """Which experts serve which environment, in the given runs."""

    def draw(axes: Axes, run: Run, lines: Sequence[Record]) -> None:
        tests = {f"env{index}" for index in run.facts["test_envs"]}
        marks = [" (test)" if line["source"] in tests else "" for line in lines]
        rows = [name + mark for name, mark in zip(_environments(run), marks, strict=True)]
        slots = lines[0]["slots"]
        shares = percent_of_rows([line["load"] for line in lines], len(slots))
        heat_map(axes, shares, rows, slots)

    rows = max((len(run.facts["env_names"]) for run in runs), default=0)
    figure = _load([run for run in runs if _evaluation(run)], rows, draw)
    if figure is None:
        return None
    return Picture(
        "load_by_environment",
        figure,
        "Share of each environment's routed tokens that each expert serves",
        "A row is an environment, its numbers the per cent of its routed tokens that go to each "
        "living expert; equal rows mean that experts do not tell the environments apart.",
    )


def draw_load_by_class(runs: Sequence[Run]) -> Picture | None:
    """Which experts serve which class, over all environments, in the given runs."""

    def draw(axes: Axes, run: Run, lines: Sequence[Record]) -> None:
        shares = percent_of_rows(
            np.sum([line["load_by_class"] for line in lines], axis=0).tolist(),
            len(lines[0]["slots"]),
        )
        apart = np.abs(shares - shares.mean(axis=0)).sum(axis=1)
        shown = np.sort(np.argsort(-apart, kind="stable")[:MOST_CLASSES])
        names = run.facts["class_names"]
        heat_map(axes, shares[shown], [str(names[row]) for row in shown], lines[0]["slots"])

    with_classes = [
        run for run in runs if any("load_by_class" in line for line in _evaluation(run))
    ]
    classes = max((len(run.facts["class_names"]) for run in with_classes), default=0)
    figure = _load(with_classes, min(classes, MOST_CLASSES), draw)
    if figure is None:
        return None
    some = f" Of {classes} classes the {MOST_CLASSES} whose rows differ most from the mean."
    return Picture(
        "load_by_class",
        figure,
        "Share of each class's routed tokens that each expert serves",
        "A row is a class, its numbers the per cent of its routed tokens, over all environments, "
        "that go to each living expert; an expert of one class is a dark cell in a pale column."
        + (some if classes > MOST_CLASSES else ""),
    )


def draw_overlap(runs: Sequence[Run]) -> Picture | None:
    """How far two environments use the same experts, per layer, as the mean of each setting."""
    settings = _settings(run for run in runs if len(_environments(run)) > 1)
    places = list(_places(settings))
    if not places:
        return None
    side = 1.1 + 0.36 * max(3, len(runs[0].facts["env_names"]))
    figure, panels = lay_out(len(places), width=side + 0.5, height=side, beside=0)
    for (setting, layer), axes in zip(places, panels, strict=True):
        members = settings[setting]
        matrix = np.mean([overlap(_of(_evaluation(run), layer)) for run in members], axis=0)
        names = _environments(members[0])
        heat_map(axes, matrix, names, names, form=".2f", lightest=matrix.min(), darkest=1)
        axes.set_title(_title(setting, layer, settings))
        axes.tick_params(axis="x", rotation=45 if max(map(len, names)) > 4 else 0)
    return Picture(
        "overlap",
        figure,
        "Routing overlap between environments in each MoE layer",
        "The share of routing that two environments have in common, mean over runs: 1 means the "
        "same use of experts, 0 disjoint experts; shades span each panel's smallest value to 1.",
    )


def overlap(lines: Sequence[Record]) -> np.ndarray:
    """sum_e min(p_i(e), p_j(e)) for environments i, j, where p_i are the shares of i's load."""
    p = np.array([np.asarray(line["load"]) / max(1, sum(line["load"])) for line in lines])
    return np.minimum(p[:, None], p[None]).sum(axis=-1)


Settings = dict[str, list[Run]]


def _settings(runs: Iterable[Run]) -> Settings:
    """Runs by setting, in the order they come."""
    settings: Settings = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    return settings


def _places(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every layer of every setting: what has a panel of its own."""
    for setting, members in settings.items():
        for layer in _layers(members[0]):
            yield setting, layer


def _title(setting: str, layer: str, settings: Settings) -> str:
    return layer if len(settings) == 1 else f"{setting}, {layer}"


def _layers(run: Run) -> list[str]:
    return list(run.facts["parameters"]["layers"])


def _evaluation(run: Run) -> list[Record]:
    """Routing on every environment at the step that is reported, in the environments' order."""
    return [line for line in run.routing_at_outcome if line["source"] != "train"]


def _tests(run: Run) -> list[Record]:
    """The same on the test environments alone."""
    sources = {f"env{index}" for index in run.facts["test_envs"]}
    return [line for line in _evaluation(run) if line["source"] in sources]


def _of(lines: Iterable[Record], layer: str) -> list[Record]:
    return [line for line in lines if line["layer"] == layer]


def _environments(run: Run) -> list[str]:
    """Names of those that were evaluated."""
    sources = dict.fromkeys(line["source"] for line in _evaluation(run))
    return [run.facts["env_names"][int(source.removeprefix("env"))] for source in sources]


def _mean_k(run: Run, layer: str) -> float:
    lines = _of(_tests(run), layer)
    return float(
        np.average([line["mean_k"] for line in lines], weights=[line["tokens"] for line in lines])
    )


def _k_by_position(run: Run, layer: str) -> np.ndarray:
    return np.mean([line["k_by_position"] for line in _of(_tests(run), layer)], axis=0)


def _experts(run: Run, layer: str) -> tuple[list[int], list[int]]:
    """Steps at which the number of living experts changes, and the number from then on."""
    updates = [event for event in run.events if event["layer"] == layer]
    start, last = run.facts["start_experts"][layer], run.facts["steps"] - 1
    counts = [start, *(event["after"] for event in updates)]
    return [0, *(event["step"] for event in updates), last], [*counts, counts[-1]]


def _at(steps: np.ndarray, changes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    return np.asarray(counts)[np.searchsorted(changes, steps, side="right") - 1]


def _load(
    runs: Sequence[Run], rows: int, draw: Callable[[Axes, Run, Sequence[Record]], None]
) -> Figure | None:
    """One panel for each layer of each run."""
    places = [(run, layer) for run in runs for layer in _layers(run)]
    if not places:
        return None
    figure, panels = lay_out(len(places), width=4.1, height=0.9 + 0.27 * rows, columns=2, beside=0)
    for (run, layer), axes in zip(places, panels, strict=True):
        draw(axes, run, _of(_evaluation(run), layer))
        axes.set_title(f"{run.setting}, {layer}")
    figure.supxlabel("living expert (slot)")
    return figure

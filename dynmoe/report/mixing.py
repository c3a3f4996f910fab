"""Data mixing of a run, from its records: the weights of its sources over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynmoe.report.document import Picture
from dynmoe.report.drawing import COLOURS, DASHES, STEP, lay_out, over_steps
from dynmoe.report.run import Run, by_setting
from dynmoe.report.tables import Table, format_number

AHEAD = 2
"""Steps from a probe to the first batch that is drawn by its weights: `dynmoe.data.mixing`."""

FloatArray = npt.NDArray[np.float64]


class Mixed(NamedTuple):
    """The probes of a run that mixes data, P of them, and its D sources."""

    rule: str
    sources: list[str]
    start_D: FloatArray
    steps: list[int]
    """[P], of the last optimizer step before each probe."""
    weights_PD: FloatArray
    delta_PD: FloatArray
    """NaN where a rule has no distances to compare."""
    loss_PD: FloatArray
    seconds: float
    """All probes together."""


def mixed(run: Run) -> Mixed | None:
    """What a run recorded of its mixture; None for one that mixes nothing."""
    facts = run.facts.get("mixing")
    if facts is None:
        return None
    probes = run.folder.read("mixing")
    sources = list(facts["start"])

    def of(key: str) -> FloatArray:
        rows = [each[key] or [np.nan] * len(sources) for each in probes]
        return np.array(rows, dtype=np.float64).reshape(len(probes), len(sources))

    return Mixed(
        run.config["mixing.rule"],
        sources,
        np.array([*facts["start"].values()]),
        [each["step"] for each in probes],
        of("weights"),
        of("delta"),
        of("loss"),
        sum(each["seconds"] for each in probes),
    )


def drawn(run: Run, found: Mixed) -> FloatArray:
    """Examples of each source that a run has drawn, [D], by its weights."""
    first = [0, *(step + AHEAD for step in found.steps)]
    ends = np.minimum([*first[1:], run.steps_taken], run.steps_taken)
    lengths = np.maximum(0, ends - np.minimum(first, run.steps_taken))
    weights = np.concatenate([found.start_D[None], found.weights_PD])
    batch = float(run.facts["samples_per_step"])
    examples: FloatArray = batch * (lengths[:, None] * weights).sum(0)
    return examples


def sources_table(run: Run) -> Table | None:
    """How often each source was drawn; None for a run that mixes nothing."""
    found = mixed(run)
    if found is None:
        return None
    sizes = run.facts["mixing"]["sizes"]
    examples = drawn(run, found)
    last = found.weights_PD[-1] if len(found.steps) else found.start_D
    loss = found.loss_PD[-1] if len(found.steps) else np.full(len(found.sources), np.nan)
    rows = [
        (
            name,
            f"{sizes[name]:,}",
            *(f"{100 * weight:.1f}" for weight in (found.start_D[d], last[d])),
            f"{examples[d]:,.0f}",
            f"{examples[d] / sizes[name]:.2f}",
            format_number(float(loss[d]), ".4f"),
        )
        for d, name in enumerate(found.sources)
    ]
    columns = ("examples", "first weight, %", "last weight, %", "drawn", "passes", "held-out loss")
    return Table(
        f"Sources, mixing={found.rule}",
        ("source", *columns),
        tuple(rows),
        note="drawn: examples in all batches; held-out loss: at the last probe, of training "
        "examples that are kept for probes.",
    )


def probe_time(run: Run) -> str | None:
    """What the probes of a run cost; None without."""
    found = mixed(run)
    if found is None or not found.steps:
        return None
    share = found.seconds / (run.step_seconds * run.steps_taken)
    number = f"{len(found.steps)} probe{'s' * (len(found.steps) != 1)}"
    return (
        f"{found.rule}, {number} of {len(found.sources)} sources: {100 * share:.1f} % of the time"
    )


def draw_mixing(runs: Sequence[Run]) -> Picture | None:
    """Weights, distances and held-out losses of the sources over the steps, in every setting."""
    found = {run.folder.path: mixed(run) for run in runs}
    probed = [run for run in runs if (each := found[run.folder.path]) is not None and each.steps]
    settings = by_setting(probed)
    if not settings:
        return None
    figure, panels = lay_out(3 * len(settings), width=3.6, height=2.6, columns=3, beside=1.2)
    for row, (setting, members) in enumerate(settings.items()):
        own = [each for run in members if (each := found[run.folder.path]) is not None]
        steps = own[0].steps
        alike = [each for each in own if each.steps == steps]  # patience may end one sooner
        weights, delta, loss = panels[3 * row : 3 * row + 3]
        for d, source in enumerate(own[0].sources):
            look: dict[str, Any] = {
                "color": COLOURS[d % len(COLOURS)],
                "linestyle": DASHES[d // len(COLOURS) % len(DASHES)],
                "linewidth": 1.5,
            }
            curve = np.mean([[each.start_D[d], *each.weights_PD[:, d]] for each in alike], axis=0)
            at = [0, *(step + AHEAD for step in steps)]
            at = [min(step, members[0].steps_taken) for step in at]
            weights.plot(at, 100 * curve, drawstyle="steps-post", label=source, **look)
            for axes, name in ((delta, "delta_PD"), (loss, "loss_PD")):
                values = np.mean([getattr(each, name)[:, d] for each in alike], axis=0)
                axes.plot(steps, values, marker="." if len(steps) < 30 else None, **look)
        several = len(settings) > 1
        weights.set(title=setting if several else "", ylabel="sampling weight, %", ylim=(0, None))
        far = "loss above the reference" if own[0].rule == "ref_loss" else "distance of its load"
        delta.set(ylabel=far)
        loss.set(ylabel="held-out loss")
        for axes in (weights, delta, loss):
            over_steps(axes)
            axes.set_xlabel(STEP)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="source")
    return Picture(
        "mixing",
        figure,
        "Sampling weights of the sources over training, and what moves them",
        "Left: the share of each source in the batches. Middle: how unlike the others it uses the "
        "experts, or how far its loss is above the reference. Right: its loss on training examples "
        "that are kept for probes. Means over runs.",
    )

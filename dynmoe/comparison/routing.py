"""Numbers from a run's routing records: the reported model's routing, experts over training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dynmoe.comparison.run import Run
from dynmoe.records import Record
from dynmoe.report.question_sets import SHUFFLED


def evaluation(run: Run) -> list[Record]:
    """Routing on every environment at the step that is reported, in the environments' order.

    Without the set of exchanged images, which has the questions of another one.
    """
    names = run.facts["env_names"]
    left_out = ("train", *(f"env{names.index(each)}" for each in (SHUFFLED,) if each in names))
    return [line for line in run.routing_at_outcome if line["source"] not in left_out]


def on_tests(run: Run) -> list[Record]:
    """The same on the test environments alone."""
    sources = {f"env{index}" for index in run.facts["test_envs"]}
    return [line for line in evaluation(run) if line["source"] in sources]


def training(run: Run) -> list[Record]:
    """Routing in training, over the window that ends at that step."""
    return [line for line in run.routing_at_outcome if line["source"] == "train"]


def of_layer(lines: Iterable[Record], layer: str) -> list[Record]:
    """The lines of one layer."""
    return [line for line in lines if line["layer"] == layer]


def layers_of(run: Run) -> list[str]:
    """Names of its MoE layers, from the first up."""
    return list(run.facts["parameters"]["layers"])


def evaluated(run: Run) -> list[str]:
    """Names of those that were evaluated."""
    sources = dict.fromkeys(line["source"] for line in evaluation(run))
    return [run.facts["env_names"][int(source.removeprefix("env"))] for source in sources]


def mean_k(run: Run, layer: str) -> float:
    """Experts per token of the test environments."""
    lines = of_layer(on_tests(run), layer)
    return float(
        np.average([line["mean_k"] for line in lines], weights=[line["tokens"] for line in lines])
    )


def k_by_position(run: Run, layer: str) -> np.ndarray:
    """The same by position of the token."""
    return np.mean([line["k_by_position"] for line in of_layer(on_tests(run), layer)], axis=0)


def experts_over_steps(run: Run, layer: str) -> tuple[list[int], list[int]]:
    """Steps at which the number of living experts changes, and the number from then on."""
    updates = [event for event in run.events if event["layer"] == layer]
    start, last = run.facts["start_experts"][layer], run.results[-1]["step"]
    counts = [start, *(event["after"] for event in updates)]
    return [0, *(event["step"] for event in updates), last], [*counts, counts[-1]]


def experts_at(steps: np.ndarray, changes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The number of living experts at any steps, from what `experts_over_steps` returns."""
    return np.asarray(counts)[np.searchsorted(changes, steps, side="right") - 1]


def overlap(lines: Sequence[Record]) -> np.ndarray:
    """sum_e min(p_i(e), p_j(e)) for environments i, j, where p_i are the shares of i's load."""
    p = np.array([np.asarray(line["load"]) / max(1, sum(line["load"])) for line in lines])
    return np.minimum(p[:, None], p[None]).sum(axis=-1)

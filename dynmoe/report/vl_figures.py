"""The figures that only runs about images have, of the step that is reported."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.example_figures import draw_examples
from dynmoe.report.part_figures import draw_k_by_part, draw_load_by_part
from dynmoe.report.words import has_fixed_k
from dynmoe.selection import selected


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

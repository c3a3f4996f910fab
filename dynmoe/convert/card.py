"""The model card of an exported run: what it is, how to load it, what it scores."""

from __future__ import annotations

from dynmoe.convert.runs import TrainedModel
from dynmoe.report.tables import format_number
from dynmoe.version import version

HEAD = """---
library_name: transformers
pipeline_tag: {}
tags: [mixture-of-experts, dynmoe]
---
"""


def card(trained: TrainedModel, own_code: bool) -> str:
    """Return the text of README.md. ``own_code``: the folder has a file of code."""
    cfg = trained.cfg
    code = ", trust_remote_code=True" if own_code else ""
    is_lm = trained.model.model.can_generate()
    task, name = ("text-generation", "write") if is_lm else ("text-classification", "classify")
    kind = "causal language model" if is_lm else "text classifier"
    parts = [
        f"{HEAD.format(task)}# {cfg.moe.algorithm} on {cfg.data.name}",
        f"A {kind}, trained with dynmoe {version()} (run `{trained.folder.path.name}`, "
        f"`{trained.checkpoint.name}`, step {trained.step}).",
        "```python\n"
        "from transformers import pipeline\n\n"
        f'{name} = pipeline("{task}", "FOLDER"{code})\n'
        f"{_call(trained)}\n"
        "```",
    ]
    if own_code:
        parts.append(
            "`modeling_mixture.py` is the model's code: torch and transformers alone. "
            '`experts_implementation=` of `from_pretrained` is "grouped_mm" (default), '
            '"batched_mm" or "eager".'
        )
    classes = ", ".join(trained.class_names) or "none, it predicts a number"
    parts.append(
        f"Trained on blocks of {cfg.data.length} tokens."
        if is_lm
        else f"Texts are cut to {cfg.data.max_length} tokens, as in training. Classes: {classes}."
    )
    parts += [_scores(trained), _layers(trained)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _call(trained: TrainedModel) -> str:
    if trained.model.model.can_generate():
        return 'write("A text", max_new_tokens=50)'
    if trained.pairs:
        return 'classify({"text": "First text.", "text_pair": "Second text."}, truncation=True)'
    return 'classify("A text.", truncation=True)'


def _scores(trained: TrainedModel) -> str:
    """Return a table of the scores that the run recorded at this step, as shares of 1."""
    found = [r for r in trained.folder.read("results") if r["step"] == trained.step]
    if not found:
        return ""
    rows = [
        f"| {name} | {measure} | {format_number(value, '.4f')} |"
        for name, measures in found[-1]["scores"].items()
        for measure, value in measures.items()
    ]
    return "\n".join(["| evaluated on | measure | value |", "|---|---|---|", *rows])


def _layers(trained: TrainedModel) -> str:
    """Return a table of the MoE layers: experts, and experts per token where that was recorded."""
    mean_k = {
        (record["source"], record["layer"]): record["mean_k"]
        for record in trained.folder.read("routing")
        if record["step"] == trained.step
    }
    if not trained.num_experts:
        return ""
    rows = []
    for layer, count in trained.num_experts.items():
        found = {source: k for (source, name), k in mean_k.items() if name == layer}
        means = ", ".join(f"{k:.2f} ({source})" for source, k in found.items() if source != "train")
        rows.append(f"| {layer} | {count} | {means} |")
    head = ["| MoE layer | experts | mean experts per token |", "|---|---|---|"]
    return "\n".join([*head, *rows])

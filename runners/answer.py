"""``dynmoe-eval mode=answer``: a trained run's answers, in the files that evaluators read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dynmoe.config.reading import modality
from dynmoe.errors import ConfigError
from dynmoe.records import Record, RunFolder
from dynmoe.report.parts import PARTS, k_by_part
from dynmoe.report.tables import format_number
from dynmoe.report.words import layer_name
from runners.score_table import print_scores


def answer(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> dict[str, float]:
    """Answer every question of ``cfg.benchmarks``, or of the run's own sets where there are none.

    Writes ``answers/<set>/`` in the run's folder; prints scores, k by part, and the files.

    Returns:
        Scores by their names in ``results.jsonl``, of the sets that are scored here.

    Raises:
        UserError: a run of another task, or questions that cannot be read.
    """
    from runners import build

    if modality(cfg, "data") != "vision-language":
        raise ConfigError(
            f"mode=answer: {cfg.data.name} has no questions to answer in words; runs of task=vl do"
        )
    settings = build.settle_runtime(cfg)
    data: Any = build.build_data(cfg)
    data.setup_questions({name: str(root) for name, root in cfg.get("benchmarks", {}).items()})
    task: Any
    task, step = build.load(cfg, data, settings["fused_attention"], checkpoint)
    trainer = build.build_trainer(cfg, [], folder, max_steps=1)
    trainer.validate(task, datamodule=data, verbose=False)
    scores: dict[str, float] = task.scores()
    names = data.env_names
    if scores:
        print_scores(folder, checkpoint, step, scores, dict(zip(names, names, strict=True)))
    _print_routing(names, task.routing_records())
    for name, answers in task.answers.items():
        if not data.sets[name].is_scored:
            print(f"{name} has no local score. {data.sets[name].note}")
        for file in data.asked.write(name, folder.path / "answers" / name, answers):
            print(file)
    return scores


def _print_routing(names: Sequence[str], records: Sequence[Record]) -> None:
    """Mean k of each MoE layer on each set; nothing of a dense model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Experts per token (mean k)", title_justify="left")
    for column in ("answered", "MoE layer", *PARTS):
        table.add_column(column, justify="right" if column in PARTS else "left")
    sources = {f"env{index}": name for index, name in enumerate(names)}
    for record in records:
        if record["source"] in sources:
            k: Mapping[str, float] = k_by_part([record])
            numbers = (format_number(k[part], ".2f") for part in PARTS)
            table.add_row(sources[record["source"]], layer_name(record["layer"]), *numbers)
    if table.row_count:
        Console().print(table)

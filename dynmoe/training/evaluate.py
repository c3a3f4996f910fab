"""A trained run evaluated again, from its own configuration and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynmoe.config import trust
from dynmoe.config.arguments import joined
from dynmoe.config.budgets import KEYS as BUDGETS
from dynmoe.config.budgets import budget_problems
from dynmoe.config.check import value_problems
from dynmoe.config.machine import data_folder, folders, gpu_there
from dynmoe.config.options import modality
from dynmoe.config.quantize import KEYS as QUANTISATIONS
from dynmoe.config.quantize import quantize_problems
from dynmoe.config.targets import TargetError, signature
from dynmoe.config.task_rules import corpus_run, text_run
from dynmoe.errors import ConfigError
from dynmoe.records import Record, RunFolder
from dynmoe.report.tables import format_number
from dynmoe.report.words import PARTS, k_by_part, layer_name, measure_number
from dynmoe.selection import mean, measured
from dynmoe.training import trained

OVERRIDES = (
    "data.root",
    "data.workers",
    "data.eval_batch_size",
    "data.eval_images",
    "data.max_new_tokens",
    "data.ood",
    "data.ood_root",
    "backbone.path",
    "backbone.vision.path",
    "trainer.accelerator",
)
MODES = ("evaluate", "answer", "submit", "budget", "quantize")
OF_MODES = {"budget": BUDGETS, "quantize": QUANTISATIONS}
"""Keys of one mode alone."""
ARGUMENTS = ("run", "checkpoint", "mode", trust.KEY)


def parse(arguments: list[str]) -> tuple[str, RunFolder, Path, DictConfig]:
    """The mode, the run folder, the checkpoint file and the configuration to evaluate with.

    Raises:
        ConfigError: an unknown key or wrong value, a folder that is no run, or a checkpoint that is
            not there.
    """
    given: dict[str, str] = {}
    question_sets: list[str] = []
    of_modes: dict[str, list[str]] = {}
    arguments, astray = joined(arguments)
    if astray:
        raise ConfigError("\n".join(astray))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.startswith("question_sets."):
            question_sets.append(argument)
        elif equals and (mode := next((m for m, keys in OF_MODES.items() if key in keys), "")):
            of_modes.setdefault(mode, []).append(argument)
        elif equals and key in (*ARGUMENTS, *OVERRIDES):
            given[key] = value
        elif not equals and not argument.startswith("-"):
            raise ConfigError(f"{argument}: expected key=value. A run is given as run={argument}")
        else:
            keys = (*ARGUMENTS, "question_sets.<set>", *BUDGETS, *QUANTISATIONS, *OVERRIDES)
            known = ", ".join(f"{each}=" for each in keys)
            raise ConfigError(f"{argument}: unknown argument, expected {known}")
    if not given.get("run"):
        raise ConfigError("run=FOLDER is missing: the folder outputs/<name>/<run> of a trained run")
    folder = RunFolder(Path(given.pop("run")).expanduser())
    cfg = trained.configuration(folder, trust.packages(given.pop(trust.KEY, "")))
    try:
        signature(str(OmegaConf.select(cfg, "data._target_")))
    except TargetError as error:
        raise ConfigError(
            f"{folder.path}: another version of dynmoe wrote this run ({error}); train it again"
        ) from None
    name, mode = given.pop("checkpoint", "selected"), given.pop("mode", "evaluate")
    if mode not in MODES:
        raise ConfigError(f"mode={mode}: expected one of {', '.join(MODES)}")
    checkpoint = trained.given_checkpoint(folder, name)
    for key in given:
        node, _, leaf = key.rpartition(".")
        if leaf not in (OmegaConf.select(cfg, node) or ()):
            raise ConfigError(f"{key}: this run on {cfg.data.name} has no such key")
    # The saved configuration is resolved: some values stand there twice.
    for node in ("environments", "content"):
        if "data.root" in given and "root" in cfg.data.get(node, {}):
            cfg.data[node].root = given["data.root"]
    if "backbone.path" in given:
        cfg.data.tokenizer_path = given["backbone.path"]
    if question_sets and mode != "answer":
        raise ConfigError(f"{question_sets[0]}: questions to answer, expected with mode=answer")
    for other, words in of_modes.items():
        if other != mode:
            raise ConfigError(f"{words[0]}: expected with mode={other}, found mode={mode}")
    values = [f"{key}={value}" for key, value in given.items()] + question_sets
    values += of_modes.get(mode, [])
    try:
        overrides = OmegaConf.from_dotlist(values)
        cfg = OmegaConf.merge(cfg, overrides)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{' '.join(values)}: {reason}") from None
    if wrong := [
        *value_problems(cfg, given),
        *text_run(cfg),
        *corpus_run(cfg),
        *folders(cfg),
        *data_folder(cfg),
        *gpu_there(cfg),
        *(budget_problems(cfg) if mode == "budget" else ()),
        *(quantize_problems(cfg) if mode == "quantize" else ()),
    ]:
        raise ConfigError("\n".join(wrong))
    return mode, folder, checkpoint, cfg


Scores = dict[str, dict[str, float]]


def evaluate(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> Scores:
    """Scores by set and measure, as in ``results.jsonl``; prints them beside the recorded ones."""
    data, task, step, trainer = loaded(folder, checkpoint, cfg)
    data.repeat_evaluation_of(step)
    trainer.validate(task, datamodule=data, verbose=False)
    scores: Scores = task.scores()
    print_scores(folder, checkpoint, step, scores)
    return scores


def submit(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> list[Path]:
    """Write the model's predictions for the test sets in the format of the GLUE server.

    Raises:
        ConfigError: the run is not on a task of GLUE.
        DataError: there are no test sets.
    """
    import numpy as np

    from dynmoe.data.text.module import write_submission

    if not str(cfg.data._target_).endswith(".GlueData"):
        raise ConfigError(f"mode=submit: {cfg.data.name} is no task of GLUE")
    data, task, step, trainer = loaded(folder, checkpoint, cfg)
    data.read_tests()
    found = trainer.predict(task, datamodule=data)
    by_set = found if len(data.test_sets) > 1 else [found]
    files = []
    for name, batches in zip(data.test_sets, by_set, strict=True):
        rows, predicted = (
            np.concatenate([part.numpy() for part in parts]) for parts in zip(*batches, strict=True)
        )
        index = data.sets[name].index[rows]
        files.append(
            write_submission(folder.path / "submission", data.glue_task, name, index, predicted)
        )
    print(f"{checkpoint.name}, step {step}. Zip these files and upload them to gluebenchmark.com:")
    for file in files:
        print(file)
    return files


def loaded(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> tuple[Any, Any, int, Any]:
    """Data that has been set up for evaluation, the trained task, its step, and a trainer."""
    from dynmoe.training import build

    settings = build.settle_runtime(cfg)
    data = build.build_data(cfg)
    data.restore(folder.path)
    data.setup("validate")
    if data.modality != "vision-language" and (change := build.other_data(folder, data)):
        print(f"The data are not those of this run, so scores differ: {change}")
    task, step = build.load(cfg, data, settings["fused_attention"], checkpoint)
    return data, task, step, build.build_trainer(cfg, [], folder, max_steps=1)


def reported_by(folder: RunFolder) -> Mapping[str, Any]:
    """Which sets and measure the run reports, and the ``places`` (environments or sets) whose
    routing it reports; empty where no run.json says it."""
    facts = folder.read_run() if (folder.path / "run.json").exists() else {}
    places = [facts["env_names"][index] for index in facts.get("test_envs", [])]
    return {**facts.get("reported", {}), "places": places}


def judged(task: Any, reported: Mapping[str, Any]) -> Record:
    """Entries of a record of the evaluation that just ended: scores, the means of the reported
    measure and of the loss over the reported sets, and mean k on the reported places, by layer and
    over all."""
    scores = task.scores()
    measure = reported.get("measure", "score")
    # A run without a test environment reports none.
    sets = reported.get("sets") or [name for name in scores if measure in scores[name]]
    places = reported.get("places") or task.env_names
    load: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for each in task.routing_records():
        if each["source"] in places:
            name = each["layer"]
            load[name] = load.get(name, 0) + sum(each["load"])
            tokens[name] = tokens.get(name, 0) + each["tokens"]
    score, loss = (
        mean(measured({"scores": scores}, name, key) for name in sets) for key in (measure, "loss")
    )
    return {
        "mean_k": sum(load.values()) / max(1, sum(tokens.values())),
        "layers": {name: load[name] / max(1, tokens[name]) for name in load},
        "measure": measure,
        "score": score,
        "loss": loss,
        "scores": scores,
    }


def answer(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> Scores:
    """Answer every question of ``cfg.question_sets``, or of the run's own sets if it is empty.

    Writes ``answers/<set>/`` in the run's folder, the files that evaluators read; prints scores, k
    by part, and the files.

    Returns:
        Scores by set and measure, of the sets that are scored here.

    Raises:
        UserError: a run of another task, or questions that cannot be read.
    """
    from dynmoe.training import build

    if modality(cfg, "data") != "vision-language":
        raise ConfigError(
            f"mode=answer: {cfg.data.name} has no questions to answer in text; runs of task=vl do"
        )
    settings = build.settle_runtime(cfg)
    data: Any = build.build_data(cfg)
    data.restore(folder.path)
    folders = cfg.get("question_sets", {})
    data.setup_questions({name: str(root) for name, root in folders.items()})
    task: Any
    task, step = build.load(cfg, data, settings["fused_attention"], checkpoint)
    trainer = build.build_trainer(cfg, [], folder, max_steps=1)
    trainer.validate(task, datamodule=data, verbose=False)
    scores: Scores = task.scores()
    if scores:
        print_scores(folder, checkpoint, step, scores)
    _print_routing(data.env_names, task.routing_records())
    for name, answers in task.answers.items():
        if not data.sets[name].is_scored:
            print(f"{name} has no local score. {data.sets[name].note}")
        if task.cut[name]:
            print(
                f"{name}: {task.cut[name]} of {len(answers)} answers were cut off at "
                f"{task.max_new_tokens[name]} tokens. Set data.max_new_tokens for longer ones."
            )
        for file in data.asked.write(name, folder.path / "answers" / name, answers):
            print(file)
    return scores


def _print_routing(names: Sequence[str], records: Sequence[Record]) -> None:
    """Print mean k of each MoE layer on each set; nothing for a dense model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Experts per token (mean k)", title_justify="left")
    for column in ("answered", "MoE layer", *PARTS):
        table.add_column(column, justify="right" if column in PARTS else "left")
    for record in records:
        if record["source"] in names:
            k: Mapping[str, float] = k_by_part([record])
            numbers = (format_number(k[part], ".2f") for part in PARTS)
            table.add_row(record["source"], layer_name(record["layer"]), *numbers)
    if table.row_count:
        Console().print(table)


def print_scores(
    folder: RunFolder, checkpoint: Path, step: int, scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Print scores by set and measure beside those that the run recorded at this step."""
    from rich.console import Console
    from rich.table import Table

    results = {record["step"]: record["scores"] for record in folder.read("results")}
    recorded = results.get(step, {})
    console, table = Console(), Table()
    for column in ("evaluated on", "measure", "now", "recorded"):
        table.add_column(column, justify="right" if column in ("now", "recorded") else "left")
    for name, measures in scores.items():
        for measure, score in measures.items():
            before = recorded.get(name, {}).get(measure)
            shown = "-" if before is None else measure_number(measure, before, 2)
            text = measure.replace("_", " ")
            table.add_row(name, text, measure_number(measure, score, 2), shown)
    console.print(
        f"{folder.path.name}, {checkpoint.name}, step {step}; in %, but losses and points"
    )
    console.print(table)

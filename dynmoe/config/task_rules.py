"""Rules of the runs of one task: the stages of vision-language, texts, language modelling."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from dynmoe.config.options import modality, read, written
from dynmoe.config.targets import did_you_mean
from dynmoe.data.text.tasks import LABELLED, TASKS, TESTS
from dynmoe.data.vl.turns import TEMPLATE_NAMES
from dynmoe.questions import SETS

# Stages of a vision-language run.

DERIVED = "${previous_run:}"

TRAINABLE = ("vision", "projector", "language_model", "moe_layers", "dense_ffns")


def stage_is_chosen(cfg: DictConfig) -> Iterator[str]:
    kind, stage = modality(cfg, "task.module"), read(cfg, "stage.name", str)
    if kind == "vision-language" and stage is None:
        yield "stage: this task runs in stages. Choose stage=align, instruct or moe."
    if kind not in (None, "vision-language") and stage is not None:
        yield f"stage: only task=vl runs in stages, found stage={stage}. Leave it out"


def dense_before_moe(cfg: DictConfig) -> Iterator[str]:
    """Only the last stage has MoE layers; earlier stages train the FFNs they are made from."""
    stage, layers = read(cfg, "stage.name", str), read(cfg, "moe.layers", object)
    if stage in ("align", "instruct") and layers not in (None, "none"):
        name = read(cfg, "moe.name", str)
        yield (
            f"moe: stage={stage} trains the dense model, found moe={name}. Leave moe out, or "
            "choose stage=moe, which runs the stages before it first."
        )


def start_is_a_run(cfg: DictConfig) -> Iterator[str]:
    """A folder that the user gives has to exist; a derived one is trained first."""
    raw = written(cfg, "stage.start")
    if isinstance(raw, str) and raw != DERIVED:
        folder = Path(raw).expanduser()
        if not (folder / "config.yaml").is_file():
            yield f"stage.start: expected a run folder with a config.yaml, found none in '{raw}'"


def known_templates(cfg: DictConfig) -> Iterator[str]:
    """Without this check an earlier stage would be trained before a later one asks for it."""
    for key in ("backbone.template", "stage.template", "data.template", "data.question_template"):
        name, raw = read(cfg, key, str), written(cfg, key)
        if raw == name is not None and name not in TEMPLATE_NAMES:
            yield f"{key}: expected one of {', '.join(TEMPLATE_NAMES)}, found '{name}'"


def known_question_sets(cfg: DictConfig) -> Iterator[str]:
    planned = read(cfg, "mode", str) == "plan"  # which reads no data
    for name, folder in (read(cfg, "data.question_sets", dict) or {}).items():
        key = f"data.question_sets.{name}"
        if name not in SETS:
            near = did_you_mean(str(name), SETS)
            yield f"{key}: there is no such set.{near} Sets are {', '.join(SETS)}"
        elif isinstance(folder, str) and not (planned or Path(folder).expanduser().is_dir()):
            yield f"{key}: no folder '{folder}'. Give the folder of the set"


def trained_parts(cfg: DictConfig) -> Iterator[str]:
    parts = read(cfg, "task.module.trains", list)
    if parts == []:
        yield f"task.module.trains: expected some of {', '.join(TRAINABLE)}, found none"
    for part in parts or ():
        if part not in TRAINABLE:
            yield f"task.module.trains: expected some of {', '.join(TRAINABLE)}, found '{part}'"


def scratch_is_trained(cfg: DictConfig) -> Iterator[str]:
    """Random weights that no stage trains make a run meaningless."""
    trains = read(cfg, "task.module.trains", list)
    if trains is None or read(cfg, "stage.after", str) is not None:
        return
    parts = {"backbone.vision.pretrained": "vision", "backbone.pretrained": "language_model"}
    for key, part in parts.items():
        if read(cfg, key, bool) is False and part not in trains:
            yield (
                f"task.module.trains: {key}=false, and the first stage does not train {part}: it "
                f"would keep its random weights. Take a pretrained one, or add {part} to "
                f"protocol.stages.{read(cfg, 'stage.name', str)}.defaults.trains."
            )


def there_is_training_data(cfg: DictConfig) -> Iterator[str]:
    content = read(cfg, "data.content._target_", str) or ""
    if content.endswith(".questions_only") and read(cfg, "mode", str) == "train":
        name = read(cfg, "data.name", str)
        yield (
            f"data: {name} has no training data. dynmoe-eval run=FOLDER mode=answer asks its "
            "questions; to train choose data=scenes, easy_vqa, llava, ..."
        )


# Text runs.

OWN_SETS = (*LABELLED, "heldout", *TESTS)


def text_run(cfg: DictConfig) -> Iterator[str]:
    """Libraries, folders and sets that a text run needs."""
    if modality(cfg, "task.module") != "text" or modality(cfg, "data") != "text":
        return
    missing = [name for name in ("transformers", "datasets") if find_spec(name) is None]
    if missing:
        yield f'task: needs {" and ".join(missing)}: pip install -e ".[language]"'
    source, root = read(cfg, "data.source", str), read(cfg, "data.root", str)
    if source in ("tsv", "parquet") and root is None:
        yield f"data.root: data.source={source} needs the folder of the files: data.root=FOLDER"
    if source in ("hub", "embedded") and root is not None:
        yield f"data.root: data.source={source} reads no folder. Add data.source=tsv or parquet"
    ood, ood_root = read(cfg, "data.ood", list), read(cfg, "data.ood_root", str)
    if ood and ood_root is None:
        yield f"data.ood_root: data.ood={ood} needs the folder of their files: data.ood_root=FOLDER"
    for name in map(str, ood or ()):
        if name in OWN_SETS:
            yield f"data.ood: {name} is a set of the task itself. Take another name"
        elif not re.fullmatch(r"[\w-]+", name, re.ASCII):
            yield f"data.ood: expected a name of letters, digits, _ and -, found '{name}'"
    task = TASKS.get(read(cfg, "data.task", str) or "")
    if read(cfg, "data.linear_baseline", bool) and task is not None and task.regression:
        yield "data.linear_baseline: needs classes, this task has none. Set it to false"


# Language modelling.


def corpus_run(cfg: DictConfig) -> Iterator[str]:
    """The library and the sets that a run on documents needs."""
    if modality(cfg, "data") != "text-stream":
        return
    if find_spec("pyarrow") is None:
        yield 'task: needs pyarrow: pip install -e ".[language]"'
    shares = {name: read(cfg, f"data.{name}", float) for name in ("validation", "test")}
    given = sum(share for share in shares.values() if share is not None)
    if shares["validation"] == 0 or read(cfg, "data.validation", list) == []:
        yield (
            "data.validation: expected a share above 0, or patterns of files: it selects the step. "
            "Set data.validation=0.05"
        )
    patterns = [read(cfg, f"data.{name}", list) or [] for name in ("validation", "test")]
    for twice in sorted(set(map(str, patterns[0])) & set(map(str, patterns[1]))):
        yield (
            f"data.test: '{twice}' is a pattern of data.validation too, and a file belongs to one "
            "set. Give other patterns, or data.test=0"
        )
    if given >= 1:
        yield (
            f"data: validation and test are {given:g} of the documents together, which leaves none "
            "to train on. Lower them"
        )


# The key that only backbones of one modality have.
MARKS = {"image_size": "image", "vision": "vision-language"}


def is_language_model(cfg: DictConfig) -> Iterator[str]:
    """task=lm sets the builder of its backbone: one of another kind shows in its keys."""
    if modality(cfg, "task.module") != "text-stream":
        return
    node = cfg.get("backbone", {})
    for key, kind in MARKS.items():
        if key in node:
            yield (
                f"backbone: task.module works on text-stream, this backbone on {kind}. Choose "
                "backbone=lm_tiny, lm_tiny_gpt2, smollm2, gpt2, pythia or qwen2."
            )

"""Rules of runs in stages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from dynmoe.config.reading import modality, read

DERIVED = "${previous_run:}"

PARTS = ("vision", "projector", "language_model", "moe_layers", "dense_ffns")


def stage_is_chosen(cfg: DictConfig) -> Iterator[str]:
    """A task in stages has one; others have none."""
    kind, stage = modality(cfg, "task.module"), read(cfg, "stage.name", str)
    if kind == "vision-language" and stage is None:
        yield "stage: this task runs in stages. Choose stage=align, instruct or moe."
    if kind not in (None, "vision-language") and stage is not None:
        yield f"stage: only task=vl runs in stages, found stage={stage}. Leave it out"


def dense_before_moe(cfg: DictConfig) -> Iterator[str]:
    """Only the last stage has MoE layers: those before it train what they are made from."""
    stage, layers = read(cfg, "stage.name", str), read(cfg, "moe.layers", object)
    if stage in ("align", "instruct") and layers not in (None, "none"):
        name = read(cfg, "moe.name", str)
        yield (
            f"moe: stage={stage} trains the dense model, found moe={name}. Leave moe out, or "
            "choose stage=moe, which runs the stages before it first."
        )


def start_is_a_run(cfg: DictConfig) -> Iterator[str]:
    """A folder that was named; one that follows from the configuration comes into being."""
    node = cfg.get("stage")
    start = None if node is None else DictConfig._get_node(node, "start")  # not resolved
    raw = None if start is None else start._value()
    if isinstance(raw, str) and raw != DERIVED:
        folder = Path(raw).expanduser()
        if not (folder / "config.yaml").is_file():
            yield f"stage.start: expected a run folder with a config.yaml, found none in '{raw}'"


def trained_parts(cfg: DictConfig) -> Iterator[str]:
    parts = read(cfg, "task.module.trains", list)
    for part in parts or ():
        if part not in PARTS:
            yield f"task.module.trains: expected some of {', '.join(PARTS)}, found '{part}'"


def scratch_is_trained(cfg: DictConfig) -> Iterator[str]:
    """What is drawn at random and never trained says nothing."""
    trains = read(cfg, "task.module.trains", list)
    if trains is None or read(cfg, "stage.after", str) is not None:
        return
    for key, part in (
        ("backbone.vision.pretrained", "vision"),
        ("backbone.pretrained", "language_model"),
    ):
        if read(cfg, key, bool) is False and part not in trains:
            yield (
                f"task.module.trains: {key}=false, and the first stage does not train {part}: it "
                f"would stay as it was drawn. Take a pretrained one, or add {part} to "
                f"protocol.stages.{read(cfg, 'stage.name', str)}.defaults.trains."
            )


def there_is_training_data(cfg: DictConfig) -> Iterator[str]:
    content = read(cfg, "data.content._target_", str) or ""
    if content.endswith(".questions_only") and read(cfg, "mode", str) == "train":
        name = read(cfg, "data.name", str)
        yield (
            f"data: {name} has nothing to train on. dynmoe-eval run=FOLDER mode=answer asks its "
            "questions; to train choose data=scenes, easy_vqa, llava, ..."
        )


def folders(cfg: DictConfig) -> Iterator[str]:
    for key in ("backbone.path", "backbone.vision.path"):
        path = read(cfg, key, str)
        if path is not None and not (Path(path).expanduser() / "config.json").is_file():
            yield f"{key}: expected a folder with a config.json, found none in '{path}'"


def libraries(cfg: DictConfig) -> Iterator[str]:
    if modality(cfg, "task.module") == "vision-language" and find_spec("transformers") is None:
        yield 'task: needs transformers: pip install "dynmoe[language]"'


RULES = (
    stage_is_chosen,
    dense_before_moe,
    start_is_a_run,
    trained_parts,
    scratch_is_trained,
    there_is_training_data,
    folders,
    libraries,
)

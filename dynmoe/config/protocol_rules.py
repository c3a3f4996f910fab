"""Rules of what a protocol and its way to select a step are for."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from dynmoe.config.reading import modality, read

# By what a task works on: its selection rules, and its protocols. Those of images leave the rule
# to the task.
SELECTIONS = {
    "image": ("training_domain_validation", "oracle", "leave_one_domain_out"),
    "text": ("best_dev", "heldout"),
    "vision-language": ("last_step",),
}
PROTOCOLS = {
    "image": "domainbed, gmoe or swad",
    "text": "glue or glue_heldout",
    "vision-language": "llava",
}


def patience_fits(cfg: DictConfig) -> Iterator[str]:
    patience = read(cfg, "task.patience", object)
    if patience is not None and modality(cfg, "task.module") != "text":
        yield "task.patience: only runs on texts stop early. Leave it out"


def draws_fit(cfg: DictConfig) -> Iterator[str]:
    if read(cfg, "hparams_seed", int) and modality(cfg, "task.module") != "image":
        yield "hparams_seed: draws DomainBed's hyper-parameters. Sweep task.optimizer.lr instead"


def protocol_fits(cfg: DictConfig) -> Iterator[str]:
    kind, name = modality(cfg, "task.module"), read(cfg, "protocol.name", str)
    if kind not in PROTOCOLS or name is None:
        return
    selection = read(cfg, "protocol.selection", str)
    fits = selection is None if kind == "image" else selection in SELECTIONS[kind]
    if not fits:
        yield (
            f"protocol: task.module works on {kind}, {name} does not. "
            f"Choose protocol={PROTOCOLS[kind]}."
        )


def selection_fits(cfg: DictConfig) -> Iterator[str]:
    selection, kind = read(cfg, "task.selection", str), modality(cfg, "task.module")
    if selection is None or kind not in SELECTIONS:
        return
    if selection not in SELECTIONS[kind]:
        fix = PROTOCOLS[kind].split(",")[0]
        yield f"task.selection: {selection} is not for a task on {kind}. Choose protocol={fix}."
    elif selection == "heldout" and read(cfg, "protocol.holdout_fraction", float) == 0:
        yield (
            "protocol.holdout_fraction: 0 leaves nothing to select by. "
            "Set a share, e.g. 0.1, or task.selection=best_dev"
        )


RULES = (patience_fits, draws_fit, protocol_fits, selection_fits)

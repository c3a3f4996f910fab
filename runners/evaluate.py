"""``dynmoe-eval run=FOLDER``: evaluate a trained run again, from its own config and checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dynmoe.errors import ConfigError, UserError
from dynmoe.report.records import Record, RunFolder
from runners import trained

HELP = """dynmoe-eval evaluates a trained run again, from its own configuration and checkpoint.

  dynmoe-eval run=FOLDER [checkpoint=selected|last|FILE] [data.root=FOLDER] [data.workers=N]
              [data.eval_batch_size=N] [trainer.accelerator=cpu|gpu]

FOLDER is outputs/<name>/<run>. Prints the accuracy of every environment beside the recorded one:
on the same machine they are equal. Nothing is written.
"""

OVERRIDES = ("data.root", "data.workers", "data.eval_batch_size", "trainer.accelerator")


def main() -> None:
    """Exit 0, or 2 with a message that names what is wrong."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    try:
        evaluate(*parse(arguments))
    except UserError as error:
        print(f"dynmoe-eval: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(arguments: list[str]) -> tuple[RunFolder, Path, DictConfig]:
    """The run folder, the checkpoint file and the configuration to evaluate with.

    Raises:
        ConfigError: an unknown key, a folder that is no run, or a checkpoint that is not there.
    """
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in ("run", "checkpoint", *OVERRIDES):
            known = ", ".join(f"{k}=" for k in ("run", "checkpoint", *OVERRIDES))
            raise ConfigError(f"{argument}: unknown argument, expected {known}")
        given[key] = value
    if "run" not in given:
        raise ConfigError("run=FOLDER is missing: the folder outputs/<name>/<run> of a trained run")
    folder = RunFolder(given.pop("run"))
    cfg = trained.configuration(folder)
    name = given.pop("checkpoint", "selected")
    checkpoint = trained.checkpoint_of(folder, name)
    if not checkpoint.exists():
        raise ConfigError(f"checkpoint={name}: there is no file {checkpoint}; try checkpoint=last")
    if "data.root" in given:  # the saved configuration is resolved: the root stands there twice
        if "root" not in cfg.data:
            raise ConfigError(f"data.root: {cfg.data.name} is built in, it has no folder")
        cfg.data.environments.root = given["data.root"]
    overrides = OmegaConf.from_dotlist([f"{key}={value}" for key, value in given.items()])
    return folder, checkpoint, OmegaConf.merge(cfg, overrides)  # type: ignore[return-value]


def evaluate(folder: RunFolder, checkpoint: Path, cfg: DictConfig) -> dict[str, float]:
    """Accuracies by DomainBed's names; prints them beside the recorded ones."""
    from runners import build

    settings = build.settle_runtime(cfg)
    data = build.build_data(cfg)
    data.setup()
    task, step = trained.load(cfg, data, settings["fused_attention"], checkpoint)
    data.repeat_evaluation_of(step)
    trainer = build.build_trainer(cfg, [], folder)
    trainer.validate(task, datamodule=data, verbose=False)
    accuracies = task.scores()
    recorded = {r["step"]: r for r in folder.read("results")}.get(step)
    _print(folder, checkpoint, step, accuracies, recorded, data.env_names)
    return accuracies


def _print(
    folder: RunFolder,
    checkpoint: Path,
    step: int,
    accuracies: dict[str, float],
    recorded: Record | None,
    env_names: list[str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table()
    for column in ("environment", "split", "accuracy", "recorded"):
        table.add_column(column, justify="right" if column in ("accuracy", "recorded") else "left")
    for key, accuracy in accuracies.items():
        env, split, _ = key.split("_")
        before = "-" if recorded is None else f"{100 * recorded[key]:.2f} %"
        table.add_row(env_names[int(env[3:])], split, f"{100 * accuracy:.2f} %", before)
    console.print(f"{folder.path.name}, {checkpoint.name}, step {step}")
    console.print(table)


if __name__ == "__main__":
    main()

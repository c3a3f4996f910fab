"""``dynmoe-run``: train one configuration, or many with ``-m``; see ``dynmoe-run --help``."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dynmoe.report.records import RunFolder
from runners import cli


def job(cfg: DictConfig) -> float | None:
    """One run, from its configuration to its summary. Returns the accuracy it is selected by.

    A finished run is shown, not repeated; an interrupted one goes on from its last evaluation.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    if cfg.mode == "check":
        from runners.build import build_data

        data = build_data(cfg)
        data.setup()
        data.print_check()
        return None
    if cfg.overwrite:
        _clear(folder.path)
    if not folder.is_done and not train(cfg, folder):
        return None
    return show(folder)


def train(cfg: DictConfig, folder: RunFolder) -> bool:
    """Build, fit, and leave records and checkpoints in the folder. False on ranks other than 0."""
    from runners import build

    data = build.build_data(cfg)
    data.setup()
    task = build.build_task(cfg, data)
    trainer = build.build_trainer(cfg, build.build_callbacks(cfg, data, folder), folder)
    checkpoint = folder.path / "checkpoints" / "last.ckpt"
    if trainer.is_global_zero:
        OmegaConf.save(cfg, folder.path / "config.yaml", resolve=True)
        folder.write_run(build.facts(cfg, data, task))
        folder.truncate_after(_step_of(checkpoint))
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    return trainer.is_global_zero


def show(folder: RunFolder) -> float:
    """Draw the figures and write the summary if that is still to do; print the summary."""
    from rich.console import Console

    from dynmoe.report import figures, render, summary

    if not folder.is_done:
        figures.draw_all(folder)
    result = summary.summarize(folder)
    (folder.path / "summary.md").write_text(render.to_markdown(result), encoding="utf-8")
    folder.mark_done()
    Console().print(render.to_console(result))
    outs = [env.out_accuracy for env in result.environments if not env.is_test]
    return sum(outs) / len(outs)


def _step_of(checkpoint: Path) -> int:
    """The last optimizer step a checkpoint has seen; -1 without a checkpoint."""
    import torch

    if not checkpoint.exists():
        return -1
    return (
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"] - 1
    )


def _clear(folder: Path) -> None:
    """Remove what an earlier run of this configuration wrote."""
    for name in ("checkpoints", "figures", "tensorboard", "csv"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.jsonl", "run.json", "config.yaml", "summary.md", "done"):
        for file in folder.glob(pattern):
            file.unlink()


def main() -> None:
    cli.run(job, prog="dynmoe-run")


if __name__ == "__main__":
    main()

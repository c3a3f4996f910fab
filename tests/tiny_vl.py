"""The shipped vision-language configuration at tiny size: three stages in a few seconds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dynmoe import cli, job
from dynmoe.config.runs import run_folder
from dynmoe.records import RunFolder

assert cli  # registers the resolvers of conf/

# Four steps and two evaluations a stage; of DynMoE two windows of two steps.
TINY_VL = (
    "task=vl",
    "data.content.train_scenes=24",
    "data.content.test_scenes=10",
    "protocol.stages.align.datasets.Scenes.batch_size=8",
    "protocol.stages.instruct.datasets.Scenes.batch_size=8",
    "protocol.stages.moe.datasets.Scenes.batch_size=8",
    "protocol.stages.align.defaults.eval_every=2",
    "protocol.stages.instruct.datasets.Scenes.eval_every=2",
    "protocol.stages.moe.datasets.Scenes.eval_every=2",
    "data.eval_batch_size=5",
    "data.max_new_tokens=4",
    "task.steps=4",
    "backbone.vision.patch_size=16",
    "backbone.vision.options={patch_size: 16, embed_dim: 12, depth: 2, num_heads: 2}",
    "backbone.options={hidden_size: 16, intermediate_size: 24, num_hidden_layers: 4, "
    "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 256}",
    "logger=none",
    "trainer.enable_progress_bar=false",
)
SHORT_WINDOWS = ("moe.adaptation.length=2", "moe.adaptation.period=2")
STAGES = ("align", "instruct", "moe")


def settings(outputs: Path, *overrides: str) -> list[str]:
    """What a command line says; without a word of experts it is DynMoE's."""
    is_dynmoe = not any(text.startswith(("moe=", "stage=")) for text in overrides)
    windows = SHORT_WINDOWS if is_dynmoe else ()
    return [*TINY_VL, f"paths.outputs={outputs}", *windows, *overrides]


def run(outputs: Path, *overrides: str) -> RunFolder:
    """What `dynmoe-run` does, in this process."""
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        cfg = compose("config", settings(outputs, *overrides))
        folder = RunFolder(run_folder(cfg))
        folder.path.mkdir(parents=True, exist_ok=True)  # as Hydra does
        place = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(folder.path)))
        with mock.patch.object(HydraConfig, "get", lambda: place):
            job.job(cfg)
    return folder


def configuration(outputs: Path, *overrides: str) -> DictConfig:
    """Resolved: it can be used outside of Hydra."""
    from omegaconf import OmegaConf

    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        cfg = compose("config", settings(outputs, *overrides))
        return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[return-value]


def stage_folders(outputs: Path) -> dict[str, list[RunFolder]]:
    """The runs below `outputs` by their stage."""
    names = {"align": "vl_align", "instruct": "vl_instruct", "moe": "vl"}
    return {
        stage: [RunFolder(path) for path in sorted((outputs / name).glob("scenes_*"))]
        for stage, name in names.items()
    }


def records(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Without what is measured on the clock, and the folder's name."""
    measured = ("step_time", "eval_time", "mem_gb", "args")
    return {
        kind: [{k: v for k, v in each.items() if k not in measured} for each in folder.read(kind)]
        for kind in ("results", "routing", "events", "examples")
    }

"""From a configuration to its model: no slow start, and no texts that are too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dynmoe.data.text.module import GlueData
from dynmoe.data.text.tokens import word_tokenizer
from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.training import build, trained


@pytest.mark.parametrize(("saved", "loaded"), [("cluster", "random"), ("fresh", "fresh")])
def test_experts_that_a_checkpoint_will_fill(saved: str, loaded: str, tmp_path: Path) -> None:
    """No k-means on weights that are thrown away."""
    cfg = {"moe": {"init": saved}, "trainer": {}, "data": {}, "backbone": {"pretrained": True}}
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "config.yaml")
    assert trained.configuration(RunFolder(tmp_path)).moe.init == loaded


def test_texts_longer_than_the_backbones_positions_are_refused() -> None:
    data = GlueData(
        name="RTE", task="rte", source="tsv", batch_size=8, trial_seed=0, max_length=513
    )
    data.tokenizer = word_tokenizer(["one", "two"], 8)
    backbone = {
        "_target_": "dynmoe.backbones.build_text_classifier",
        "model": None,
        "architecture": "bert",
        "options": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    }
    cfg = OmegaConf.create({"seed": 0, "backbone": backbone, "moe": {"router": None}})
    with pytest.raises(ConfigError, match=r"data.max_length=513: .*positions for 512 tokens"):
        build.build_task(cfg, data, fused_attention=True)

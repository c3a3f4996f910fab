"""What stands between a configuration and its model: old names, slow starts, texts too long."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.training import build, trained


@pytest.mark.parametrize(
    ("saved", "loaded"), [("upcycle", "copy"), ("cluster", "random"), ("fresh", "fresh")]
)
def test_experts_that_a_checkpoint_will_fill(saved: str, loaded: str, tmp_path: Path) -> None:
    """No k-means on weights that are thrown away."""
    cfg = {"moe": {"init": saved}, "trainer": {}, "backbone": {"pretrained": True}}
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "config.yaml")
    assert trained.configuration(RunFolder(tmp_path)).moe.init == loaded


def test_texts_longer_than_the_backbones_positions_are_refused() -> None:
    data: Any = SimpleNamespace(modality="text", backbone_arguments={"num_classes": 2})
    backbone = {
        "_target_": "dynmoe.backbones.build_text_classifier",
        "model": None,
        "architecture": "bert",
        "options": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    }
    cfg = OmegaConf.create({"seed": 0, "backbone": backbone, "data": {"max_length": 513}})
    with pytest.raises(ConfigError, match=r"data.max_length=513: .*positions for 512 tokens"):
        build.build_task(cfg, data, fused_attention=True)

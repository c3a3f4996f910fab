"""Whole runs on a folder of a model that is a mixture already."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from tiny_texts import TINY_TEXT, WORDS, write_rte
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dynmoe import job
from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.training import build, evaluate
from dynmoe.training.quantize import quantize


def write_olmoe(folder: Path) -> Path:
    words = ("[PAD]", "[UNK]", *WORDS)
    split = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    split.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "olmoe", vocab_size=len(words), pad_token_id=0, eos_token_id=None, **sizes, **heads
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def command(model: Path, *overrides: str) -> DictConfig:
    plain = (each for each in TINY_TEXT if not each.startswith("backbone"))
    given = [*plain, "backbone=olmoe", f"backbone.path={model}", "data=rte", *overrides]
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        return compose("config", given)


def test_a_mixture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """The folder has none."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_experts": 4, "vocab_size": 40}
    AutoConfig.for_model("qwen2_moe", mlp_only_layers=[0], **sizes).save_pretrained(tmp_path)
    arguments = {"num_classes": 2, "vocab_size": 40, "pad_token_id": 0}
    data: Any = SimpleNamespace(backbone_arguments=arguments, check_backbone=lambda model: None)
    cfg = command(tmp_path, "data.root=.", "moe=dynmoe", "moe.layers=[0]")
    with pytest.raises(ConfigError, match=r"moe.layers=\[0\].*dense blocks \[0\]"):
        build.build_task(cfg, data, fused_attention=False)
    cfg.moe.layers = [1]
    with pytest.raises(ConfigError, match=r"backbone.path=.*cannot load"):
        build.build_task(cfg, data, fused_attention=False)


@pytest.mark.slow
@pytest.mark.parametrize("moe", ["native", "dynmoe"])
def test_a_folder_of_olmoe_all_the_way(moe: str, tmp_path: Path) -> None:
    """Trained under its own router or another, recorded, saved, evaluated again, and quantised."""
    root, model = write_rte(tmp_path / "glue"), write_olmoe(tmp_path / "olmoe")
    windows = ("moe.adaptation.length=1", "moe.adaptation.period=1")
    cfg = command(
        model,
        *(f"data.root={root}", f"paths.outputs={root}", f"moe={moe}", "moe.layers=all"),
        *(windows if moe == "dynmoe" else ()),
    )
    trained = RunFolder(tmp_path / "run")
    trained.path.mkdir()
    job.train(cfg, trained)
    job.show(trained)
    facts = trained.read_run()
    assert list(facts["start_experts"].values()) == [4, 4]
    assert facts["costs"]["flops"] is not None and facts["config"]["moe.num_experts"] == 4
    (loaded,) = facts["loaded"].values()
    assert loaded["fresh"] == ["score.weight"] and loaded["tensors"] > 10
    assert bool(trained.read("events")) == (moe == "dynmoe")
    again = evaluate.evaluate(*evaluate.parse([f"run={trained.path}", "checkpoint=last"])[1:])
    assert again == trained.read("results")[-1]["scores"]
    bits = ("quant.bits.default=8", "quant.bits.experts=frequency:1", "quant.calib.batches=1")
    given = [f"run={trained.path}", "checkpoint=last", "mode=quantize", *bits]
    own, eight = quantize(*evaluate.parse(given)[1:])
    assert own["scores"] == again and eight["loss"] == pytest.approx(own["loss"], rel=0.05)
    assert eight["layers_by_kind"]["expert"].keys() == {4, 8}  # the most frequent one has 4

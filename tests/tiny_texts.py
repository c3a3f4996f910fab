"""GLUE's official files, made up, and the shipped configuration at tiny size on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from dynmoe import cli

assert cli  # registers the resolvers of conf/

# 3 batches an epoch; a window of one step and an update in every epoch.
TINY_TEXT = (
    "task=glue",
    "data.source=tsv",
    "data.batch_size=8",
    "task.epochs=2",
    "task.optimizer.lr=1e-3",
    "backbone=bert_tiny",
    "backbone.options={hidden_size: 16, num_hidden_layers: 4, num_attention_heads: 2, "
    "intermediate_size: 32, max_position_embeddings: 128}",
    "logger=none",
    "trainer.enable_progress_bar=false",
)
TRAIN, DEV = 22, 10
WORDS = ("a", "the", "cat", "dog", "red", "blue", "runs", "sleeps", "never", "house", "sees")


FEW_EXPERTS = ("moe.num_experts=2", "moe.max_experts=4")


def config(root: Path, *overrides: str, moe: str = "dynmoe_glue") -> DictConfig:
    few = FEW_EXPERTS if moe == "dynmoe_glue" else ()
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        return compose("config", [*TINY_TEXT, f"data.root={root}", f"moe={moe}", *few, *overrides])


def write_rte(root: Path) -> Path:
    """RTE: what is entailed repeats its premise."""
    header = "index\tsentence1\tsentence2\tlabel"
    words = ("entailment", "not_entailment")
    write(root / "RTE" / "train.tsv", [header, *pairs(TRAIN, words, seed=0)])
    write(root / "RTE" / "dev.tsv", [header, *pairs(DEV, words, seed=1)])
    tests = [line.rpartition("\t")[0] for line in pairs(6, words, seed=2)]
    write(root / "RTE" / "test.tsv", [header.rpartition("\t")[0], *tests])
    return root


def write_mix(root: Path) -> Path:
    """RTE; CoLA, acceptable where a cat is; SST-2, positive where a dog is; STS-B."""
    write_rte(root)
    write_stsb(root)
    for name, count, seed in (("train", TRAIN, 3), ("dev", DEV, 4)):
        draw = random.Random(seed)
        said = [sentence(draw) for _ in range(count)]
        cola = [f"a\t{int('cat' in text)}\t\t{text}" for text in said]
        write(root / "CoLA" / f"{name}.tsv", cola)
        sst2 = [f"{text}\t{int('dog' in text)}" for text in said]
        write(root / "SST-2" / f"{name}.tsv", ["sentence\tlabel", *sst2])
    return root


def write_stsb(root: Path) -> Path:
    """STS-B: the score is what is said of the sentences."""
    before = ("index", "genre", "filename", "year", "old_index", "source1", "source2")
    header = "\t".join((*before, "sentence1", "sentence2", "score"))
    for name, count, seed in (("train", TRAIN, 0), ("dev", DEV, 1)):
        draw = random.Random(seed)
        lines = [
            "\t".join(map(str, (i, "g", "f", 2012, i, "s", "t", sentence(draw), sentence(draw))))
            + f"\t{draw.randint(0, 25) / 5:.3f}"
            for i in range(count)
        ]
        write(root / "STS-B" / f"{name}.tsv", [header, *lines])
    return root


def pairs(count: int, labels: Sequence[str], seed: int) -> list[str]:
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        first, label = sentence(draw), labels[index % len(labels)]
        second = first if index % len(labels) == 0 else sentence(draw)
        lines.append(f"{index}\t{first}\t{second}\t{label}")
    return lines


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 9)))


def write(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

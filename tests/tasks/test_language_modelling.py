"""Losses and scores of language models, and that no token sees what follows it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_lm import GPT2, LLAMA, config, write_corpus

from dynmoe.config.compose import preflight
from dynmoe.data.lm.blocks import IGNORE
from dynmoe.layers.moe import moe_layers
from dynmoe.training.build import build_data, build_task


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    write_corpus(path)
    return path


def made(root: Path, *overrides: str, **chosen: Any) -> tuple[Any, Any]:
    cfg = config(root, "data.cache=null", *overrides, **chosen)
    data = build_data(cfg)
    data.setup()
    task = build_task(cfg, data, fused_attention=True)
    own: Any = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda counts, reduce_op: counts))
    task._trainer = own
    task.log_dict = task.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return data, task


@pytest.mark.parametrize("backbone", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_loss_is_that_of_transformers(root: Path, backbone: tuple[str, ...]) -> None:
    data, task = made(root, moe="dense", backbone=backbone)
    task.backbone.eval()  # GPT-2's own dropout
    for batch in [*data.train_dataloader()][:2]:
        ids = torch.cat([batch.tokens["input_ids"], batch.label[:, -1:]], dim=1)
        labels = torch.cat([torch.full_like(ids[:, :1], IGNORE), batch.label], dim=1)
        expected = task.backbone.model(input_ids=ids.clamp(min=0), labels=labels).loss
        found = task.training_step(batch, 0)["loss"]
        assert found.item() == pytest.approx(batch.weight * expected.item(), rel=1e-5)


@pytest.mark.parametrize("length", [16, 5])
def test_scores_are_those_of_a_naive_count(root: Path, length: int) -> None:
    """Token by token of each document's stream, in bits over bytes."""
    data, task = made(root, f"data.length={length}", "data.eval_batch_size=3")
    task.eval()
    task.on_validation_epoch_start()
    with torch.no_grad():
        for batch in data.val_dataloader():
            task.validation_step(batch, 0)
        task.on_validation_epoch_end()
        for name, documents in data.sets.items():
            if name == "train":
                continue
            end, nats, right, count = data.tokenizer.eos_token_id, 0.0, 0, 0
            stream = [end]
            for text in documents:
                stream += [*data.tokenizer(text, add_special_tokens=False)["input_ids"], end]
            for first in range(0, len(stream) - 1, length):
                ids = torch.tensor([stream[first : first + length + 1]])
                logits = task.backbone({"input_ids": ids[:, :-1]})[0].double()
                for place, token in enumerate(ids[0, 1:].tolist()):
                    nats -= logits[place].log_softmax(0)[token].item()
                    right += int(logits[place].argmax() == token)
                    count += 1
            size = sum(len(text.encode()) for text in documents)
            assert task.scores()[name] == pytest.approx(
                {
                    "loss": nats / count,
                    "bits_per_byte": nats / math.log(2) / size,
                    "perplexity": math.exp(nats / count),
                    "accuracy": right / count,
                },
                rel=1e-5,
            )
    (example, *_) = task.example_records()
    assert example["set"] == "validation" and len(example["tokens"]) == length
    assert {len(bits) for bits in example["experts"].values()} == {length}


# Expert threshold chooses in the batch at the start of training, and after that by its cuts.
MIXTURES = {"expert_threshold": ["moe.router.warm_up=0"]}
MIXTURES |= {each: [] for each in ("dynmoe", "dynmoe_budget", "topk", "mass", "moepp")}


@pytest.mark.parametrize("moe", MIXTURES)
@pytest.mark.parametrize("training", [True, False])
def test_no_logit_sees_a_later_token(root: Path, moe: str, training: bool) -> None:
    data, task = made(root, *MIXTURES[moe], moe=moe)
    batch = next(iter(data.train_dataloader()))
    ids = batch.tokens["input_ids"]
    assert moe_layers(task.backbone)
    task.backbone.train(training)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            found: torch.Tensor = task.backbone({"input_ids": tokens})
        return found

    before = logits(ids)
    for place in (1, 8, 15):
        changed = ids.clone()
        changed[:, place:] = torch.randint(1, 280, changed[:, place:].shape)
        after = logits(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after[:, place], before[:, place])


def test_padding_is_not_routed(root: Path) -> None:
    data, task = made(root)
    (short,) = (
        batch
        for batch in data.val_dataloader()
        if "attention_mask" in batch.tokens and batch.source == "validation"
    )
    task.eval()
    _, tape = task.routed_forward(short.tokens)
    real = int((short.label != IGNORE).sum())
    assert {int(calls[0].stats.k_hist.sum()) for calls in tape.values()} == {real}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["moe=expert_choice"], "moe=expert_threshold"),
        (["moe=softmoe"], "moe=expert_threshold"),
        (["backbone=vit_small"], "backbone=lm_tiny"),
        (["backbone=vl_tiny"], "backbone=lm_tiny"),
        (["backbone=bert_tiny"], "Take a decoder"),
        (["data=glosses"], "data=lm_glosses or text_files"),
        (["protocol=glue"], "protocol=lm"),
        (["task.selection=best_dev"], "protocol=lm"),
        (["data=text_files", "data.root=."], ""),
        (["data=text_files"], "data.root"),
        (["data=text_files", "data.root=.", "data.validation=0"], "data.validation=0.05"),
        (["data=text_files", "data.root=.", "data.test=0.96"], "Lower them"),
        (["data=text_files", "data.root=.", "data.validation=[a.txt]", "data.test=0"], ""),
        (
            ["data=text_files", "data.root=.", "data.validation=['a*']", "data.test=['b','a*']"],
            "'a*' is a pattern of data.validation too",
        ),
        (["data.vocabulary=100"], "257 or more"),
        (["backbone=lm_tiny_gpt2", "data.length=513"], "data.length: expected at most 512"),
        (["backbone=lm_tiny_gpt2", "data.length=512"], ""),
        (["backbone=lm_tiny", "data.length=2000"], ""),  # rotary positions
        (["backbone=lm_tiny", "backbone.pretrained=true"], "backbone.pretrained: an architecture"),
        (["mixing=uniform"], "leave mixing out"),
        (["stage=align"], "task=vl"),
        (["backbone=gpt2", "backbone.pretrained=false"], ""),
    ],
)
def test_commands(overrides: list[str], expected: str) -> None:
    text = "\n".join(preflight(["task=lm", *overrides]).problems)
    assert expected in text and bool(text) == bool(expected), text

"""Generation as `dynmoe-bench generate` measures it, on tiny models. No time is asserted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Refused
from lightning.pytorch.plugins import Precision
from vl_models import BOS, EOS, IMG, questions, vl_model

from dynmoe.benchmark.models import TimedModel
from dynmoe.benchmark.steps import Answers, measure_generation, question_batches, question_facts
from dynmoe.data.text.batches import Key
from dynmoe.layers import moe_layers, record_routing

pytestmark = pytest.mark.usefixtures("short_samples")

NEW = 6
ASKED = [questions([[BOS, *IMG, 7, 8], [BOS, *IMG, 9]]), questions([[BOS, 5, 6], [BOS, 4]])]


def test_exactly_as_many_tokens_although_the_model_would_end() -> None:
    model = vl_model()

    def prefer_the_end(_: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([EOS]), 1e4)

    model.language_model.get_output_embeddings().register_forward_hook(prefer_the_end)
    assert model.generate(ASKED[0].tokens, NEW).tolist() == [[EOS], [EOS]]
    ids_BN = model.generate(ASKED[0].tokens, NEW, exactly=True)
    assert ids_BN.shape == (2, NEW) and not (ids_BN == EOS).any()


def test_calls_answer_batch_after_batch() -> None:
    answers = Answers(vl_model(), ASKED, NEW, Precision())
    calls = [answers() for _ in range(3)]
    assert torch.equal(calls[0], answers.model.generate(ASKED[0].tokens, NEW, exactly=True))
    assert torch.equal(calls[0], calls[2]) and not torch.equal(calls[0], calls[1])


def test_fixed_k_is_that_of_every_part_whatever_is_padded() -> None:
    model = vl_model(moe="topk")
    assert Answers(model, ASKED, NEW, Precision()).routed()[0] == {
        "prompt": 2.0,
        "image": 2.0,
        "answer": 2.0,
    }
    assert Answers(model, ASKED[1:], NEW, Precision()).routed()[0].keys() == {"prompt", "answer"}
    assert Answers(vl_model(), ASKED, NEW, Precision()).routed() == ({}, 0)


def test_flops_beyond_the_dense_model_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe.layers.grouped.STACKED_ROWS", 0)  # padding is no useful work
    dense, moe = (Answers(vl_model(moe=moe), ASKED, NEW, Precision()) for moe in (None, "topk"))
    _, beyond = moe.routed()
    assert beyond is not None and moe.flops() == dense.flops() + beyond


def test_k_by_part_is_that_of_the_tokens_one_by_one() -> None:
    model = vl_model(moe="dynmoe")
    k: dict[str, list[int]] = {"prompt": [], "image": [], "answer": []}
    for batch in ASKED:
        with record_routing(model) as tape:
            model.generate(batch.tokens, NEW, exactly=True)
        for first, *others in tape.values():
            for row, place in batch.tokens["attention_mask"].nonzero().tolist():
                is_image = bool(batch.tokens["image_mask"][row, place])
                k["image" if is_image else "prompt"].append(int(first.mask[row, place].sum()))
            k["answer"] += [int(call.mask[row].sum()) for call in others for row in range(2)]
    assert len(k["answer"]) == 2 * 2 * 2 * (NEW - 1)  # batches, rows, layers; the last is not read
    expected = {part: sum(each) / len(each) for part, each in k.items()}
    assert Answers(model, ASKED, NEW, Precision()).routed()[0] == pytest.approx(expected)
    assert len(set(expected.values())) == 3


def test_rows_of_models_beside_each_other() -> None:
    models = {"dense": vl_model(), "DynMoE": vl_model(moe="dynmoe")}
    (layer, _) = moe_layers(models["DynMoE"]).values()
    layer.remove_expert(1)
    done: list[tuple[int, int]] = []
    timed = [
        TimedModel(name, model, {"setting": name, "problem": "Scenes"}, None, None, Precision())  # type: ignore[arg-type]
        for name, model in models.items()
    ]
    rows = measure_generation(timed, ASKED, NEW, 3, lambda *each: done.append(each))
    assert [(row["setting"], row["problem"]) for row in rows] == [
        ("dense", "Scenes"),
        ("DynMoE", "Scenes"),
    ]
    assert done[-1] == (12, 12)  # 3 rounds, of the first token and of all
    for row in rows:
        assert (row["batch"], row["new_tokens"], row["reference"]) == (2, NEW, "dense")
        assert row["tokens_per_s"] == pytest.approx(2 * NEW / row["median_ms"] * 1e3)
        assert row["prompt_ms"] + (NEW - 1) * row["token_ms"] == pytest.approx(row["median_ms"])
        assert row["rounds"] == 3 and row["prompt_ms"] > 0 and row["peak_bytes"] > 0
    assert rows[0]["ideal"] == 1 and 0.5 < rows[1]["ideal"] < 1.5
    assert rows[1]["of_ideal"] == rows[1]["ratio"] / rows[1]["ideal"]
    assert rows[0]["ratio"] == 1 and rows[0]["ratio_quartiles"] == (1, 1)
    assert rows[0]["mean_k"] == {} and rows[1]["mean_k"].keys() == {"prompt", "image", "answer"}
    assert [layer.max_experts for layer in moe_layers(models["DynMoE"]).values()] == [2, 3]


def test_the_cache_of_keys_and_values_is_in_the_peak() -> None:
    model = vl_model()
    few, many = (Answers(model, ASKED[:1], new, Precision()).peak_bytes() for new in (60, 80))
    of_a_token = 2 * 2 * 2 * 8 * 4  # rows, keys and values, layers, one head of 8, bytes
    assert many - few >= 20 * of_a_token


def test_batches_are_of_the_reported_set_and_of_all_its_lengths() -> None:
    keys = [*([Key("test", row), Key("test", -row)] for row in range(20)), [Key("other", 0)]]
    loader = SimpleNamespace(
        batch_sampler=keys,
        dataset=SimpleNamespace(__getitems__=lambda batch: batch[0].row),
        collate_fn=lambda row: torch.tensor(row),
    )
    stages: list[str] = []
    data: Any = SimpleNamespace(
        setup=stages.append,
        val_dataloader=lambda: loader,
        env_names=["other", "test"],
        test_envs=[1],
    )
    found: Any = question_batches(data, torch.device("cpu"))
    assert [int(each) for each in found] == [0, 3, 6, 9, 12, 15, 18]
    assert stages == ["validate"]
    assert question_facts(ASKED, NEW) == {"batch": 2, "question_tokens": 4.5, "new_tokens": NEW}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-tokens", "1"], "1: expected a whole number of 2 or more"),
        (["--batch", "0"], "0: expected a whole number of 1 or more"),
        (["task=glue"], "task=glue: expected a task that answers questions, task=vl"),
        (["--k", "9"], "--k 9: expected a mean number of experts per token above 0 and up to 4"),
        (["moe=dense"], "moe=dense: expected the top-any router"),
        (["data.content.scenes=3"], "data.content.scenes: unknown key"),
        (["--runs", ".", "--k", "2"], "--k: not together with --runs"),
        (["--runs", ".", "moe=topk"], "moe=topk: not together with --runs"),
        (["--runs", "."], "expected a sweep or a run, found no run.json"),
    ],
)
def test_refuses(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Refused,
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["data.content.train_scenes=8", "data.content.test_scenes=5", "data.cache=null"]
    own = [] if "--runs" in arguments or "task=glue" in arguments else few
    assert message in " ".join(refused("generate", *arguments, *own).split())
    assert not (tmp_path / "outputs" / "bench").exists()

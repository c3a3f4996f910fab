"""The loss is the mean over answer tokens, and what is recorded what was read, however it is cut.

Scenes of 48 px in 9 patches; a language model of two blocks.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, distributed
from vl_models import GATED, add_experts, widen

from dynmoe.adaptation import DynMoECallback
from dynmoe.backbones.vision import build_vision_tower
from dynmoe.backbones.vlm import build_vision_language_model
from dynmoe.data.base import StepPlan
from dynmoe.data.text.batches import Key
from dynmoe.data.vl.batches import ConversationBatch, Questions, collate_questions
from dynmoe.data.vl.chat import IGNORE, IMAGE
from dynmoe.data.vl.content import scenes
from dynmoe.data.vl.module import VisionLanguageData
from dynmoe.tasks.base import example_record
from dynmoe.tasks.vl import VisionLanguage

PX, PATCH, PATCHES = 48, 16, 9
BATCH, MOST = 8, 4
HALVES = (0.5, 0.5, 0.5)
LAYERS = [f"language_model.model.layers.{block}.mlp" for block in (0, 1)]


@pytest.fixture(scope="module")
def data() -> VisionLanguageData:
    return make_data()


def make_data(accumulate: int = 1) -> VisionLanguageData:
    made = VisionLanguageData(
        name="Scenes",
        content=partial(scenes, stage="instruct", px=PX, train_scenes=20, test_scenes=6),
        image_size=PX,
        patch_size=PATCH,
        mean=HALVES,
        std=HALVES,
        template="simple",
        question_template="simple",
        batch_size=BATCH,
        max_length=128,
        max_new_tokens=MOST,
        eval_batch_size=4,
        examples=2,
    )
    made.connect(StepPlan(seed=0, steps=1, accumulate=accumulate))
    made.setup()
    return made


def make_task(
    data: VisionLanguageData, moe: str | None = "dynmoe", checkpointing: bool = False, **task: Any
) -> VisionLanguage:
    torch.manual_seed(0)
    vision = build_vision_tower(
        PX,
        PATCH,
        HALVES,
        HALVES,
        model="vit_tiny_patch16_224",
        options={"embed_dim": 12, "depth": 2, "num_heads": 2},
    )
    model = build_vision_language_model(
        vision,
        "mlp2x_gelu",
        "simple",
        architecture="llama",
        grad_checkpointing=checkpointing,
        options={**GATED, "head_dim": 8},
        **data.backbone_arguments,
    )
    widen(model)
    if moe is not None:
        add_experts(model, moe)
    given = {
        "trains": ["vision", "projector", "language_model"],
        **data.task_arguments,
        "backbone": model,
        "optimizer": partial(torch.optim.SGD, lr=0.0),
        "aux_weight": 0.1,
        "seed": 0,
    }
    return VisionLanguage(**{**given, **task})


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


# Training.


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: Any, task: Any, optimizer: Any) -> None:
        self.found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        self.found = {name: gradient.clone() for name, gradient in self.found.items()}


class Step(NamedTuple):
    gradients: dict[str, Tensor]
    window: dict[str, dict[str, Tensor]]
    routing: list[dict[str, Any]]
    losses: dict[str, float]


def one_step(parts: int, checkpointing: bool) -> Step:
    """Of 8 conversations in so many parts."""
    data = make_data(parts)
    task, gradients = make_task(data, checkpointing=checkpointing), Gradients()
    adaptation = DynMoECallback(start=0, length=9, period=9)
    fit = trainer(
        accumulate_grad_batches=parts, limit_val_batches=0, callbacks=[gradients, adaptation]
    )
    fit.fit(task, datamodule=data)
    assert fit.global_step == 1
    routing, losses = task.routing_records(), task.losses_since_last()
    return Step(gradients.found, adaptation.state_dict()["window"], routing, losses)


@pytest.fixture(scope="module")
def whole() -> Step:
    return one_step(parts=1, checkpointing=False)


@pytest.mark.parametrize(("parts", "checkpointing"), [(2, False), (4, False), (1, True), (4, True)])
def test_however_a_step_is_computed_it_is_the_same(
    parts: int, checkpointing: bool, whole: Step
) -> None:
    """A recomputed forward counts nowhere: it would enter DynMoE's window twice."""
    found = one_step(parts, checkpointing)
    assert all(any(part in name for name in found.gradients) for part in (*LAYERS, "vision"))
    torch.testing.assert_close(found.gradients, whole.gradients, atol=1e-5, rtol=1e-4)
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert found.routing == whole.routing
    assert list(found.window) == LAYERS
    for layer, expected in whole.window.items():
        for key in ("load_E", "k_hist"):
            assert torch.equal(found.window[layer][key], expected[key])
        unserved_D = found.window[layer]["unserved_D"]
        torch.testing.assert_close(unserved_D, expected["unserved_D"], atol=1e-4, rtol=1e-4)


def the_batch(data: VisionLanguageData) -> ConversationBatch:
    (batch,) = data.train_dataloader()
    return batch


def trained_alone(task: VisionLanguage) -> VisionLanguage:
    """Without a trainer."""
    task.log = lambda *_: None  # type: ignore[method-assign, assignment]
    return task


def row_of(batch: ConversationBatch, row: int) -> dict[str, Tensor]:
    """A conversation alone, without padding."""
    counts = (batch.tokens["image_mask"].sum(1) // PATCHES).tolist()
    real_N = batch.tokens["attention_mask"][row].bool()
    alone = {key: batch.tokens[key][row][real_N][None] for key in batch.tokens if key != "images"}
    return {**alone, "images": batch.tokens["images"].split(counts)[row]}


def test_the_loss_is_the_mean_over_all_answer_tokens(data: VisionLanguageData, whole: Step) -> None:
    task, batch = trained_alone(make_task(data)), the_batch(data)
    losses = []
    for row in range(BATCH):
        alone = row_of(batch, row)
        logprobs_NC = task.backbone(alone)[0].log_softmax(1)
        for place, token in enumerate(alone["input_ids"][0].tolist()):
            if batch.label[row, place] != IGNORE:
                losses.append(-logprobs_NC[place - 1, token])
    assert len(losses) > 2 * BATCH
    expected = torch.stack(losses).mean().item()
    assert whole.losses["loss"] == pytest.approx(expected, rel=1e-5)
    task.aux_weight = 0.0
    assert task.training_step(batch, 0)["loss"].item() == pytest.approx(expected, rel=1e-5)
    half = batch._replace(weight=0.5)
    assert task.training_step(half, 0)["loss"].item() == pytest.approx(expected / 2, rel=1e-5)


def test_parts_of_training(data: VisionLanguageData, whole: Step) -> None:
    rows = [data.stores["train"].row(row) for row in the_batch(data).row.tolist()]
    length = sum(len(ids) for ids, _ in rows)
    images = sum(int((ids == IMAGE).sum()) for ids, _ in rows)
    answers = sum(int((labels != IGNORE).sum()) for _, labels in rows)
    expected = {"prompt": length - images - answers, "image": images, "answer": answers}
    assert min(expected.values()) > 0
    assert [record["layer"] for record in whole.routing if record["source"] == "train"] == LAYERS
    check_parts(whole.routing, "train", expected)


def check_parts(records: list[dict[str, Any]], source: str, expected: dict[str, int]) -> None:
    """Tokens by part; the parts make up the whole."""
    for record in records:
        if record["source"] != source:
            continue
        parts = record["parts"]
        assert {name: part["tokens"] for name, part in parts.items()} == expected
        assert record["tokens"] == sum(expected.values())
        loads = zip(*(part["load"] for part in parts.values()), strict=True)
        assert [sum(load) for load in loads] == record["load"]
        for part in parts.values():
            assert part["mean_k"] == sum(part["load"]) / part["tokens"]


# Evaluation.


class Answered(NamedTuple):
    """Of each question of a set, alone: its answer's ids and what is recorded of it."""

    ids: list[list[int]]
    prompts: list[list[int]]
    examples: list[dict[str, Any]]


def answered_alone(task: VisionLanguage, data: VisionLanguageData, name: str) -> Answered:
    task.eval()
    questions = Questions({name: data.sets[name]}, data.asked.prompts, data._transform)
    collate = partial(collate_questions, data.tokenizer.pad_token_id)
    found = Answered([], [], [])
    for row in range(len(data.sets[name].questions)):
        batch = collate(questions.__getitems__([Key(name, row)]))
        ids_1N, tape = task.generate(batch.tokens, name)
        found.ids.append(ids_1N[0].tolist())
        found.prompts.append(questions.prompts[name][row].tolist())
        found.examples.append(example_record(batch.tokens, ids_1N, tape, 0, data.decode))
    return found


@pytest.fixture(scope="module")
def evaluated(data: VisionLanguageData) -> VisionLanguage:
    """Ends an answer with a token that some answers have early and others never."""
    task = make_task(data)
    answers = answered_alone(task, data, "test").ids
    ends = [token for token in {a[1] for a in answers} if any(token not in a for a in answers)]
    task.backbone.config.eos_token_id = ends[0]
    trainer().validate(task, datamodule=data, verbose=False)
    return task


def test_every_question_is_answered_and_scored(
    data: VisionLanguageData, evaluated: VisionLanguage
) -> None:
    expected = {}
    for name, questions in data.sets.items():
        alone = answered_alone(evaluated, data, name)
        answers = [data.decode(ids) for ids in alone.ids]
        assert len(set(map(len, alone.ids))) > 1 and len(set(answers)) > 1
        assert evaluated.answers[name] == dict(enumerate(answers))
        scores = questions.score(answers)
        assert "kind_colour" in scores
        end = evaluated.backbone.config.eos_token_id
        assert evaluated.cut[name] == sum(end not in ids for ids in alone.ids) > 0
        loss = reference_loss(evaluated, data, name)
        expected[name] = {**scores, "loss": pytest.approx(loss, rel=1e-5)}
    assert evaluated.env_names == ["test", "shuffled"]
    assert evaluated.result() == {"scores": expected, "cut_answers": evaluated.cut}
    assert evaluated.scores() == expected
    logged = {key: value.item() for key, value in evaluated.trainer.callback_metrics.items()}
    assert logged == pytest.approx(
        {
            f"val/{name}/{measure}": value
            for name, scores in evaluated.scores().items()
            for measure, value in scores.items()
        }
    )


@torch.no_grad()
def reference_loss(task: VisionLanguage, data: VisionLanguageData, name: str) -> float:
    """Over all tokens of the right answers, each question alone and without padding."""
    questions = Questions({name: data.sets[name]}, data.asked.prompts, data._transform)
    collate = partial(collate_questions, data.tokenizer.pad_token_id)
    losses = []
    for row, right in enumerate(data.sets[name].records):
        tokens = dict(collate(questions.__getitems__([Key(name, row)])).tokens)
        (answer,) = data.asked.references(name, [row])
        assert data.decode(answer) == right and len(answer) > 1  # what ends it, too
        asked = tokens["input_ids"].shape[1]
        tokens["input_ids"] = torch.cat([tokens["input_ids"], torch.tensor([answer])], 1)
        more = torch.ones(1, len(answer), dtype=torch.long)
        tokens["attention_mask"] = torch.cat([tokens["attention_mask"], more], 1)
        tokens["image_mask"] = torch.cat([tokens["image_mask"], more == 0], 1)
        logprobs_NC = task.backbone(tokens)[0].log_softmax(1)
        losses += [-logprobs_NC[asked - 1 + i, token].item() for i, token in enumerate(answer)]
    return sum(losses) / len(losses)


def test_questions_without_one_right_answer_have_no_loss(data: VisionLanguageData) -> None:
    task = make_task(
        data, moe=None, references=lambda name, rows: [[] for _ in rows], decode=lambda ids: "red"
    )
    trainer().validate(task, datamodule=data, verbose=False)
    assert "score" in task.scores()["test"] and "loss" not in task.scores()["test"]


def test_parts_of_an_evaluation(data: VisionLanguageData, evaluated: VisionLanguage) -> None:
    """An answer's last token is said, but not read."""
    records = evaluated.routing_records()
    for name in ("test", "shuffled"):
        alone = answered_alone(evaluated, data, name)
        images = sum(prompt.count(IMAGE) for prompt in alone.prompts)
        length = sum(map(len, alone.prompts))
        read = sum(len(ids) - 1 for ids in alone.ids)
        assert images == PATCHES * len(alone.prompts)
        expected = {"prompt": length - images, "image": images, "answer": read}
        check_parts(records, name, expected)
    assert {record["source"] for record in records} == {"train", "test", "shuffled"}


def test_examples_are_recorded_token_by_token(
    data: VisionLanguageData, evaluated: VisionLanguage
) -> None:
    alone = answered_alone(evaluated, data, "test")
    records = evaluated.example_records()
    assert [(record["set"], record["row"]) for record in records] == [("test", 0), ("test", 1)]
    for row, record in enumerate(records):
        ids, prompt = alone.ids[row], alone.prompts[row]
        described = data.asked.describe("test", row)
        assert described["question"] and described["right"] and described["image"]
        assert record == {
            "set": "test",
            "row": row,
            **described,
            "answer": data.decode(ids),
            **alone.examples[row],
        }
        read = [*prompt, *ids[:-1]]
        words = [None if token == IMAGE else data.decode([token]) for token in read]
        assert record["tokens"] == words and words.count(None) == PATCHES
        assert record["answer_from"] == len(prompt)
        assert list(record["experts"]) == LAYERS
        for bits in record["experts"].values():
            assert len(bits) == len(read)
            assert all(len(bit) == 3 and "1" in bit for bit in bits)  # of 3 experts one at least


def test_a_dense_model_has_examples_without_experts(data: VisionLanguageData) -> None:
    task = make_task(data, moe=None)
    trainer().validate(task, datamodule=data, verbose=False)
    first = task.example_records()[0]
    assert first["experts"] == {} and first["answer"] == task.answers["test"][0]
    assert task.routing_records() == []


def test_processes_answer_together(
    data: VisionLanguageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has answered what this one has not."""
    seen: dict[str, dict[int, str]] = {}

    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, {1: "blue", 3: "red"}]

    def score(name: str, answers: dict[int, str]) -> dict[str, float]:
        seen[name] = answers
        return {"score": 0.25}

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    task = make_task(data, moe=None, score=score)
    both = SimpleNamespace(world_size=2)
    monkeypatch.setattr(VisionLanguage, "trainer", both)
    task.log_dict = lambda scores, **_: None  # type: ignore[method-assign, assignment]
    task.sum_over_ranks = lambda counts: 2 * counts  # type: ignore[method-assign]
    task.on_validation_epoch_start()
    task.count_losses("test", torch.tensor([1.0, 2.0]))
    task.answers = {name: {0: "one", 2: "two"} for name in data.env_names}
    task.on_validation_epoch_end()
    assert seen["test"] == seen["shuffled"] == {0: "one", 1: "blue", 2: "two", 3: "red"}
    assert task.scores() == {"test": {"score": 0.25, "loss": 1.5}, "shuffled": {"score": 0.25}}


def test_what_does_not_train_is_frozen(data: VisionLanguageData) -> None:
    """The optimizer gets the rest alone."""
    task = make_task(data, trains=["projector", "moe_layers"])
    names = {name for name, p in task.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in names} == {"projector", "language_model"}
    assert all("projector" in name or ".mlp." in name for name in names)
    (group,) = task.new_optimizer().param_groups
    assert len(group["params"]) == len(names)

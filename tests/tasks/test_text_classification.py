"""GLUE's metrics equal those of scikit-learn and SciPy, on whole sets; the loss fits the task."""

from __future__ import annotations

import copy
from itertools import product
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.data.text.batches import TextBatch
from dynmoe.errors import DataError
from dynmoe.layers import ExpertChoiceRouter, MoELayer, TopKRouter
from dynmoe.tasks.text import TextClassification, accuracy, f1, matthews


class GivenLogits(nn.Module):
    """A backbone whose input is its output."""

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return tokens["logits"]


def task(metrics: tuple[str, ...], num_classes: int, **changes: Any) -> TextClassification:
    made = TextClassification(
        metrics=metrics,
        env_names=changes.pop("env_names", ["dev"]),
        num_classes=num_classes,
        backbone=GivenLogits(),
        optimizer=torch.optim.AdamW,
        aux_weight=0.0,
        seed=0,
        **changes,
    )
    made.log_dict = lambda scores, **_: None  # type: ignore[method-assign, assignment]
    alone = SimpleNamespace(reduce=lambda counts, reduce_op: counts)
    made._trainer = SimpleNamespace(strategy=alone)  # type: ignore[assignment]
    return made


def on_two_ranks(made: TextClassification) -> TextClassification:
    """Both have the same sums, and DDP's reduce writes into the tensor that it gets."""
    made.trainer.strategy.reduce = lambda counts, reduce_op: counts.mul_(2)  # type: ignore[method-assign, assignment]
    return made


def evaluated(
    made: TextClassification, batch: int = 7, **sets: tuple[Tensor, Tensor]
) -> dict[str, dict[str, float]]:
    """The scores of (logits [N, C], label [N]), given in batches."""
    made.on_validation_epoch_start()
    for source, (logits, label) in sets.items():
        # The long ones first, as loaders give them.
        for rows in torch.arange(len(label)).flip(0).split(batch):
            made.validation_step(TextBatch({"logits": logits[rows]}, label[rows], source, rows), 0)
    made.on_validation_epoch_end()
    return made.scores()


def test_scores_that_depend_on_batches_are_announced_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for router, expected in ((TopKRouter, 0), (ExpertChoiceRouter, 1)):
        made = task(("accuracy",), 2)
        made.backbone = MoELayer(nn.Identity(), 4, router, 2)
        made.trainer.is_global_zero = True  # type: ignore[misc]
        for _ in range(2):
            made.on_validation_start()
        assert caplog.text.count("data.eval_batch_size") == expected


@pytest.mark.parametrize("wrong", ["training_step", "validation_step"])
def test_weights_count_anew_after_an_exception(wrong: str, monkeypatch: Any) -> None:
    made = task(("accuracy",), 2)
    made.backbone = layer = MoELayer(nn.Linear(4, 4), 4, TopKRouter, 2)
    made.configure_optimizers = lambda: torch.optim.SGD(made.parameters())  # type: ignore[method-assign]

    def step(*args: Any) -> Tensor:
        copied = copy.deepcopy(made)  # belongs to no step
        assert layer.experts.kept is not None
        assert copied.backbone.experts.kept is None
        raise RuntimeError("stop here")

    monkeypatch.setattr(made, wrong, step)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, barebones=True
    )
    data = torch.utils.data.DataLoader(torch.zeros(2, 4))
    run = trainer.fit if wrong == "training_step" else trainer.validate
    with pytest.raises(RuntimeError, match="stop here"):
        run(made, data)
    assert layer.experts.kept is None and layer.router.kept is None


def classified(classes: int, seed: int = 0, count: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + F.one_hot(label, classes)
    return logits, label


SKLEARN = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}


@pytest.mark.parametrize("metrics", [("accuracy",), ("matthews",), ("accuracy", "f1")])
def test_two_classes_against_sklearn(metrics: tuple[str, ...]) -> None:
    logits, label = classified(2)
    scores = evaluated(task(metrics, 2), dev=(logits, label))
    expected = {name: SKLEARN[name](label, logits.argmax(1)) for name in metrics}
    expected |= {
        "score": np.mean(list(expected.values())),
        "loss": F.cross_entropy(logits, label).item(),
    }
    assert scores["dev"] == pytest.approx(expected, abs=1e-6)


def test_two_ranks_give_the_scores_of_one() -> None:
    logits, label = classified(2)
    made = on_two_ranks(task(("accuracy", "f1"), 2))
    assert evaluated(made, dev=(logits, label)) == evaluated(
        task(("accuracy", "f1"), 2), dev=(logits, label)
    )
    assert made._losses.tolist()[0][1] == 100  # of this rank


def test_a_checkpoint_leaves_the_losses_since_the_last_evaluation() -> None:
    made = on_two_ranks(task(("accuracy",), 2))
    for loss in (1.0, 3.0):
        made._add_to_window(torch.tensor(loss), torch.tensor(loss / 2))
        for _ in range(2):
            checkpoint: dict[str, Any] = {}
            made.on_save_checkpoint(checkpoint)
    assert checkpoint["loss_window"] == [8, 4, 4]  # of two ranks with two steps each
    assert made.losses_since_last() == {"loss": 2, "aux_loss": 1}


def test_three_classes_against_sklearn() -> None:
    logits, label = classified(3)
    scores = evaluated(task(("accuracy",), 3), dev=(logits, label))
    assert scores["dev"]["score"] == pytest.approx(accuracy_score(label, logits.argmax(1)))


def test_regression_against_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 26, (100,), generator=generator) / 5  # ties, as in STS-B
    logits = label[:, None] + torch.randn(100, 1, generator=generator)
    scores = evaluated(task(("pearson", "spearman"), 0), dev=(logits, label))
    pearson = pearsonr(label, logits[:, 0])[0]
    spearman = spearmanr(label, logits[:, 0])[0]
    assert scores["dev"]["pearson"] == pytest.approx(pearson, abs=1e-5)
    assert scores["dev"]["spearman"] == pytest.approx(spearman, abs=1e-5)
    assert scores["dev"]["score"] == pytest.approx((pearson + spearman) / 2, abs=1e-5)


@pytest.mark.parametrize("predicted", [0, 1])
def test_one_class_predicted_for_the_labels_of_cola_is_0(predicted: int) -> None:
    label = torch.tensor([1] * 721 + [0] * 322)
    logits = F.one_hot(torch.full_like(label, predicted), 2).float()
    scores = evaluated(task(("matthews", "f1"), 2), batch=128, dev=(logits, label))["dev"]
    assert scores["matthews"] == 0 == matthews_corrcoef(label, logits.argmax(1))
    assert scores["f1"] == pytest.approx(predicted * 2 * 721 / (721 + 1043))


@pytest.mark.filterwarnings("ignore::UserWarning")  # scikit-learn's, of one class
@pytest.mark.parametrize("classes", [2, 3])
def test_small_tables_are_scored_as_by_sklearn(classes: int) -> None:
    rng = np.random.default_rng(0)
    tables = [*product(range(3), repeat=4)][1:]  # all but the empty one
    if classes == 3:
        tables = [rng.integers(3, size=9) * (rng.random(9) < 0.4) for _ in range(80)]
    for counts in (np.reshape(cells, (classes, classes)) for cells in tables if np.any(cells)):
        label, predicted = np.repeat(list(np.ndindex(counts.shape)), counts.ravel(), axis=0).T
        assert matthews(counts) == pytest.approx(matthews_corrcoef(label, predicted))
        assert accuracy(counts) == pytest.approx(accuracy_score(label, predicted))
        if classes == 2:
            expected = f1_score(label, predicted, labels=[1], average="macro", zero_division=0)
            assert f1(counts) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_up_to_rounding_correlates_with_nothing(dtype: torch.dtype) -> None:
    """Whatever the size of the batches, which decides the rounding."""
    label = torch.randint(0, 26, (100,), generator=torch.Generator().manual_seed(0)) / 5
    for steps in (0, 1):
        noise = steps * torch.finfo(dtype).eps * (torch.arange(100) % 2)
        logits = (2.7 + 2.7 * noise).to(dtype)[:, None]
        for batch in (1, 7, 100):
            made = task(("pearson", "spearman"), 0)
            scores = evaluated(made, batch, dev=(logits, label))["dev"]
            assert (scores["pearson"], scores["spearman"], scores["score"]) == (0, 0, 0)
    flat = torch.full_like(label, 2.0)
    logits = torch.randn(100, 1, generator=torch.Generator().manual_seed(1))
    assert evaluated(task(("pearson", "spearman"), 0), dev=(logits, flat))["dev"]["score"] == 0


def test_correlations_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(2)
    label = torch.randint(0, 26, (100,), generator=generator) / 5
    logits = torch.randn(100, 1, generator=generator)
    found = [
        evaluated(task(("pearson", "spearman"), 0), batch, dev=(logits, label))["dev"]["score"]
        for batch in (1, 7, 100)
    ]
    assert len(set(found)) == 1


def test_sets_are_measured_apart_and_anew() -> None:
    made = task(("accuracy",), 2, env_names=["dev", "type"], heldout=True)
    sets = {name: classified(2, seed) for seed, name in enumerate(("dev", "type", "heldout"))}
    first = evaluated(made, **sets)
    assert list(first) == list(sets)
    for name, (logits, label) in sets.items():
        assert first[name].keys() == {"accuracy", "score", "loss"}
        assert first[name]["score"] == pytest.approx(accuracy_score(label, logits.argmax(1)))
    assert evaluated(made, **sets) == first


@pytest.mark.parametrize("classes", [0, 2])
def test_a_set_without_samples_has_no_score(classes: int) -> None:
    metrics = ("accuracy",) if classes else ("pearson", "spearman")
    made = task(metrics, classes, env_names=["dev", "other"])
    label = torch.arange(4) % 2
    assert list(evaluated(made, dev=(torch.randn(4, max(1, classes)), label))) == ["dev"]


def test_losses() -> None:
    logits, label = classified(3)
    assert torch.equal(task(("accuracy",), 3).loss(logits, label), F.cross_entropy(logits, label))
    numbers, wanted = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])
    assert task(("pearson", "spearman"), 0).loss(numbers, wanted).item() == 2.5


def test_the_evaluation_loss_is_the_mean_over_examples_however_they_are_cut() -> None:
    logits, label = classified(3)
    expected = -logits.double().log_softmax(1)[torch.arange(len(label)), label].mean().item()
    for batch in (1, 7, 100):
        found = evaluated(task(("accuracy",), 3), batch, dev=(logits, label))
        assert found["dev"]["loss"] == pytest.approx(expected, rel=1e-6)
    numbers, wanted = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([2.0, 4.0, 2.0])
    for batch in (1, 2):
        made = task(("pearson", "spearman"), 0)
        assert evaluated(made, batch, dev=(numbers, wanted))["dev"]["loss"] == 5 / 3


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    logits, label = classified(2)
    logits[3, 0] = torch.nan
    loss = evaluated(task(("accuracy",), 2), dev=(logits, label))["dev"]["loss"]
    assert np.isnan(loss)


def test_a_set_may_not_be_called_as_the_training_data_is() -> None:
    with pytest.raises(DataError, match="called train"):
        task(("accuracy",), 2, env_names=["dev", "train"])


@pytest.mark.parametrize("change", ["bfloat16", "half", "to"])
def test_sums_stay_fp32_whatever_the_precision(change: str) -> None:
    """In bf16 a sum of losses stops growing at some hundreds, correlations lose their digits."""
    made = task(("pearson", "spearman"), 0)
    made = made.to(torch.bfloat16) if change == "to" else getattr(made, change)()
    losses = 1 + torch.rand(600, generator=torch.Generator().manual_seed(0))
    for loss in losses:
        made._add_to_window(loss, torch.zeros(()))
    assert made.losses_since_last()["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    predicted = torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    label = predicted[:, 0] + torch.randn(400, generator=torch.Generator().manual_seed(2))
    scores = evaluated(made, dev=(predicted, label))["dev"]
    assert scores["pearson"] == pytest.approx(pearsonr(predicted[:, 0], label)[0], abs=1e-6)
    assert scores["spearman"] == pytest.approx(spearmanr(predicted[:, 0], label)[0], abs=1e-6)


def test_counts_stay_integers_in_half_precision() -> None:
    made = task(("accuracy", "matthews"), 2).to(torch.bfloat16)
    assert made._confusion.dtype == torch.long

"""GLUE's metrics equal those of scikit-learn and SciPy, on whole sets; the loss fits the task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.data.text.batches import TextBatch
from dynmoe.tasks.text import TextClassification


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
    made.log_dict = lambda scores: None  # type: ignore[method-assign, assignment]
    return made


def evaluated(made: TextClassification, **sets: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The scores of (logits [N, C], label [N]), given in batches of 7."""
    made.on_validation_epoch_start()
    for source, (logits, label) in sets.items():
        for part, own in zip(logits.split(7), label.split(7), strict=True):
            made.validation_step(TextBatch({"logits": part}, own, source, torch.arange(0)), 0)
    made.on_validation_epoch_end()
    return made.scores()


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
    assert scores == pytest.approx(
        {f"dev_{name}": value for name, value in expected.items()}
        | {"dev_score": np.mean(list(expected.values()))},
        abs=1e-6,
    )


def test_three_classes_against_sklearn() -> None:
    logits, label = classified(3)
    scores = evaluated(task(("accuracy",), 3), dev=(logits, label))
    assert scores["dev_score"] == pytest.approx(accuracy_score(label, logits.argmax(1)))


def test_regression_against_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 26, (100,), generator=generator) / 5  # ties, as in STS-B
    logits = label[:, None] + torch.randn(100, 1, generator=generator)
    scores = evaluated(task(("pearson", "spearman"), 0), dev=(logits, label))
    pearson = pearsonr(label, logits[:, 0])[0]
    spearman = spearmanr(label, logits[:, 0])[0]
    assert scores["dev_pearson"] == pytest.approx(pearson, abs=1e-5)
    assert scores["dev_spearman"] == pytest.approx(spearman, abs=1e-5)
    assert scores["dev_score"] == pytest.approx((pearson + spearman) / 2, abs=1e-5)


def test_one_class_predicted_is_0_and_no_error() -> None:
    label = torch.tensor([0, 1, 0, 1])
    logits = torch.tensor([[1.0, 0.0]] * 4)
    scores = evaluated(task(("matthews",), 2), dev=(logits, label))
    assert scores["dev_matthews"] == 0 == matthews_corrcoef(label, logits.argmax(1))
    assert evaluated(task(("accuracy", "f1"), 2), dev=(logits, label))["dev_f1"] == 0


def test_sets_are_measured_apart_and_anew() -> None:
    made = task(("accuracy",), 2, env_names=["dev", "type"], heldout=True)
    sets = {name: classified(2, seed) for seed, name in enumerate(("dev", "type", "heldout"))}
    first = evaluated(made, **sets)
    assert first.keys() == {f"{name}_{what}" for name in sets for what in ("accuracy", "score")}
    for name, (logits, label) in sets.items():
        assert first[f"{name}_score"] == pytest.approx(accuracy_score(label, logits.argmax(1)))
    assert evaluated(made, **sets) == first


def test_losses() -> None:
    logits, label = classified(3)
    assert torch.equal(task(("accuracy",), 3).loss(logits, label), F.cross_entropy(logits, label))
    numbers, wanted = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])
    assert task(("pearson", "spearman"), 0).loss(numbers, wanted).item() == 2.5

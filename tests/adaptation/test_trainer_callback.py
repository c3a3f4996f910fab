"""The callback of transformers' Trainer: the auxiliary loss, windows, and resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_adapt import DIM, SLOTS, Net, layer, unserved
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dynmoe.adaptation import DynMoETrainerCallback, MoETrainerCallback
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    BiasedTopKRouter,
    ConflictLoss,
    MoELayer,
    TopKRouter,
    aux_loss,
    record_routing,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


class Classifier(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> Any:  # type: ignore[override]
        logits = super().forward(x)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def classifier(num_layers: int, kind: type[Classifier] = Classifier) -> Any:
    torch.manual_seed(0)
    return kind(*(layer() for _ in range(num_layers)))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        own = torch.Generator().manual_seed(row)
        return {"x": torch.randn(DIM, generator=own), "labels": torch.tensor(row % 2)}


def trainer(folder: Path, model: Any, callback: MoETrainerCallback, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "disable_tqdm": True,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        **options,
    }
    args = TrainingArguments(**settings)
    return Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])


def test_experts_change_and_the_loss_has_the_auxiliary_loss(tmp_path: Path) -> None:
    events: list[Any] = []
    model = classifier(2)
    callback = DynMoETrainerCallback(0, 2, 2, aux_weight=0.5, on_event=events.append)
    run = trainer(tmp_path, model, callback)
    first = next(iter(run.get_train_dataloader()))
    with record_routing(model) as tape:
        own = model(**first).loss
    run.train()
    expected = own + 0.5 * aux_loss(tape)
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert [(event["step"], event["layer"]) for event in events[:3]] == [
        (1, "layers.0"),
        (1, "layers.1"),
        (3, "layers.0"),
    ]
    assert {event["tokens"] for event in events} == {8}
    assert any(event["added"] is not None or event["removed"] for event in events)
    assert not model._forward_hooks and all(each.observer is None for each in model.layers)


def test_a_training_too_short_for_an_update_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, classifier(1), DynMoETrainerCallback(1, 6, 6), max_steps=1).train()
    assert any("after 7 optimizer steps" in each for each in caplog.messages)


def test_conflicts_are_found_from_their_first_step_on(tmp_path: Path) -> None:
    loss = ConflictLoss(1.0, start=4)
    torch.manual_seed(0)
    made = MoELayer(torch.nn.Linear(DIM, DIM), DIM, TopKRouter, 4, conflict=loss)
    trainer(tmp_path, Classifier(made), MoETrainerCallback()).train()
    pairs = loss.take(torch.device("cpu"))[0]
    assert pairs == 2 * 4 * 2  # steps 4 and 5, rows, experts of each
    args = SimpleNamespace(
        fp16=True,
        gradient_accumulation_steps=1,
        world_size=1,
        average_tokens_across_devices=False,
    )
    with pytest.raises(ConfigError, match=r"fp16.*bf16"):
        MoETrainerCallback().on_train_begin(
            cast(Any, args), TrainerState(), TrainerControl(), Classifier(made)
        )


class Still(Classifier):
    """Its own loss is always 0, so that the auxiliary loss alone moves it."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        out = super().forward(x, labels)
        out.loss = 0 * out.loss
        return out


@pytest.mark.parametrize("counted", [False, True])
def test_accumulation_adds_the_auxiliary_loss_once(tmp_path: Path, counted: bool) -> None:
    """Two micro-batches take the step of one batch, in both ways in which the Trainer treats
    their losses: it takes the mean, or it adds parts of one mean (``num_items_in_batch``)."""
    found = {}
    for parts in (1, 2):
        model = classifier(1, Still)
        model.accepts_loss_kwargs = counted
        before = model.layers[0].router.directions[0].detach().clone()
        callback = DynMoETrainerCallback(0, 1, 1, aux_weight=1.0)
        options: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
        options["per_device_train_batch_size"] = 4 // parts
        trainer(tmp_path, model, callback, gradient_accumulation_steps=parts, **options).train()
        found[parts] = model.layers[0].router.directions[0].detach() - before
    assert found[1].any()
    torch.testing.assert_close(found[1], found[2])


def test_resumed_in_the_middle_of_a_window(tmp_path: Path) -> None:
    found = {}
    for name, options in (("straight", {}), ("resumed", {"save_strategy": "steps"})):
        events: list[Any] = []
        model = classifier(2)
        callback = DynMoETrainerCallback(1, 4, 4, on_event=events.append)
        if options:
            options |= {"save_steps": 3, "max_steps": 3}
            trainer(tmp_path, model, callback, **options).train()
            model = classifier(2)
            callback = DynMoETrainerCallback(1, 4, 4, on_event=events.append)
        run = trainer(tmp_path, model, callback)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if options else None)
        found[name] = (events, [p.detach() for p in model.parameters()])
    (straight, weights), (resumed, others) = found["straight"], found["resumed"]
    assert resumed == straight and [event["tokens"] for event in straight] == [16, 16]
    for got, expected in zip(others, weights, strict=True):
        torch.testing.assert_close(got, expected)


def test_state_of_a_fixed_router_is_resumed(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return Classifier(layer(SLOTS, partial(BiasedTopKRouter, bias_rate=0.1)))

    straight, first, resumed = model(), model(), model()
    trainer(tmp_path, straight, MoETrainerCallback()).train()
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trainer(tmp_path, first, MoETrainerCallback(), **options).train()
    run = trainer(tmp_path, resumed, MoETrainerCallback())
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    bias_E = straight.layers[0].router.bias_E
    assert bias_E.any() and torch.equal(bias_E, resumed.layers[0].router.bias_E)
    assert not torch.equal(bias_E, first.layers[0].router.bias_E)
    assert resumed.layers[0].observer is None


def test_a_stopped_training_leaves_nothing_behind(tmp_path: Path) -> None:
    """As after Ctrl-C in a notebook: the next training adds its own auxiliary loss alone."""

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    model = classifier(1)
    run = trainer(tmp_path, model, DynMoETrainerCallback(0, 9, 9))
    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert len(model._forward_hooks) == 1
    again = trainer(tmp_path, model, DynMoETrainerCallback(0, 9, 9, aux_weight=0.0))
    again.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert len(model._forward_hooks) == 1


def test_outputs_without_a_loss_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, classifier(1), DynMoETrainerCallback(0, 1, 1))
    run.compute_loss_func = lambda outputs, labels, **_: outputs.logits.mean()
    with pytest.raises(ConfigError, match="aux_weight=None"):
        run.train()


def test_a_window_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="length <= period"):
        DynMoETrainerCallback(0, 3, 2)


def test_unserved_tokens_get_an_expert(tmp_path: Path) -> None:
    model = classifier(1)
    lost = unserved(model.layers[0])[0]

    class Lost(Rows):
        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"x": lost, "labels": torch.tensor(0)}

    events: list[Any] = []
    callback = DynMoETrainerCallback(0.0, 0.5, 1.0, unit="epoch", on_event=events.append)
    run = trainer(tmp_path, model, callback)
    run.train_dataset = Lost()
    run.train()
    assert [(event["step"], event["added"]) for event in events] == [(2, 1)]


def test_padding_routes_nowhere(tmp_path: Path) -> None:
    """Every row has 4 tokens, the last row % 3 of which are padding."""

    class Reader(Classifier):
        def __init__(self, *layers: Any) -> None:
            super().__init__(*layers)
            self.embed = torch.nn.Embedding(10, DIM)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            logits = Net.forward(self, self.embed(input_ids)).mean(1)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    class Texts(Rows):
        def __getitem__(self, row: int) -> dict[str, Tensor]:
            mask = (torch.arange(4) < 4 - row % 3).long()
            ids = torch.arange(4) + row % 6
            return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(row % 2)}

    events: list[Any] = []
    callback = DynMoETrainerCallback(0, 1, 1, unit="epoch", on_event=events.append)
    run = trainer(tmp_path, classifier(1, Reader), callback)
    run.train_dataset = Texts()
    run.train()
    assert [event["tokens"] for event in events] == [24 * 4 - 8 * (0 + 1 + 2)]

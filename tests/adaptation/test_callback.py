"""The callback records training only, acts after the optimizer step, and resumes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynmoe.adaptation import DynMoECallback
from dynmoe.errors import ConfigError
from dynmoe.layers import MoELayer, TopAnyRouter, TopKRouter, aux_loss, record_routing

DIM, START, SLOTS = 6, 3, 5


class Model(L.LightningModule):
    """One MoE layer, fed with given tokens; logs the living slots at every forward and backward."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
        self.backbone = nn.Sequential(MoELayer(mlp, DIM, TopAnyRouter, START, SLOTS, "fresh"))
        self.checkpointing = checkpointing
        self.live_at_forward: list[tuple[int, ...]] = []
        self.live_at_backward: list[tuple[int, ...]] = []

    @property
    def layer(self) -> MoELayer:
        return self.backbone[0]

    def training_step(self, x: Tensor, _: int) -> Tensor:
        self.live_at_forward.append(self.layer.live)
        with record_routing(self.backbone) as tape:
            if self.checkpointing:
                y = torch.utils.checkpoint.checkpoint(self.backbone, x, use_reentrant=False)
            else:
                y = self.backbone(x)
        return y.square().mean() + aux_loss(tape)

    def on_after_backward(self) -> None:
        self.live_at_backward.append(self.layer.live)

    def validation_step(self, x: Tensor, _: int) -> None:
        self.backbone(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


def tokens(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, DIM, generator=torch.Generator().manual_seed(seed))


def fit(
    model: L.LightningModule,
    callback: L.Callback,
    batches: list[Tensor],
    val: list[Tensor] | None = None,
    ckpt_path: str | None = None,
    max_epochs: int = 1,
    others: Sequence[L.Callback] = (),
    **options: Any,
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *others],
        num_sanity_val_steps=0,
        max_epochs=max_epochs,
        **options,
    )
    loaders = {"val_dataloaders": DataLoader(val, batch_size=None)} if val is not None else {}
    trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path, **loaders)
    return trainer


def make_callback(events: list[dict[str, Any]] | None = None, **options: Any) -> DynMoECallback:
    schedule = {"start": 0, "length": 2, "period": 2, **options}
    return DynMoECallback(**schedule, on_event=None if events is None else events.append)


def only_expert_0(layer: MoELayer) -> Tensor:
    """Tokens that expert 0 alone serves."""
    away = sum(layer.router.directions[e].detach() for e in range(1, START))
    return (layer.router.directions[0].detach() - away).repeat(4, 1)


def nobody(layer: MoELayer) -> Tensor:
    return -sum(layer.router.directions[e].detach() for e in range(START)).repeat(4, 1)


@pytest.mark.parametrize(
    "wrong", [{"unit": "epochs"}, {"init": "foo"}, {"reset_moments": "no"}, {"length": 1.5}]
)
def test_arguments_are_checked_before_training(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected .*found"):
        make_callback(**wrong)


@pytest.mark.parametrize(("length", "warnings"), [(2, 0), (3, 1)])
def test_a_training_too_short_for_an_update_is_told(
    length: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    fit(Model(), make_callback(length=length, period=length), [tokens(4)] * 2)
    told = [each for each in caplog.messages if f"after {length} optimizer steps" in each]
    assert len(told) == warnings


def test_idle_experts_go_and_one_is_added_for_unserved_tokens() -> None:
    model, events = Model(), []
    lost = nobody(model.layer)
    batch = torch.cat([only_expert_0(model.layer), lost])
    fit(model, make_callback(events), [batch] * 2)
    (event,) = events
    assert event == {
        "step": 1,
        "layer": "0",
        "removed": [1, 2],
        "added": 1,
        "before": 3,
        "after": 2,
        "unrouted": 0.5,
        "tokens": 16,
    }
    assert model.layer.live == (0, 1)
    direction = nn.functional.normalize(lost.sum(0), dim=0)
    torch.testing.assert_close(model.layer.router.directions[1].data, direction)


def test_min_experts() -> None:
    model, events = Model(), []
    fit(model, make_callback(events, min_experts=2), [only_expert_0(model.layer)] * 2)
    assert events[0]["removed"] == [2] and model.layer.live == (0, 1)


def test_changes_happen_after_the_optimizer_step() -> None:
    """Forward and backward of a batch always see the same experts."""
    model = Model()
    fit(model, make_callback(length=1, period=1), [nobody(model.layer)] * 3)
    assert model.live_at_forward == model.live_at_backward
    assert len(set(model.live_at_forward)) > 1


def test_gradient_accumulation_moves_nothing() -> None:
    """Two micro-batches a step record what one batch does; windows count optimizer steps."""
    whole, parts = [], []
    batches = [tokens(12, seed) for seed in range(4)]
    fit(Model(), make_callback(whole), batches)
    halves = [half for batch in batches for half in batch.chunk(2)]
    fit(Model(), make_callback(parts), halves, accumulate_grad_batches=2)
    assert len(whole) == 2
    assert parts == whole


def test_activation_checkpointing_counts_once() -> None:
    plain, checkpointed = [], []
    batches = [tokens(12, seed) for seed in range(4)]
    fit(Model(), make_callback(plain), batches)
    fit(Model(checkpointing=True), make_callback(checkpointed), batches)
    assert checkpointed == plain


def test_evaluation_is_never_recorded() -> None:
    """Validation tokens that nobody serves add no expert, in the middle of a window."""
    model, events = Model(), []
    batches = [only_expert_0(model.layer)] * 2
    fit(model, make_callback(events), batches, val=[nobody(model.layer)], val_check_interval=1)
    assert events[0]["tokens"] == 8 and events[0]["added"] is None


def moments(trainer: L.Trainer, layer: MoELayer, slot: int) -> list[dict[str, Any]]:
    (optimizer,) = trainer.optimizers
    return [optimizer.state[p] for p in layer.slot_parameters(slot) if p in optimizer.state]


@pytest.mark.parametrize("reset", [True, False])
def test_optimizer_moments_of_a_new_expert(reset: bool) -> None:
    """A slot that was trained, emptied and filled again starts without the old moments."""
    model = Model()
    for slot in (3, 4):  # a full pool, so that the slot just emptied must be reused
        model.layer.add_expert(slot, model.layer.router.directions[0].data)
    lost = torch.cat([only_expert_0(model.layer), nobody(model.layer)])
    callback = make_callback(start=1, length=1, period=10, reset_moments=reset)
    trainer = fit(model, callback, [tokens(40), lost])
    assert model.layer.live == (0, 1, 3, 4)
    assert moments(trainer, model.layer, 0)
    assert bool(moments(trainer, model.layer, 1)) == (not reset)


def test_resuming_in_the_middle_of_a_window(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A window of three epochs, the run stopped after the first."""
    batches = [tokens(12, seed) for seed in range(2)]
    straight, events = Model(), []
    fit(straight, make_callback(events, length=6, period=6), batches, max_epochs=3)

    trainer = fit(Model(), make_callback(length=6, period=6), batches, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, later = Model(), []
    fit(
        resumed,
        make_callback(later, length=6, period=6),
        batches,
        ckpt_path=str(tmp_path / "last.ckpt"),
        max_epochs=3,
    )
    assert later == events and len(events) == 1 and events[0]["tokens"] == 72
    for got, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_state_from_before_training_starts_anew() -> None:
    events: list[dict[str, Any]] = []
    callback, model = make_callback(events, length=2, period=2), Model()
    callback.load_state_dict(callback.state_dict())
    fit(model, callback, [tokens(8)] * 2)
    assert [event["step"] for event in events] == [1]


def test_tokens_that_cancel_add_nobody() -> None:
    """R_S = 0 points nowhere: an expert for it would never fire."""
    model, events = Model(), []
    fit(model, make_callback(events), [torch.zeros(4, DIM)] * 2)
    assert events[0]["unrouted"] == 1.0 and events[0]["added"] is None


def test_epoch_schedule_counts_the_loader() -> None:
    events: list[dict[str, Any]] = []
    callback = make_callback(events, start=0.5, length=0.25, period=1, unit="epoch")
    fit(Model(), callback, [tokens(12, seed) for seed in range(8)])
    assert [event["step"] for event in events] == [5] and events[0]["tokens"] == 24


# Any LightningModule.


class Own(L.LightningModule):
    """Models under names of the user's, and a ``training_step`` that returns the loss alone."""

    def __init__(self, router: Any = TopAnyRouter, **models: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("net", *models):
            mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
            layer = MoELayer(mlp, DIM, router, START, SLOTS if router is TopAnyRouter else START)
            setattr(self, name, nn.Sequential(nn.Identity(), layer))
        self.names = ("net", *models)

    def training_step(self, x: Tensor, _: int) -> Tensor:
        return sum((getattr(self, name)(x).square().mean() for name in self.names), x.sum() * 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Checkpointed(Own):
    def training_step(self, x: Tensor, _: int) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)
        return y.square().mean()


@pytest.mark.parametrize(
    ("model", "part", "names"),
    [
        (Own(), None, ["1"]),
        (Checkpointed(), None, ["1"]),
        (Own(), "net", ["1"]),
        (Own(other=nn.Identity()), None, ["net.1", "other.1"]),
        (Own(other=nn.Identity()), "other", ["1"]),
    ],
)
def test_a_training_step_that_returns_the_loss(
    model: Own, part: str | None, names: list[str]
) -> None:
    events: list[dict[str, Any]] = []
    fit(model, make_callback(events, model=part), [tokens(12, seed) for seed in range(2)])
    assert [event["layer"] for event in events] == names
    assert {event["tokens"] for event in events} == {24}


def test_one_callback_for_each_of_two_models() -> None:
    events: list[dict[str, Any]] = []
    model = Own(other=nn.Identity())
    second = make_callback(events, model="other", length=1, period=1)
    batches = [tokens(12, seed) for seed in range(2)]
    fit(model, make_callback(events, model="net"), batches, others=[second])
    assert sorted((event["step"], event["tokens"]) for event in events) == [
        (0, 12),
        (1, 12),
        (1, 24),
    ]


def test_the_auxiliary_loss_is_missed_once(caplog: pytest.LogCaptureFixture) -> None:
    fit(Own(), make_callback(), [tokens(12, seed) for seed in range(3)])
    assert caplog.text.count("aux_loss(tape)") == 1
    caplog.clear()
    fit(Model(), make_callback(), [tokens(12, seed) for seed in range(3)])
    assert "aux_loss" not in caplog.text


class Plain(Own):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(DIM, DIM)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("model", "part", "message"),
    [
        (Plain(), None, "no MoE layer in Plain"),
        (Own(TopKRouter), None, "TopKRouter: use an adaptive one"),
        (Own(), "nett", "model='nett'.*layers are in net"),
    ],
)
def test_modules_that_cannot_be_adapted(model: Own, part: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(model, make_callback(model=part), [tokens(12)])


def test_a_micro_batch_whose_loss_is_not_finite_spoils_its_step() -> None:
    events: list[dict[str, Any]] = []

    class Guarded(Own):
        def training_step(self, x: Tensor, index: int) -> Tensor:
            loss = super().training_step(x, index)
            return loss * (float("nan") if index == 1 else 1.0)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0)

    batches = [tokens(12, seed) for seed in range(4)]
    fit(Guarded(), make_callback(events), batches, accumulate_grad_batches=2)
    assert [event["tokens"] for event in events] == [24]


def test_it_serves_one_training_after_another() -> None:
    callback = make_callback(events := [])
    for _ in range(2):
        model = Own()
        fit(model, callback, [tokens(12, seed) for seed in range(2)])
        assert model.net[1].observer is None
    assert [event["step"] for event in events] == [1, 1]


def test_a_training_that_fails_leaves_no_observer() -> None:
    class Failing(Own):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert self.net[1].observer is not None
            raise ZeroDivisionError

    model = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(model, make_callback(), [tokens(12)])
    assert model.net[1].observer is None


# Averages of the weights.


class Watch(L.Callback):
    """Keeps the weights at the end of every step, after experts have changed."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.states.append({name: v.clone() for name, v in pl_module.state_dict().items()})


OLD = "backbone.0.experts.slots.0.0.weight"  # of an expert that stays
NEW = "backbone.0.experts.slots.1.0.weight"  # of one that comes at the end of step 1


def averaged(*callbacks: L.Callback | None, max_epochs: int = 1) -> Any:
    """Four steps, after the second of which expert 1 gives way to a new one. Returns the average of
    both experts, and their weights at the end of each step."""
    model, watch = Model(), Watch()
    batch = torch.cat([only_expert_0(model.layer), nobody(model.layer)]).detach()
    first, *others = (make_callback(period=10) if c is None else c for c in callbacks)
    fit(model, first, [batch] * (4 // max_epochs), max_epochs=max_epochs, others=[*others, watch])
    assert model.layer.live == (0, 1)
    assert watch.states[1][NEW].ne(watch.states[3][NEW]).any()
    now = model.state_dict()  # Lightning's callbacks leave the average in the model
    return [(now[name], [state[name] for state in watch.states]) for name in (OLD, NEW)]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_moving_averages(ours_first: bool, use_buffers: bool) -> None:
    """A new expert's average starts at its weights."""
    ema = EMAWeightAveraging(decay=0.5, use_buffers=use_buffers)
    old, new = averaged(*((None, ema) if ours_first else (ema, None)))
    average, (zero, one, two, three) = old
    torch.testing.assert_close(average, zero / 8 + one / 8 + two / 4 + three / 2)
    average, (_, one, two, three) = new
    torch.testing.assert_close(average, one / 4 + two / 4 + three / 2)


def test_mean_of_the_weights() -> None:
    old, new = averaged(None, WeightAveraging(use_buffers=False))
    average, states = old
    torch.testing.assert_close(average, sum(states) / 4)
    average, (_, one, two, three) = new
    torch.testing.assert_close(average, (2 * one + two + three) / 4)


def test_mean_of_the_buffers_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_buffers=False"):
        averaged(None, WeightAveraging())


def test_stochastic_weight_averaging() -> None:
    """It averages at the starts of epochs 1, 2 and 3: it counts them from 1."""
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
    old, new = averaged(None, swa, max_epochs=4)
    average, (zero, one, two, _) = old
    torch.testing.assert_close(average, (zero + one + two) / 3)
    average, (_, one, two, _) = new
    torch.testing.assert_close(average, (2 * one + two) / 3)


def test_a_moving_average_resumes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    batches = [tokens(12, seed) for seed in range(3)]
    straight = Model()
    fit(straight, make_callback(), batches, max_epochs=2, others=[ema()])

    trainer = fit(Model(), make_callback(), batches, others=[Saved(tmp_path), ema()])
    resumed = Model()
    path = str(tmp_path / "last.ckpt")
    fit(resumed, make_callback(), batches, ckpt_path=path, max_epochs=2, others=[ema()])
    assert trainer.global_step == 3 and resumed.layer.live == straight.layer.live
    for got, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.5)


class Saved(L.Callback):
    """Saves before the average replaces the weights at the end of training."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")

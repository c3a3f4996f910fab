"""MASS's growth in Lightning: gradients as the optimizer gets them, exact resume, no trace."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from test_callback import fit, tokens
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException
from torch.utils.data import DataLoader

from dynmoe.adaptation import MassCallback, growth
from dynmoe.errors import ConfigError
from dynmoe.layers import MoELayer, PrefixRouter, TopKRouter, aux_loss, record_routing

DIM, START, SLOTS = 6, 2, 6
# Any upward drift counts, in any direction, so that experts are split within a few steps.
EAGER = {"until": 100, "warmup": 2, "window": 3, "unit": "step", "p_value": 0.5, "cosine": 1.0}


class Model(L.LightningModule):
    """One MoE layer whose loss grows from step to step, with dropout, a count and batch norm."""

    def __init__(self, router: Any = PrefixRouter) -> None:
        super().__init__()
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, DIM))
        self.norm = nn.BatchNorm1d(DIM)
        self.net = MoELayer(mlp, DIM, router, START, SLOTS, "fresh")
        self.calls = 0
        self.modes: list[bool] = []

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        self.modes.append(self.training)
        with record_routing(self) as tape:
            y = self.net(self.norm(x))
        self.log("calls", float(self.calls), on_step=False, on_epoch=True, reduce_fx="sum")
        return (1 + self.global_step) * y.square().mean() + aux_loss(tape)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * self.global_step + batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


BATCHES = [tokens(16, seed) for seed in range(6)]


def grow(events: list[dict[str, Any]] | None = None, **options: Any) -> MassCallback:
    settings = {**EAGER, **options}
    return MassCallback(**settings, on_event=None if events is None else events.append)


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_experts_grow_in_a_training() -> None:
    model, events = Model(), []
    trainer = fit(model, grow(events), BATCHES)
    assert len(events) > 1 and len(model.net.live) > START
    assert events[0]["step"] == 2 and events[0]["source"] in range(START)
    before = START
    for event in events:
        assert event["before"] == before and event["layer"] == "net"
        before = event["after"]
    (optimizer,) = trainer.optimizers
    new = model.net.experts.slots[events[0]["added"]][0].weight
    assert optimizer.state[new]["step"] == len(BATCHES) - events[0]["step"]


def test_the_gradient_is_that_of_the_whole_step() -> None:
    """Of two micro-batches, and before it is clipped."""
    norms = []
    for batches, options in (
        ([torch.cat(BATCHES[:2])], {}),
        (BATCHES[:2], {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-9}),
    ):
        model, callback = Model(), grow()
        model.norm, model.net.experts = nn.Identity(), model.net.experts.eval()
        model.net.experts.train = lambda _=True: None  # type: ignore[method-assign]
        fit(model, callback, batches, **options)
        experts = callback.state_dict()["layers"]["net"]["experts"]
        norms.append([experts[slot]["norms"].tolist() for slot in range(START)])
    assert norms[0][0][0] > 1e-7
    for one, other in zip(*norms, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_scales_no_norm(fused: bool) -> None:
    """A fused optimizer unscales gradients in its step, another one before.

    A step that overflows is skipped, and counts nowhere.
    """

    class Fused(Model):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=fused)

    norms = []
    for plugins in (None, scaled(2.0**10), scaled(2.0**120)):
        callback = grow()
        fit(Fused(), callback, BATCHES[:1], plugins=plugins)
        experts = callback.state_dict()["layers"]["net"]["experts"]
        norms.append([kept["norms"].item() for kept in experts.values()])
    assert norms[0] == pytest.approx(norms[1], rel=0.5) and min(norms[0]) > 0
    assert norms[2] == []


def scaled(scale: float) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("check", ["eval", "train"])
def test_the_check_leaves_no_trace(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every copy stays, the training is the one without a check, dropout included."""
    plain, checked = Model(), Model()
    fit(plain, grow(check="none"), BATCHES)
    asked: list[float] = []
    gain = growth._gain

    def stays(*arguments: Any) -> float:
        asked.append(gain(*arguments))
        return 1.0

    monkeypatch.setattr(growth, "_gain", stays)
    trainer = fit(checked, grow(check=check, check_from=2), BATCHES)
    assert asked and all(math.isfinite(each) for each in asked)
    assert equal(plain, checked)
    assert checked.calls == len(BATCHES) and all(checked.modes)
    assert trainer.callback_metrics["calls"] == sum(range(len(BATCHES) + 1))


@pytest.mark.parametrize("check", ["eval", "train"])
def test_the_check_computes_the_loss_of_the_step(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation and training mode it is that of the model itself, both micro-batches."""
    found = []

    def kept(layer: MoELayer, slot: int, loss: Any) -> float:
        model = loss.module
        (one, i), (two, j) = loss.batches
        with torch.no_grad():
            state = torch.get_rng_state()
            model.train(check == "train")
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            expected = model.training_step(one, i) + model.training_step(two, j)
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
            model.train()
            torch.set_rng_state(state)
        found.append((loss().item(), expected.item()))
        return 1.0

    monkeypatch.setattr(growth, "_gain", kept)
    callback = grow(check=check, check_from=2)
    fit(Model(), callback, BATCHES * 2, accumulate_grad_batches=2)
    assert found and all(one == pytest.approx(two, rel=1e-6) for one, two in found)


def test_useless_copies_go() -> None:
    """The loss grows with every expert: without the newest it is smaller."""

    class Costly(Model):
        def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(x, batch_idx) + float(len(self.net.live))

    model, events = Costly(), []
    fit(model, grow(events, check_from=2, patience=1), BATCHES * 3)
    assert [event["added"] is None for event in events] == [False, False, True]
    assert [event["patience"] for event in events] == [1, 0, 0]
    assert events[1]["removed"] and events[2]["removed"] and len(model.net.live) == START
    assert all(event["gain"] < 0 for event in events[1:])


def test_resuming_in_the_middle_of_a_window(tmp_path: Path) -> None:
    options = {"check_from": 2, "window": 4}
    straight, events = Model(), []
    fit(straight, grow(events, **options), BATCHES, max_epochs=3)
    killed: list[dict[str, Any]] = []
    trainer = fit(Model(), grow(killed, **options), BATCHES, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, later = Model(), []
    path = str(tmp_path / "last.ckpt")
    fit(resumed, grow(later, **options), BATCHES, ckpt_path=path, max_epochs=3)
    assert killed and later and [*killed, *later] == events
    assert equal(straight, resumed)


def test_averages_of_weights_have_the_experts() -> None:
    average = EMAWeightAveraging(decay=0.9, use_buffers=False)
    model = Model()
    fit(model, grow(), BATCHES, others=[average])
    # At the end Lightning puts the average into the model, whose experts are those of training.
    assert len(model.net.live) > START


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": "epoch"}, "unit: expected 'share' or 'step'"),
        ({"window": 2.5}, "expected whole steps"),
        ({"check": "yes"}, "check: expected 'eval' or 'train' or 'none'"),
        ({"split": "full"}, "split: expected"),
    ],
)
def test_arguments_are_checked_before_training(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"moe.adaptation: {words}"):
        grow(**options)


def test_a_fixed_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="use an adaptive one"):
        fit(Model(TopKRouter), grow(), BATCHES)


def test_trainings_in_which_nothing_can_happen_say_so(caplog: pytest.LogCaptureFixture) -> None:
    fit(Model(), MassCallback(), BATCHES)
    assert "No expert is ever split" in caplog.text and "window 60" in caplog.text
    caplog.clear()
    model = Model(partial(PrefixRouter, top_p=0.5))
    model.net.active_E.fill_(True)
    fit(model, grow(), BATCHES)
    assert "there is no free slot" in caplog.text


class SaveEachRank(L.Callback):
    def __init__(self, folder: Path, callback: MassCallback, events: list[Any]) -> None:
        self.folder, self.callback, self.events = folder, callback, events

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = {
            "model": pl_module.state_dict(),
            "growth": self.callback.state_dict(),
            "events": self.events,
        }
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


class OwnTokens(Model):
    """Without statistics of its own on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            [tokens(16, 10 * self.global_rank + seed) for seed in range(8)], batch_size=None
        )


def fit_two(folder: Path) -> list[Any]:
    events: list[dict[str, Any]] = []
    callback = grow(events, check_from=2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="spawn", find_unused_parameters=True),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback, SaveEachRank(folder, callback, events)],
    )
    trainer.fit(OwnTokens())
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.slow
def test_two_processes_stay_identical(tmp_path: Path) -> None:
    try:
        one, two = fit_two(tmp_path)
    except ProcessExitedException:  # gloo's threads, now and then
        one, two = fit_two(tmp_path)
    assert len(one["events"]) > 1 and not two["events"]  # written once
    assert any(event["gain"] is not None for event in one["events"])
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    first, second = (state["growth"]["layers"]["net"] for state in (one, two))
    assert first["pairs"] == second["pairs"] and first["patience"] == second["patience"]
    for slot, kept in first["experts"].items():
        assert torch.equal(kept["norms"], second["experts"][slot]["norms"])
        assert torch.equal(kept["scores"], second["experts"][slot]["scores"])

"""Two data-parallel processes decide on the sum of their records and stay identical."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from processes import in_processes, join_group
from test_adapt import Net, adapted, layer, tokens
from test_callback import DIM, Model, make_callback, nobody, only_expert_0
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException
from torch.utils.data import DataLoader

from dynmoe.adaptation import Adaptation, Schedule
from dynmoe.layers import aux_loss, mask_padding, moe_layers, record_routing


class OwnTokens(Model):
    """Rank 0 sees tokens of expert 0 only, rank 1 tokens that nobody serves, then both of both."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        mine = only_expert_0(self.layer) if self.global_rank == 0 else nobody(self.layer)
        both = torch.cat([only_expert_0(self.layer), nobody(self.layer)])
        return DataLoader([mine.detach()] * 2 + [both.detach()] * 4, batch_size=None)


class SaveEachRank(L.Callback):
    def __init__(self, folder: Path, events: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.events = events

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = {"model": pl_module.state_dict(), "events": self.events}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")
        trainer.save_checkpoint(self.folder / "last.ckpt")


def fit_two(folder: Path, max_epochs: int, window: int, ckpt_path: Path | None = None) -> list[Any]:
    """Train on two CPU processes; the state and events of each."""
    try:
        return _fit_two(folder, max_epochs, window, ckpt_path)
    except ProcessExitedException:  # see `in_processes`
        return _fit_two(folder, max_epochs, window, ckpt_path)


def _fit_two(folder: Path, max_epochs: int, window: int, ckpt_path: Path | None) -> list[Any]:
    events: list[dict[str, Any]] = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="spawn", find_unused_parameters=True),
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            make_callback(events, length=window, period=window),
            SaveEachRank(folder, events),
        ],
    )
    trainer.fit(OwnTokens(), ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.slow
def test_two_processes_stay_identical(tmp_path: Path) -> None:
    ranks = fit_two(tmp_path, max_epochs=1, window=2)
    first = ranks[0]["events"][0]
    # Neither rank could decide this alone: the expert's tokens are on rank 0, the lost on rank 1.
    assert (first["removed"], first["added"], first["tokens"]) == ([1, 2], 1, 16)
    assert len(ranks[0]["events"]) == 3 and not ranks[1]["events"]  # written once
    for name, value in ranks[0]["model"].items():
        assert torch.equal(value, ranks[1]["model"][name]), name
    assert ranks[0]["model"]["backbone.0.router.directions.1"].numel() == DIM


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_a_window(tmp_path: Path) -> None:
    """The checkpoint holds what both ranks have recorded, not twice what rank 0 has."""
    (straight, _) = fit_two(tmp_path, max_epochs=2, window=12)
    fit_two(tmp_path, max_epochs=1, window=12)
    (resumed, _) = fit_two(tmp_path, max_epochs=2, window=12, ckpt_path=tmp_path / "last.ckpt")
    assert resumed["events"] == straight["events"] and len(straight["events"]) == 1


def plain_loop(rank: int, ranks: int, port: int, folder: str) -> None:
    """Three steps in a plain loop; the loss of rank 0 is not finite in the second."""
    join_group(rank, ranks, port)
    torch.manual_seed(0)
    net = Net()
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    adaptation = Adaptation(model, optimizer, Schedule(0, 3, 3))
    events = []
    for step in range(3):
        with record_routing(model) as tape:
            loss = model(tokens(10 * rank + step, 12 + rank)).square().mean()
        (loss + aux_loss(tape)).backward()
        optimizer.step()
        optimizer.zero_grad()
        bad = step == 1 and rank == 0
        if step == 2:
            torch.save(adaptation.state_dict(), f"{folder}/middle{rank}.pt")
        events += adaptation.step(loss * float("nan") if bad else loss)
    torch.save((events, model.module.state_dict()), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_plain_loop_on_two_processes(tmp_path: Path) -> None:
    in_processes(plain_loop, str(tmp_path))
    (one, weights), (two, others) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert one == two and [event["tokens"] for event in one] == [50, 50]  # of steps 0 and 2
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    first, second = (torch.load(tmp_path / f"middle{r}.pt") for r in (0, 1))
    assert first["steps"] == second["steps"] == 2
    for name, window in first["window"].items():
        assert window["k_hist"].sum() == 25  # of both, on either
        assert all(torch.equal(v, second["window"][name][key]) for key, v in window.items())


# Losses that are added outside of the forward, where a rank's output depends on no router.


def on_its_own(rank: int) -> Tensor:
    """The first rank has no token."""
    return tokens(rank, 0 if rank == 0 else 7)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    with record_routing(model) as tape:
        loss = model(x).square().sum()
    return loss + 0.1 * aux_loss(tape)


def backward(rank: int, ranks: int, port: int, folder: str) -> None:
    join_group(rank, ranks, port)
    model = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True)
    for _ in range(2):  # a parameter that was marked twice is told in the next pass at the latest
        model.zero_grad()
        loss_of(model, on_its_own(rank)).backward()
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_rank_without_tokens_adds_its_loss(tmp_path: Path) -> None:
    in_processes(backward, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    net = Net()
    (sum(loss_of(net, on_its_own(rank)) for rank in (0, 1)) / 2).backward()  # type: ignore[union-attr]
    for name, p in net.named_parameters():
        assert (first[name] is None) == (second[name] is None)
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        for found in (first[name], second[name]):
            found = torch.zeros_like(p) if found is None else found
            torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", ["usual", "no token", "padding", "nobody chosen"])
def test_a_loss_outside_of_the_forward(case: str) -> None:
    net = Net()
    if case == "nobody chosen":
        with torch.no_grad():
            for each in moe_layers(net).values():
                for threshold in each.router.thresholds:
                    threshold.fill_(20)
    mask = torch.zeros(12, dtype=torch.bool) if case == "padding" else None
    x = tokens(0, 0 if case == "no token" else 12)
    twin = copy.deepcopy(net)
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        with mask_padding(net, mask), mask_padding(twin, mask):
            losses = loss_of(model, x), loss_of(twin, x)
        for loss in losses:
            loss.backward()
    for p, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None or other.grad is None or not other.grad.any()
        if p.grad is not None and other.grad is not None:
            torch.testing.assert_close(p.grad, other.grad)


@pytest.mark.usefixtures("alone")
def test_outputs_may_be_changed_in_place() -> None:
    moe, x = layer(), tokens(0)
    twin = copy.deepcopy(moe)
    with record_routing(moe):
        y = moe(x)
    y += x
    y.square().sum().backward()
    (twin(x) + x).square().sum().backward()
    for p, other in zip(moe.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None)
        if p.grad is not None and other.grad is not None:
            torch.testing.assert_close(p.grad, other.grad)


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_left_out_has_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    adaptation = adapted(net, schedule=Schedule(0, 1, 1))
    with record_routing(net):
        loss = net(tokens(0, 0)).sum()
    loss.backward()
    assert all(p.grad is None for each in net.layers for p in each.router.parameters())
    adaptation.optimizers[0].step()
    adaptation.step(loss)
    assert "loss + 0.01 * aux_loss(tape)" in caplog.text

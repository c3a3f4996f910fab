"""Under FSDP2 two processes train, adapt and resume as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from processes import as_rank, in_processes
from test_fsdp import DIM, Net
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from dynmoe.adaptation import Adaptation, DynMoECallback, MoEFSDP2Strategy, Schedule
from dynmoe.adaptation.adapt import whole
from dynmoe.adaptation.fsdp2 import Shards, SplitGroups, clip_by_norm, gathered, scattered
from dynmoe.errors import ConfigError
from dynmoe.layers import aux_loss, record_routing

STEPS = 50


class Model(L.LightningModule):
    """Keeps the loss and the gradients of every step. Batches are shared by the processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Net()
        self.losses: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.used: list[list[bool]] = []

    def training_step(self, x: Tensor, _: int) -> Tensor:
        with record_routing(self.backbone) as tape:
            loss = self.backbone(x).square().mean() + 0.01 * aux_loss(tape)
        self.losses.append(loss.detach())
        self.used.append((tape["blocks.0.ffn"][0].stats.load_E[:3] > 0).tolist())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        found = {name: p.grad for name, p in self.named_parameters()}
        self.gradients.append(
            {
                name: grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
                for name, grad in found.items()
                if grad is not None
            }
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=True)

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(5)
        batches = [torch.randn(4, DIM, generator=generator) for _ in range(STEPS // 2)]
        own = [each.chunk(self.trainer.world_size)[self.global_rank] for each in batches]
        return DataLoader(own, batch_size=None)  # type: ignore[arg-type]


def fit(
    folder: Path,
    name: str,
    strategy: str | Strategy,
    devices: int = 1,
    epochs: int = 2,
    start: str | None = None,
) -> None:
    events: list[dict[str, Any]] = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=0.5,
        callbacks=[DynMoECallback(start=0, length=5, period=5, on_event=events.append)],
    )
    model = Model()
    trainer.fit(model, ckpt_path=start and folder / f"{start}.ckpt", weights_only=True)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    record = {"losses": torch.stack(model.losses), "used": torch.tensor(model.used)}
    record |= {"gradients": model.gradients, "events": events}
    torch.save(record, folder / f"{name}.{trainer.global_rank}")


def work(rank: int, ranks: int, port: int, folder: Path) -> None:
    """All trainings of one process; they share a process group."""
    as_rank(rank, ranks, port)
    fit(folder, "two", MoEFSDP2Strategy(), ranks)
    fit(folder, "half", MoEFSDP2Strategy(reshard_after_forward=False), ranks, epochs=1)
    fit(folder, "resumed", MoEFSDP2Strategy(), ranks, start="half")
    distributed.destroy_process_group()


def compare_states(file: Path, expected: Path) -> None:
    """Weights and the optimizer's state of two checkpoints."""
    (found, one) = (torch.load(each, weights_only=True) for each in (file, expected))
    assert list(found["state_dict"]) == list(one["state_dict"])
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], value, atol=1e-5, rtol=1e-4)
    (state,), (other,) = found["optimizer_states"], one["optimizer_states"]
    assert state["param_groups"] == other["param_groups"]
    assert sorted(state["state"]) == sorted(other["state"])
    for key, moments in other["state"].items():
        for word, value in moments.items():
            torch.testing.assert_close(state["state"][key][word], value, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    in_processes(work, tmp_path)
    fit(tmp_path, "one", "auto")
    one, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert sum(event["added"] is not None for event in one["events"]) >= 2
    assert any(event["removed"] for event in one["events"])
    assert first["events"] == one["events"]
    losses = (first["losses"] + second["losses"]) / 2
    torch.testing.assert_close(losses, one["losses"], atol=1e-5, rtol=0)
    # Experts that one rank alone has used, and living ones that neither has.
    assert (first["used"] != second["used"]).any()
    assert not (first["used"] | second["used"]).all()
    for found, expected in zip(first["gradients"], one["gradients"], strict=True):
        assert list(found) == list(expected)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)

    resumed = torch.load(tmp_path / "resumed.0")
    assert resumed["events"] == one["events"][len(one["events"]) // 2 :]
    for name in ("two", "resumed"):
        compare_states(tmp_path / f"{name}.ckpt", tmp_path / "one.ckpt")
    # One process goes on from what two have saved.
    fit(tmp_path, "alone", "auto", start="half")
    alone = torch.load(tmp_path / "alone.0")
    torch.testing.assert_close(alone["losses"], one["losses"][STEPS // 2 :], atol=1e-5, rtol=0)


# On one process.


@pytest.fixture
def mesh(alone: None) -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def sharded(mesh: DeviceMesh) -> tuple[Net, Shards]:
    torch.manual_seed(0)
    net = Net()
    return net, Shards(net, mesh, reshard_after_forward=True)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)


def test_a_new_expert_is_written_into_shares(mesh: DeviceMesh) -> None:
    net, _ = sharded(mesh)
    layer = net.blocks[0].ffn
    expert: Any = layer.experts.slots[4]
    share = expert[0].weight
    with whole(layer, net):
        assert type(expert[0].weight) is nn.Parameter
        layer.add_expert(4, torch.ones(DIM), "copy_most_used", {0: 1, 1: 9, 2: 3})
    assert expert[0].weight is share and isinstance(share, DTensor)
    assert torch.equal(share.full_tensor(), layer.experts.slots[1][0].weight.full_tensor())
    net(torch.randn(6, DIM)).sum().backward()  # and still trains


def test_an_expert_without_tokens_has_no_gradient(mesh: DeviceMesh) -> None:
    """It gets one of zeros, which other ranks' are added to; at the end it is taken away."""
    net, shards = sharded(mesh)
    layer = net.blocks[0].ffn
    with record_routing(net) as tape:
        net(torch.randn(1, DIM)).square().sum().backward()
    (used,) = [call.stats.load_E > 0 for call in tape["blocks.0.ffn"]]
    assert used.any() and not used.all()
    before = [p.grad is not None for p in layer.experts.parameters()]
    assert all(before)
    shards.settle_gradients()
    for slot, expert in enumerate(layer.experts.slots):
        has = [p.grad is not None for p in expert.parameters()]
        assert set(has) == {slot < 3 and bool(used[slot])}
    shards.end_step()
    with torch.no_grad():
        net(torch.randn(50, DIM))  # an evaluation uses nobody
    shards.settle_gradients()
    assert all(p.grad is None for p in layer.experts.parameters())


def test_state_of_the_optimizer_is_that_of_one_device(mesh: DeviceMesh) -> None:
    net, shards = sharded(mesh)
    optimizer = optimizer_of(net)
    SplitGroups(optimizer)
    groups = optimizer.param_groups
    net(torch.randn(20, DIM)).square().sum().backward()
    shards.settle_gradients()
    optimizer.step()
    assert optimizer.param_groups is groups and len(groups) == 1
    sizes = [p.shape for p in groups[0]["params"]]
    for key, state in optimizer.state_dict()["state"].items():
        saved = gathered(state)
        assert saved["exp_avg"].shape == sizes[key]
        assert not any(isinstance(each, DTensor) for each in saved.values())
        again = scattered(saved, groups[0]["params"][key])
        for word, value in state.items():
            assert type(again[word]) is type(value) and torch.equal(again[word], value)


def test_clipping_takes_the_norm_of_all(mesh: DeviceMesh) -> None:
    net, _ = sharded(mesh)
    plain = Net()
    with torch.no_grad():
        for p, other in zip(plain.parameters(), net.parameters(), strict=True):
            p.copy_(other.full_tensor() if isinstance(other, DTensor) else other)
    x = torch.randn(20, DIM)
    net(x).square().sum().backward()
    plain(x).square().sum().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    clip_by_norm(optimizer_of(net), 0.1)
    for p, other in zip(plain.parameters(), net.parameters(), strict=True):
        if p.grad is not None:
            grad = other.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            torch.testing.assert_close(grad, p.grad)


def test_fully_shard_alone_is_refused(mesh: DeviceMesh) -> None:
    net, _ = sharded(mesh)
    optimizer = optimizer_of(net)
    Adaptation(net, optimizer, Schedule(0, 1, 1)).close()
    net.blocks[0].ffn.experts.sharded = False
    with pytest.raises(ConfigError, match="MoEFSDP2Strategy"):
        Adaptation(net, optimizer, Schedule(0, 1, 1))


def test_without_rows_a_frozen_input_has_a_backward_pass_too() -> None:
    """Or one rank would gather the block for it, and the other would not."""
    net = Net()
    layer = net.blocks[0].ffn
    for x in (torch.randn(3, DIM), torch.randn(0, DIM)):
        assert layer(x).requires_grad
        with torch.no_grad():
            assert not layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(torch.randn(0, DIM)).requires_grad

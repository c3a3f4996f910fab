"""Under FSDP experts are sharded, and yet training and adaptation do what DDP's do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from processes import as_rank, in_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynmoe.adaptation import DynMoECallback
from dynmoe.adaptation.adapt import whole
from dynmoe.adaptation.fsdp import MoEFSDPStrategy, blocks, full_state
from dynmoe.data.text.batches import EvalBatches
from dynmoe.layers import BudgetTopAnyRouter, MoELayer, TopAnyRouter, aux_loss, record_routing

DIM, STEPS = 6, 6


class Block(nn.Module):
    """Frozen and trained parameters in one unit, as in MoE-LLaVA's third stage."""

    def __init__(self, router: Any = TopAnyRouter) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
        self.norm = nn.LayerNorm(DIM).requires_grad_(False)
        self.ffn = MoELayer(mlp, DIM, router, 3, 5, "fresh")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.ffn(self.norm(x))
        return out


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        # The second one has state that moves after the step.
        budget = partial(BudgetTopAnyRouter, target_k=0.8, unserved="nothing", missing="after")
        self.blocks = nn.ModuleList([Block(), Block(budget)])
        self.out = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(x)
        return out


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Net()

    def training_step(self, x: Tensor, _: int) -> Tensor:
        with record_routing(self.backbone) as tape:
            loss = self.backbone(x).square().mean()
        return loss + 0.01 * aux_loss(tape)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)

    def train_dataloader(self) -> DataLoader[Tensor]:
        own = torch.Generator().manual_seed(self.global_rank)
        batches = [torch.randn(20, DIM, generator=own) for _ in range(STEPS)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(folder: Path, name: str, strategy: Any, epochs: int, start: Path | None = None) -> None:
    events: list[dict[str, Any]] = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
        callbacks=[DynMoECallback(start=0, length=1, period=1, on_event=events.append)],
    )
    trainer.fit(Model(), ckpt_path=start, weights_only=True)
    # PyTorch gathers AdamW's two moments in one buffer, and copies them only where it is on a GPU.
    with mock.patch.object(torch.Tensor, "cpu", torch.Tensor.clone):
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    if trainer.is_global_zero:
        torch.save(events, folder / f"{name}.events")


def work(rank: int, ranks: int, port: int, folder: Path) -> None:
    """All trainings of one process; they share a process group."""
    as_rank(rank, ranks, port)
    fit(folder, "ddp", DDPStrategy(find_unused_parameters=True), epochs=2)
    fit(folder, "fsdp", MoEFSDPStrategy(), epochs=2)
    fit(folder, "half", MoEFSDPStrategy(), epochs=1)
    fit(folder, "resumed", MoEFSDPStrategy(), epochs=2, start=folder / "half.ckpt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_it_trains_and_adapts_as_ddp_does_and_resumes(tmp_path: Path) -> None:
    in_processes(work, tmp_path)
    events = {name: torch.load(tmp_path / f"{name}.events") for name in ("ddp", "fsdp", "resumed")}
    assert sum(event["added"] is not None for event in events["fsdp"]) >= 2
    assert {event["layer"] for event in events["fsdp"]} == {"blocks.0.ffn", "blocks.1.ffn"}
    assert events["fsdp"] == events["ddp"]
    assert events["resumed"] == events["fsdp"][len(events["fsdp"]) // 2 :]
    states = {
        name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("ddp", "fsdp", "resumed")
    }
    assert list(states["fsdp"]) == list(states["ddp"])
    assert states["ddp"]["backbone.blocks.1.ffn.router.shift"] != 0
    for name, value in states["ddp"].items():
        for other in ("fsdp", "resumed"):
            torch.testing.assert_close(states[other][name], value, atol=1e-6, rtol=1e-5)


def test_units_are_the_blocks_that_are_named() -> None:
    assert blocks(nn.Sequential(Net(), nn.Linear(2, 2))) == {Block}


def test_without_fsdp_a_layer_is_whole() -> None:
    net = Net()
    layer = net.blocks[0].ffn
    with whole(layer, net):
        layer.add_expert(3, torch.ones(DIM))
    assert layer.live == (0, 1, 2, 3)


def test_state_of_parameters_that_never_moved() -> None:
    """AdamW with it takes the step that it takes without."""
    moved, still = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([moved, still])
    moved.sum().backward()
    optimizer.step()
    with full_state(optimizer):
        state = optimizer.state[still]
        assert set(state) == set(optimizer.state[moved]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 0 and not state["exp_avg"].any()
    assert still not in optimizer.state


@pytest.mark.parametrize(("examples", "batches"), [(13, [4, 3]), (11, [4, 2]), (9, [5]), (8, [4])])
def test_every_rank_evaluates_as_many_batches(examples: int, batches: list[int]) -> None:
    """One that is alone with its batch would wait for the others' blocks for ever."""
    lengths = {"dev": torch.arange(examples).numpy()}
    ranks = [list(EvalBatches(lengths, 4, rank, world_size=2)) for rank in (0, 1)]
    assert [len(batch) for batch in ranks[0]] == batches
    assert len(ranks[1]) == len(batches)
    assert sorted(key.row for rank in ranks for batch in rank for key in batch) == [
        *range(examples)
    ]

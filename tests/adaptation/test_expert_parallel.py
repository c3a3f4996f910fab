"""Experts that ranks share: two and four processes compute, adapt and save what one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import as_rank, in_processes
from test_fsdp import DIM, Net
from test_fsdp2 import STEPS, compare_states, fit
from torch import Tensor, distributed, nn

from dynmoe.adaptation import DriftGrowth, GrowthSchedule, MoEExpertParallelStrategy
from dynmoe.adaptation.adapt import twins_of, whole
from dynmoe.adaptation.expert_parallel import SharedExperts, check
from dynmoe.errors import ConfigError
from dynmoe.layers import AverageKeyRouter, MoELayer, TopKRouter
from dynmoe.layers.expert_parallel import balanced, dealt, is_elsewhere
from dynmoe.layers.moe import moe_layers

# Who owns which expert: pure functions.


def test_experts_are_dealt_evenly() -> None:
    assert dealt([0, 1, 2, 3, 4], 8, 2) == [0, 0, 0, 1, 1, 0, 1, 0]
    assert dealt([1, 3], 4, 4) == [0, 0, 1, 2]
    assert dealt([0, 1, 2], 3, 1) == [0, 0, 0]


def test_a_new_expert_moves_to_the_rank_with_fewest() -> None:
    # Slot 5 was empty on rank 0, which has two more than rank 1 with it.
    assert balanced([0, 0, 0, 1, 1, 0], [0, 1, 2, 3, 5], {0: 5, 1: 9, 2: 7, 3: 1}, 2) == [
        *(0, 0, 0, 1, 1),
        1,
    ]


def test_removed_experts_leave_room() -> None:
    load = {0: 5, 1: 2, 2: 7, 6: 1}
    owners = [0, 0, 0, 1, 1, 1, 2, 2]
    assert balanced(owners, [0, 1, 2, 6], load, 3) == [0, 1, 0, 1, 1, 1, 2, 2]
    assert balanced(owners, [0, 3, 6], load, 3) == owners


@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_rank_has_two_more_than_another(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    owners = dealt([0, 1, 2], 16, size)
    for _ in range(50):
        slots = torch.randperm(16, generator=generator).tolist()
        live = sorted(slots[: int(torch.randint(1, 17, (), generator=generator))])
        load = {slot: slots[slot] for slot in live}
        after = balanced(owners, live, load, size)
        counts = [sum(after[slot] == rank for slot in live) for rank in range(size)]
        assert max(counts) - min(counts) <= 1
        assert balanced(after, live, load, size) == after
        owners = after


# Processes.


def tokens(rank: int) -> Tensor:
    return torch.randn(6 + rank, DIM, generator=torch.Generator().manual_seed(rank))


def pooled() -> MoELayer:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
    return MoELayer(mlp, DIM, partial(TopKRouter, top_k=2), 5, init="fresh")


def forward_and_backward(layer: MoELayer, rank: int) -> dict[str, Any]:
    """The second rank has no token; the input of the third has no gradient."""
    x = tokens(rank) if rank != 1 else torch.randn(0, DIM)
    x.requires_grad_(rank != 2)
    y = layer(x)
    (y.square().sum() * (rank + 1)).backward()
    return {"y": y.detach(), "x": x.grad}


def work(rank: int, ranks: int, port: int, size: int, folder: Path) -> None:
    as_rank(rank, ranks, port)
    fit(folder, "many", MoEExpertParallelStrategy(size, find_unused_parameters=True), ranks)
    fit(folder, "half", MoEExpertParallelStrategy(size, find_unused_parameters=True), ranks, 1)
    resumed = MoEExpertParallelStrategy(size, find_unused_parameters=True)
    fit(folder, "resumed", resumed, ranks, start="half")
    # A layer alone: outputs, and gradients with uneven tokens.
    layer = pooled()
    shared = SharedExperts(layer, size)
    found = forward_and_backward(layer, rank)
    shared.average_gradients()
    owned = {id(p) for p in shared._owned()}
    grads = {n: p.grad for n, p in layer.experts.named_parameters() if id(p) in owned}
    router = [p.grad for p in layer.router.parameters()]
    torch.save({**found, "experts": grads, "router": router}, folder / f"layer.{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2)])
def test_processes_compute_what_one_does(tmp_path: Path, ranks: int, size: int) -> None:
    in_processes(work, size, tmp_path, ranks=ranks)
    fit(tmp_path, "one", "auto")
    one = torch.load(tmp_path / "one.0")
    many = [torch.load(tmp_path / f"many.{rank}") for rank in range(ranks)]
    assert sum(event["added"] is not None for event in one["events"]) >= 2
    assert any(event["removed"] for event in one["events"])
    assert many[0]["events"] == one["events"]
    losses = torch.stack([each["losses"] for each in many]).mean(0)
    torch.testing.assert_close(losses, one["losses"], atol=1e-5, rtol=0)
    resumed = torch.load(tmp_path / "resumed.0")
    assert resumed["events"] == one["events"][len(one["events"]) // 2 :]
    for name in ("many", "resumed"):
        compare_states(tmp_path / f"{name}.ckpt", tmp_path / "one.ckpt")
    # One process goes on from what several have saved.
    fit(tmp_path, "alone", "auto", start="half")
    alone = torch.load(tmp_path / "alone.0")
    torch.testing.assert_close(alone["losses"], one["losses"][STEPS // 2 :], atol=1e-5, rtol=0)

    found = [torch.load(tmp_path / f"layer.{rank}") for rank in range(ranks)]
    layer = pooled()
    for rank, each in enumerate(found):
        layer.router.zero_grad()
        expected = forward_and_backward(layer, rank)
        torch.testing.assert_close(each["y"], expected["y"])
        torch.testing.assert_close(each["x"], expected["x"])
        for grad, p in zip(each["router"], layer.router.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad)
    grads = {n: p.grad / ranks for n, p in layer.experts.named_parameters()}
    owned = [each["experts"] for each in found]
    assert {name for each in owned[:size] for name in each} == set(grads)
    assert sum(map(len, owned[:size])) == len(grads)  # each has one owner in a group
    for each in owned:
        for name, grad in each.items():
            torch.testing.assert_close(grad, grads[name])


# On one process.


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_is_the_layer() -> None:
    for x in (tokens(0), torch.zeros(0, DIM)):
        layer, plain = pooled(), pooled()
        SharedExperts(layer, 1)
        for each in (layer, plain):
            each(x).square().sum().backward()
        torch.testing.assert_close(layer(x), plain(x))
        for p, other in zip(layer.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (other.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, other.grad)


@pytest.mark.usefixtures("alone")
def test_experts_of_others_take_no_memory() -> None:
    layer = pooled()
    shared = SharedExperts(layer, 1)
    parallel: Any = layer.experts.parallel
    weight: Any = layer.experts.slots[3][0].weight
    kept, shape = weight.detach().clone(), weight.shape
    parallel.owners[3] = 1
    parallel.release(layer.experts)
    assert weight.shape == shape and weight.untyped_storage().nbytes() == 4
    assert weight.isnan().all()  # and who reads it sees so
    elsewhere = [n for n, p in layer.named_parameters() if is_elsewhere(p)]
    assert len(elsewhere) == 4 and all(".slots.3." in name for name in elsewhere)
    assert len(shared._owned()) == 4 * 4
    parallel.owners[3] = 0
    with whole(layer, layer):  # writes go to the owner
        weight.data = 2 * kept
    assert torch.equal(weight, 2 * kept)


@pytest.mark.usefixtures("alone")
def test_what_needs_all_experts_is_refused() -> None:
    net = Net()
    with pytest.raises(ConfigError, match=r"strategy\.size: 2 ranks"):
        SharedExperts(net, 2)
    with pytest.raises(ConfigError, match="trainer=ddp"):
        SharedExperts(nn.Linear(2, 2), 1)
    layer = MoELayer(nn.Sequential(nn.Linear(2, 2)), 2, partial(AverageKeyRouter, top_k=1), 2)
    with pytest.raises(ConfigError, match="AverageKeyRouter of ffn"):
        check("ffn", layer)
    SharedExperts(net, 1)
    with pytest.raises(ConfigError, match="checkpoint"):
        SharedExperts(net, 1)
    with pytest.raises(ConfigError, match="averages"):
        twins_of(moe_layers(net), Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="growth by drift"):
        DriftGrowth(net, optimizer, GrowthSchedule(10, 2, 2, "step"))

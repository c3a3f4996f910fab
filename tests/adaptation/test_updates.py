"""State of routers moves once after each optimizer step, in any training loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from processes import in_processes, join_group
from test_adapt import DIM, SLOTS, Net, adam, layer, tokens
from test_callback import Own, fit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dynmoe.adaptation import Adaptation, RouterCallback, RouterUpdates, Schedule
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    BiasedTopKRouter,
    BlockFFNRouter,
    BudgetTopAnyRouter,
    ExpertThresholdRouter,
    MaskedTopKRouter,
    PrefixRouter,
    ReLURouter,
    Routing,
    StepTotals,
    TopKRouter,
    aux_loss,
    record_routing,
)


class Told(TopKRouter):
    """Notes what it is told: sums of its own and of all layers, in state that all layers share."""

    observes = 2

    def __init__(self, dim: int, num_slots: int) -> None:
        super().__init__(dim, num_slots, top_k=1)
        self.register_buffer("own", torch.zeros(num_slots + 4))
        self.register_buffer("shared", torch.zeros(()))

    def forward(self, x_TD: Tensor, live: Sequence[int], token_mask_T: Any = None) -> Routing:
        routing = super().forward(x_TD, live, token_mask_T)
        return routing._replace(observed=torch.tensor([1.0, len(x_TD)]))

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        told = [own.tokens, own.calls, *own.observed]
        self.own = self.own + torch.cat([own.load_S, torch.stack(told)])
        self.shared += sum(each.load_S.max() for each in every) + own.step / own.num_steps


def told() -> Net:
    return Net(layer(SLOTS, Told), layer(SLOTS, Told))


def take(net: nn.Module, updates: RouterUpdates | Adaptation, *micro: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    hooks = [optimizer.register_step_post_hook(updates._watch._saw_step)]
    for x in micro:
        with record_routing(net) as tape:
            loss = net(x).square().mean()
        (loss + aux_loss(tape)).backward()
    optimizer.step()
    updates.step(loss)
    hooks[0].remove()


def test_totals_of_a_step() -> None:
    net = told()
    updates = RouterUpdates(net, adam(net), num_steps=4)
    buffers = [each.router.own for each in net.layers]
    take(net, updates, tokens(0), tokens(1, 20))
    net.eval()(tokens(2))
    net.train()
    take(net, updates, tokens(3))
    largest = 0.0
    for own, each in zip(buffers, net.layers, strict=True):
        assert own is each.router.own  # the tensor that was there
        assert own[SLOTS:].tolist() == [44, 3, 3, 44] and own[:SLOTS].sum() == 44
    with record_routing(net) as tape:
        for batches in ((tokens(0), tokens(1, 20)), (tokens(3),)):
            for calls in tape.values():
                calls.clear()
            for x in batches:
                net(x)
            for calls in tape.values():
                largest += float(sum(call.stats.load_E for call in calls).max())  # type: ignore
    shared = [each.router.shared.item() for each in net.layers]
    assert shared == [pytest.approx(largest + 1 / 4 + 2 / 4)] * 2


def test_frozen_layers_and_models_without_state_are_left_alone() -> None:
    net = told()
    net.layers[1].requires_grad_(False)
    updates = RouterUpdates(net, adam(net))
    assert list(updates.layers) == ["layers.0"] and net.layers[1].observer is None
    updates.close()
    plain = Net()
    updates = RouterUpdates(plain, adam(plain))
    assert not updates.layers and all(each.observer is None for each in plain.layers)
    updates.step()


def test_two_of_them_are_refused() -> None:
    net = told()
    first = RouterUpdates(net, adam(net))
    RouterUpdates(net, adam(net))
    with pytest.raises(ConfigError, match="taken over"):
        first.step()


def test_a_skipped_step_moves_nothing() -> None:
    net = told()
    updates = RouterUpdates(net, adam(net))
    net(tokens(0)).sum().backward()
    updates.step()  # the optimizer took none, as under a GradScaler that skips
    assert not net.layers[0].router.own.any()
    take(net, updates, tokens(0))
    assert net.layers[0].router.own.any()


def test_adaptation_moves_state_too() -> None:
    """Of its own layers and of those of a fixed pool; outside of its windows as well."""
    net = Net(layer(3, partial(BudgetTopAnyRouter, target_k=2.5)), layer(SLOTS, Told))
    adaptation = Adaptation(net, adam(net), Schedule(1, 1, 4), num_steps=4)
    assert list(adaptation.layers) == ["layers.0"]
    shifts = []
    for step in range(3):
        take(net, adaptation, tokens(step))
        shifts.append(net.layers[0].router.shift.item())
        assert list(adaptation.state_dict()["window"]) == []
    assert len({0.0, *shifts}) == 4 and net.layers[1].router.own[SLOTS].item() == 36


def test_adaptation_resumes_with_state_in_the_middle_of_a_window() -> None:
    def made() -> tuple[Net, Adaptation]:
        net = Net(layer(3, partial(BudgetTopAnyRouter, target_k=1.0)), layer(SLOTS, Told))
        return net, Adaptation(net, adam(net), Schedule(0, 4, 4))

    (straight, one), (first, two), (resumed, three) = made(), made(), made()
    for step in range(4):
        take(straight, one, tokens(step))
        if step < 2:
            take(first, two, tokens(step))
    resumed.load_state_dict(first.state_dict())
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    for step in range(2, 4):
        take(resumed, three, tokens(step))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# Lightning.


class Lit(Own):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        rate = partial(BiasedTopKRouter, bias_rate=0.1)
        self.net = nn.Sequential(nn.Linear(DIM, DIM), *(layers or [layer(SLOTS, rate)]))


def bias(model: Any) -> Tensor:
    found: Tensor = model.net[1].router.bias_E
    return found


def batches(number: int) -> list[Tensor]:
    return [tokens(seed, 12) for seed in range(number)]


def test_lightning_moves_state_and_resumes(tmp_path: Path) -> None:
    straight, first, resumed = Lit(), Lit(), Lit()
    fit(straight, RouterCallback(), batches(4), val=batches(1), max_epochs=2)
    trainer = fit(first, RouterCallback(), batches(4), val=batches(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(resumed, RouterCallback(), batches(4), max_epochs=2, ckpt_path=str(tmp_path / "a.ckpt"))
    assert bias(straight).any() and torch.equal(bias(straight), bias(resumed))
    assert not torch.equal(bias(straight), bias(first))
    assert straight.net[1].observer is None


def test_lightning_accumulates() -> None:
    whole, parts = Lit(), Lit()
    fit(whole, RouterCallback(), batches(2))
    halves = [half for batch in batches(2) for half in batch.chunk(2)]
    fit(parts, RouterCallback(), halves, accumulate_grad_batches=2)
    assert bias(whole).any() and torch.equal(bias(whole), bias(parts))


def test_lightning_has_nothing_to_do_without_state() -> None:
    callback = RouterCallback()
    fit(Own(), callback, batches(1))
    assert callback._process is None


def test_averages_of_weights_take_the_present_state() -> None:
    plain, model = Lit(), Lit()
    fit(plain, RouterCallback(), batches(4))
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    fit(model, RouterCallback(), batches(4), others=[average])
    # Lightning has put the average into the model.
    assert torch.equal(bias(model), bias(plain)) and bias(model).any()
    assert not torch.equal(model.net[0].weight, plain.net[0].weight)


@pytest.mark.slow
def test_compiled_code_reads_the_state_and_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    plain, inner = routers(), routers()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(inner, backend=counter)
    frames = []
    for model, net in ((plain, plain), (compiled, inner)):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        updates = RouterUpdates(model, optimizer)
        for step in range(5):
            model(tokens(step, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            updates.step()
            frames.append(counter.frame_count)
    assert frames[-1] == frames[-3] > 0
    for (name, value), other in zip(plain.named_buffers(), inner.buffers(), strict=True):
        assert torch.equal(value, other), name


# Two processes.


def process(rank: int, ranks: int, port: int, folder: str) -> None:
    join_group(rank, ranks, port)
    torch.manual_seed(0)
    net = routers()
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    updates = RouterUpdates(model, optimizer)
    for step in range(4):
        loss = model(tokens(step, 24).chunk(2)[rank]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bad = step == 1 and rank == 1
        updates.step(loss * float("nan") if bad else loss)
    torch.save(dict(net.named_buffers()), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def routers() -> Net:
    torch.manual_seed(0)
    return Net(
        layer(SLOTS, Told),
        layer(SLOTS, partial(BiasedTopKRouter, bias_update="quantile", bias_rate=0.5)),
        layer(3, partial(BudgetTopAnyRouter, target_k=1.5)),
        layer(SLOTS, partial(PrefixRouter, target_k=1.5)),
        layer(SLOTS, partial(ReLURouter, target_k=1.5)),
        layer(SLOTS, partial(ExpertThresholdRouter, target_k=1.5, warm_up=2, ema=0.5)),
        layer(SLOTS, partial(MaskedTopKRouter, target_k=1.5)),
        layer(SLOTS, partial(BlockFFNRouter, chunk_length=4, schedule_every=1, schedule_start=0)),
    )


@pytest.mark.slow
def test_state_is_equal_on_two_processes(tmp_path: Path) -> None:
    """And that of one process with both batches, but for the step that was bad on one rank."""
    in_processes(process, str(tmp_path))
    one, two = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    net = routers()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    updates = RouterUpdates(net, optimizer)
    for step in range(4):
        losses = [net(half).square().mean() for half in tokens(step, 24).chunk(2)]
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        updates.step(float("nan") if step == 1 else None)
    for name, value in net.named_buffers():
        torch.testing.assert_close(value, one[name])

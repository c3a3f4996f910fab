"""The adaptive process in a plain loop: what counts, what is refused, and what resumes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

from dynmoe.adaptation import Adaptation, Schedule
from dynmoe.errors import ConfigError
from dynmoe.layers import MoELayer, TopAnyRouter, TopKRouter, aux_loss, moe_layers, record_routing

DIM, SLOTS = 6, 5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))


def layer(num_experts: int = 3, router: Any = TopAnyRouter) -> MoELayer:
    return MoELayer(mlp(), DIM, router, num_experts, SLOTS, init="fresh")


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers or [layer(), layer()])
        self.out = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = x + each(x)
        out: Tensor = self.out(x)
        return out


def tokens(seed: int, num: int = 12) -> Tensor:
    return torch.randn(num, DIM, generator=torch.Generator().manual_seed(seed))


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def adapted(model: nn.Module, **options: Any) -> Adaptation:
    given = {"optimizer": adam(model), "schedule": Schedule(0, 2, 2), **options}
    return Adaptation(model, **given)


def train(adaptation: Adaptation, model: nn.Module, batches: Sequence[Tensor]) -> list[Any]:
    """The loop of the docstring."""
    (optimizer,) = adaptation.optimizers
    events = []
    for x in batches:
        with record_routing(model) as tape:
            loss = model(x).square().mean()
        (loss + 0.01 * aux_loss(tape)).backward()
        optimizer.step()
        optimizer.zero_grad()
        events += adaptation.step(loss)
    return events


def unserved(layer: MoELayer, num: int = 4) -> Tensor:
    return -sum(layer.router.directions[slot].detach() for slot in layer.live).repeat(num, 1)


def served(layer: MoELayer, slot: int = 0, num: int = 4) -> Tensor:
    away = sum(layer.router.directions[other].detach() for other in layer.live if other != slot)
    return (layer.router.directions[slot].detach() - away).repeat(num, 1)


def test_a_plain_loop_removes_and_adds() -> None:
    moe = layer()
    lost = unserved(moe)
    seen: list[Any] = []
    events = train(adapted(moe, on_event=seen.append), moe, [torch.cat([served(moe), lost])] * 2)
    assert moe.live == (0, 1) and seen == events
    assert events == [
        {
            "step": 1,
            "layer": "",
            "removed": [1, 2],
            "added": 1,
            "before": 3,
            "after": 2,
            "unrouted": 0.5,
            "tokens": 16,
        }
    ]
    direction = F.normalize(lost.sum(0), dim=0)
    torch.testing.assert_close(moe.router.directions[1].data, direction)


def test_resumed_in_the_middle_of_a_window() -> None:
    """Model, optimizer and adaptation go on as if they had never stopped."""
    batches = [tokens(seed) for seed in range(6)]
    straight = Net()
    expected = train(adapted(straight, schedule=Schedule(1, 4, 4)), straight, batches)

    first = Net()
    before = adapted(first, schedule=Schedule(1, 4, 4))
    train(before, first, batches[:3])
    states = [each.state_dict() for each in (first, *before.optimizers, before)]
    second = Net()
    after = adapted(second, schedule=Schedule(1, 4, 4))
    for each, state in zip((second, *after.optimizers, after), states, strict=True):
        each.load_state_dict(copy.deepcopy(state))
    assert train(after, second, batches[3:]) == expected != []
    assert expected[0]["tokens"] == 48
    for got, right in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(got, right)


def test_state_of_other_layers_is_refused() -> None:
    one = Net(layer())
    adaptation = adapted(one, schedule=Schedule(0, 3, 3))
    train(adaptation, one, [tokens(0)])
    with pytest.raises(ConfigError, match=r"layers\.1"):
        adapted(Net()).load_state_dict(adaptation.state_dict())


def test_state_of_other_sizes_is_refused() -> None:
    one = Net(layer())
    adaptation = adapted(one, schedule=Schedule(0, 3, 3))
    train(adaptation, one, [tokens(0)])
    larger = Net(MoELayer(mlp(), DIM, TopAnyRouter, 3, SLOTS + 1))
    with pytest.raises(ConfigError, match=r"(?s)layers\.0.*'load_E': 6.*'load_E': 5.*max_experts"):
        adapted(larger).load_state_dict(adaptation.state_dict())


@pytest.mark.parametrize("state", [{}, {"steps": 3}])
def test_state_of_something_else_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"steps and window, found"):
        adapted(Net()).load_state_dict(state)


def test_experts_that_others_change_within_a_window() -> None:
    """Sums of calls before and after belong to their slots; a state in between is one to load."""
    moe = layer()
    mine = served(moe, 2)
    adaptation = adapted(moe, schedule=Schedule(0, 3, 3))
    train(adaptation, moe, [mine])
    moe.remove_expert(0)
    moe.add_expert(4, torch.ones(DIM))
    train(adaptation, moe, [mine])
    adaptation.load_state_dict(adaptation.state_dict())
    (event,) = train(adaptation, moe, [mine])
    assert event["tokens"] == 12 and 2 not in event["removed"] and 1 in event["removed"]


def test_experts_that_others_change_between_micro_batches() -> None:
    def forward(model: nn.Module) -> Tensor:
        y = model(tokens(0))
        model.layers[0].remove_expert(1)  # type: ignore[index, union-attr, operator]
        return y + model(tokens(1))

    assert tokens_counted(Net(), forward) == 24


def tokens_counted(model: nn.Module, forward: Any, **options: Any) -> int:
    """Of one window of one step that calls ``forward``."""
    adaptation = adapted(model, schedule=Schedule(0, 1, 1), **options)
    with record_routing(model) as tape:
        loss = forward(model).square().mean()
    (loss + aux_loss(tape)).backward()
    adaptation.optimizers[0].step()
    return int(adaptation.step(loss)[0]["tokens"])


def test_each_forward_counts_once() -> None:
    x = tokens(0)
    assert tokens_counted(Net(), lambda net: net(x)) == 12
    assert tokens_counted(Net(), lambda net: checkpoint(net, x, use_reentrant=False)) == 12
    assert tokens_counted(Net(), lambda net: net(x) + net(x)) == 24  # two views of a batch


def test_a_recomputation_within_the_recording_counts_once() -> None:
    """Also where the user leaves `record_routing` open around the backward pass."""
    net, x = Net(), tokens(0)
    adaptation = adapted(net, schedule=Schedule(0, 1, 1))
    with record_routing(net) as tape:
        loss = checkpoint(net, x, use_reentrant=False).square().mean()
        (loss + aux_loss(tape)).backward()
    adaptation.optimizers[0].step()
    assert adaptation.step(loss)[0]["tokens"] == 12


def test_evaluation_copies_and_forwards_without_gradients_do_not_count() -> None:
    net, x = Net(), tokens(0)

    def forward(model: nn.Module) -> Tensor:
        copy.deepcopy(model)(x)
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
        out: Tensor = model(x)
        return out

    assert tokens_counted(net, forward) == 12


def test_wrapped_models_have_the_same_names() -> None:
    names = ["layers.0", "layers.1"]
    net = Net()
    assert list(adapted(torch.compile(net, backend="eager")).layers) == names
    assert list(adapted(nn.DataParallel(net)).layers) == names
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net.layers[1] = checkpoint_wrapper(net.layers[1])
    assert list(adapted(net).layers) == names


@pytest.mark.slow
def test_a_compiled_model_counts_the_same_and_is_not_compiled_again() -> None:
    """Windows of two steps of three: neither their edges nor a tape are compiled anew."""
    torch._dynamo.reset()
    batches = [tokens(seed) for seed in range(9)]
    plain, inner = Net(), Net()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(inner, backend=counter)
    schedule = Schedule(0, 2, 3)
    expected = train(adapted(plain, schedule=schedule, min_experts=3), plain, batches)
    adaptation, events, frames = adapted(compiled, schedule=schedule, min_experts=3), [], []
    for batch in batches:
        events += train(adaptation, compiled, [batch])
        frames.append((counter.frame_count, [each.live for each in inner.layers]))
    assert events == expected
    same_pool = [count for count, live in frames if live == frames[-1][1]]
    assert len(same_pool) > 3 and same_pool[-1] == same_pool[1]
    compiled(batches[0])  # nobody records it
    assert counter.frame_count == same_pool[-1]


# Steps that do not count.


class Overflowing(torch.amp.GradScaler):
    """A GradScaler on the CPU whose gradients overflow in the steps that are listed."""

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__("cpu", init_scale=4.0)
        self.steps, self.step_number = steps, -1

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_number += 1
        if self.step_number in self.steps:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.fill_(float("inf"))
        super().unscale_(optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    net = Net()
    optimizer, scaler = adam(net, fused=fused), Overflowing([1])
    adaptation = Adaptation(net, optimizer, Schedule(0, 3, 3))
    before, events = [], []
    for seed in range(3):
        with record_routing(net) as tape:
            loss = net(tokens(seed)).square().mean()
        scaler.scale(loss + aux_loss(tape)).backward()
        before.append(net.out.weight.detach().clone())
        if fused:  # it unscales by itself, and looks at the gradients in its own pass
            if seed == 1:
                net.out.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        else:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        events += adaptation.step()
    assert not torch.equal(before[0], before[1]) and torch.equal(before[1], before[2])
    assert [event["tokens"] for event in events] == [24, 24]


@pytest.mark.parametrize("kind", [torch.tensor, float])
def test_a_step_whose_loss_is_not_finite_does_not_count(kind: Any) -> None:
    net = Net()
    adaptation = adapted(net)
    for loss in (kind(1.0), kind(float("nan"))):
        net(tokens(0))
        adaptation.optimizers[0].step()
        events = adaptation.step(loss)
    assert [event["tokens"] for event in events] == [12, 12]


def test_no_expert_points_to_tokens_without_a_length() -> None:
    """1e30 squared is no number in fp32: such tokens are set aside, the others count."""
    moe = layer()
    (event,) = train(adapted(moe), moe, [1e30 * unserved(moe), unserved(moe)])
    assert event["tokens"] == len(unserved(moe)) and event["unrouted"] == 1.0
    direction = moe.router.directions[event["added"]]
    assert direction.norm().item() == pytest.approx(1)


def test_no_expert_points_to_a_token_that_is_not_finite() -> None:
    """The step with it is left out; the layers live on."""
    moe = layer()
    adaptation = adapted(moe)
    for bad in (float("inf"), 1.0):
        x = unserved(moe)
        x[0] *= bad
        moe(x)
        adaptation.optimizers[0].step()
        (event,) = adaptation.step() or [None]
    assert event is not None and event["added"] is not None
    assert all(p.isfinite().all() for p in moe.parameters())


def test_a_call_without_an_optimizer_step_does_not_count() -> None:
    net = Net()
    adaptation = adapted(net)
    net(tokens(0))
    adaptation.step()
    net(tokens(0))
    adaptation.optimizers[0].step()
    assert [event["tokens"] for event in adaptation.step()] == [12, 12]


def test_a_window_without_a_step_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    adaptation = adapted(net)
    for _ in range(2):
        net(tokens(0)).sum().backward()
        events = adaptation.step()  # before the optimizer, which is too early
    assert "after optimizer.step()" in caplog.text
    assert [(event["tokens"], event["added"], event["removed"]) for event in events] == [
        (0, None, []),
        (0, None, []),
    ]


# Averages of the weights.


def test_averages_follow_the_experts() -> None:
    """A new expert's average starts at its weights, and goes on as an average from there."""
    net = Net(layer())
    moe: Any = net.layers[0]
    ema = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    adaptation = Adaptation(net, optimizer, Schedule(0, 2, 2), averages=[ema])
    batch = torch.cat([served(moe), unserved(moe)])
    ema.update_parameters(net)
    train(adaptation, net, [batch])
    ema.update_parameters(net)
    train(adaptation, net, [batch])
    twin: Any = ema.module.layers[0]
    assert twin.live == moe.live == (0, 1)
    start = [p.detach().clone() for p in moe.slot_parameters(1)]
    for average, begin in zip(twin.slot_parameters(1), start, strict=True):
        assert torch.equal(average, begin)
    train(adaptation, net, [batch])
    ema.update_parameters(net)
    assert twin.live == (0, 1)
    moved = False
    pairs = zip(twin.slot_parameters(1), start, moe.slot_parameters(1), strict=True)
    for average, begin, now in pairs:
        torch.testing.assert_close(average, (begin + now) / 2)
        moved |= not torch.equal(begin, now)
    assert moved


def test_an_average_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="averages: expected copies of the model"):
        adapted(Net(), averages=[Net(layer())])


# The contract.


def shared() -> Net:
    one, two = layer(), layer()
    two.experts = one.experts
    return Net(one, two)


def frozen() -> Net:
    return Net(layer().requires_grad_(False))


REFUSED = {
    "no MoE layer in Linear": lambda: nn.Linear(2, 2),
    "TopKRouter: use an adaptive": lambda: Net(layer(5, TopKRouter)),
    "layers.0 and layers.1 share parameters": shared,
    "trained parameters": frozen,
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_cannot_be_adapted(message: str) -> None:
    model = REFUSED[message]()
    with pytest.raises(ConfigError, match=message):
        adapted(model)


def test_a_layer_used_twice_is_one_pool() -> None:
    moe = layer()
    assert tokens_counted(Net(moe, moe), lambda net: net(tokens(0))) == 24


def test_optimizers_that_do_not_hold_the_layers() -> None:
    net = Net()
    with pytest.raises(ConfigError, match=r"holds no parameter of layers\.0"):
        Adaptation(net, adam(net.out), Schedule(0, 1, 1))
    with pytest.raises(ConfigError, match=r"expected a torch\.optim\.Optimizer"):
        Adaptation(net, "adam", Schedule(0, 1, 1))  # type: ignore[arg-type]


def test_a_schedule_in_epochs() -> None:
    with pytest.raises(ConfigError, match=r"in_steps\(steps_per_epoch\)"):
        adapted(Net(), schedule=Schedule(0, 1, 1, unit="epoch"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init": "foo"}, "'slot' or 'copy_most_used' or .*, found 'foo'"),
        ({"init": "pretrained"}, "keep_origin=True"),
        ({"reset_moments": "no"}, "True or False, found 'no'"),
        ({"min_experts": 0}, "1 or more, found 0"),
        ({"remove_below": 1.0}, "below 1, found 1"),
        ({"min_experts": 99}, f"at most {SLOTS}, the slots of layers.0, found 99"),
    ],
)
def test_arguments_that_no_layer_can_follow(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(Net(), **wrong)


def test_layers_that_never_train() -> None:
    net = Net().eval()
    adaptation = adapted(net)
    net(tokens(0))
    adaptation.step()
    with pytest.raises(ConfigError, match=r"model\.train\(\)"):
        adaptation.step()


def test_two_for_one_layer() -> None:
    net = Net()
    first = adapted(net)
    adapted(net)
    with pytest.raises(ConfigError, match="Keep one for each layer"):
        first.step()
    first.close()


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_loss_without_the_auxiliary_loss(
    forgotten: bool, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net()
    adaptation = adapted(net, schedule=Schedule(5, 1, 1))  # outside of windows, too
    for _ in range(2):
        with record_routing(net) as tape:
            loss = net(tokens(0)).square().mean()
        (loss if forgotten else loss + 0.0 * aux_loss(tape)).backward()
        adaptation.optimizers[0].step()
        adaptation.step(loss)
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(found) == forgotten
    assert all("loss + 0.01 * aux_loss(tape)" in text for text in found)


def test_checkpointing_of_the_reentrant_kind(caplog: pytest.LogCaptureFixture) -> None:
    """It counts once too, but its forward has no gradients, and neither has the auxiliary loss."""
    x = tokens(0).requires_grad_()
    assert tokens_counted(Net(), lambda net: checkpoint(net, x, use_reentrant=True)) == 12
    assert "use_reentrant=False" in caplog.text


def test_copies_of_data_parallel_are_refused() -> None:
    moe = layer()
    adapted(moe)
    replica: Any = moe._replicate_for_data_parallel()
    replica.router, replica.experts, replica.active_E = moe.router, moe.experts, moe.active_E
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        replica(tokens(0))


@pytest.mark.slow
def test_peft_wraps_the_model() -> None:
    peft = pytest.importorskip("peft")
    net = Net()
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["out"]))
    for each in moe_layers(wrapped).values():
        each.requires_grad_(True)
    assert len(adapted(wrapped).layers) == 2
    assert tokens_counted(wrapped, lambda model: model(tokens(0))) == 12

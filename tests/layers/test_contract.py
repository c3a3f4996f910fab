"""The contract of every router of the package. A new router adds one row to ROUTERS."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dynmoe.adaptation import RouterUpdates
from dynmoe.config.quantize import Quantisation
from dynmoe.layers import (
    AverageKeyRouter,
    BiasedTopKRouter,
    BlockFFNRouter,
    BudgetTopAnyRouter,
    CosineTopKRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    GeMoERouter,
    MaskedTopKRouter,
    MoELayer,
    NullExpertRouter,
    PrefixRouter,
    ReLURouter,
    TopAnyRouter,
    TopKRouter,
    UniFRouter,
    ZeroCostRouter,
    aux_loss,
    record_routing,
)
from dynmoe.training.bits import places_in
from dynmoe.training.calibrate import calibrate

DIM, SLOTS, TOKENS = 8, 4, 50
LIVE = tuple(range(SLOTS))
ROUTERS: dict[str, Any] = {
    "top_any": TopAnyRouter,
    "top_any, gradient to all": partial(TopAnyRouter, gate_grad="all"),
    "top_any, tutel": partial(TopAnyRouter, combine="tutel", aux="gshard"),
    "top_any, deepspeed": partial(TopAnyRouter, balance_weight=1.0, efficiency_weight=1.0),
    "budget": partial(BudgetTopAnyRouter, target_k=1.5),
    "budget, as the paper": partial(
        BudgetTopAnyRouter, target_k=0.8, unserved="nothing", missing="after", scale="norm"
    ),
    "budget, softmax": partial(BudgetTopAnyRouter, weights="softmax", gate_grad="none"),
    "budget, gradient to all": partial(BudgetTopAnyRouter, gate_grad="all"),
    "topk": TopKRouter,
    "topk, more losses": partial(TopKRouter, z_weight=0.1, sequence_weight=0.1),
    "topk in turn": partial(TopKRouter, forced_balance=True),
    "gmoe": CosineTopKRouter,
    "gmoe with capacity": partial(CosineTopKRouter, capacity_factor=1.5),
    "emoe": partial(AverageKeyRouter, top_k=2),
    "emoe as its code": partial(AverageKeyRouter, top_k=2, noise=1.0, capacity_factor=1.5),
    "loss-free": partial(BiasedTopKRouter, bias_rate=0.02),
    "loss-free, quantile": partial(BiasedTopKRouter, bias_update="quantile", bias_rate=0.5),
    "loss-free, groups": partial(
        BiasedTopKRouter, bias_update="centred_sign", score="softmax", num_groups=2
    ),
    "adamoe": partial(NullExpertRouter, num_null=4, aux_end=0.1),
    "adamoe, plain loss": partial(NullExpertRouter, num_null=4, balance="plain", renorm="all"),
    "longcat": partial(
        NullExpertRouter,
        num_null=4,
        null_output="identity",
        renorm="none",
        balance="bias",
        target_k=1.5,
    ),
    "blockffn": partial(BlockFFNRouter, chunk_length=4, schedule_every=1, schedule_start=0),
    "gemoe": partial(GeMoERouter, max_k=3),
    "gemoe, all pairs": partial(GeMoERouter, pairs="all", renormalise=False, sequence_weight=0.1),
    "unif": partial(UniFRouter, num_blocks=2),
    "moepp": ZeroCostRouter,
    "moepp, linear gate": partial(
        ZeroCostRouter, two_layer_gate=False, num_constant=0, num_zero=2, z_weight=0.1
    ),
    "top-p": PrefixRouter,
    "xmoe": partial(PrefixRouter, top_p=0.9, boundary="below", balance="first", entropy_weight=0.0),
    "mass": partial(PrefixRouter, top_p=0.5, boundary="below", renorm="tutel", balance_weight=0.0),
    "dtop-p": partial(PrefixRouter, renorm="chosen", normalise_logits=True, target_k=2.0),
    "remoe": partial(ReLURouter, target_k=1.5, lambda_init=0.01),
    "remoe, plain": partial(ReLURouter, target_k=1.5, l1="plain", per_layer=True),
    "expert choice": partial(ExpertChoiceRouter, target_k=1.5),
    "expert threshold": partial(ExpertThresholdRouter, target_k=1.5, warm_up=0.2, ema=0.9),
    "expert threshold, bounded": partial(ExpertThresholdRouter, warm_up=0, slack=0.25),
    "beam": partial(MaskedTopKRouter, gate_grad="chosen"),
    "beam, held": partial(MaskedTopKRouter, target_k=1.2),
}
# Their state is a mean over batches of what each has, which is not that of the batches in one.
BY_BATCH = [name for name in ROUTERS if name.startswith("expert threshold")]
WITH_STATE = [name for name, make in ROUTERS.items() if make(DIM, SLOTS).has_state]


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def made(name: str, training: bool = False) -> Any:
    return ROUTERS[name](DIM, SLOTS).train(training)


def test_a_list_of_targets_is_given_out_to_the_layers() -> None:
    """By add_moe_layers; a router itself has one."""
    for make in ROUTERS.values():
        if "target_k" in getattr(make, "keywords", {}):
            with pytest.raises(ValueError, match=r"target_k is \[1, 2\]: expected one number"):
                make(DIM, SLOTS, target_k=[1, 2])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_routing(name: str, training: bool, x_TD: Tensor) -> None:
    router = made(name, training)
    routing = router(x_TD.bfloat16(), LIVE)
    assert routing.weights_TE.shape == routing.mask_TE.shape == (TOKENS, SLOTS)
    assert routing.mask_TE.dtype == routing.dispatch_TE.dtype == torch.bool
    assert routing.weights_TE.dtype == routing.scores_TE.dtype == torch.float32
    assert routing.aux.shape == () and routing.aux.isfinite()
    assert not routing.weights_TE[~routing.mask_TE].any()
    assert not (routing.mask_TE & ~routing.dispatch_TE).any()
    # An unserved token has no expert, or the one that it falls back to.
    assert (routing.mask_TE[routing.unserved_T].sum(1) <= 1).all()
    if routing.extra_TD is not None:
        assert routing.extra_TD.shape == (TOKENS, DIM)
    if routing.free_T is not None:
        assert routing.free_T.shape == (TOKENS,) and not routing.free_T.is_floating_point()
    if training and router.observes:
        assert routing.observed.shape == (router.observes,)
        assert routing.observed.dtype == torch.float32 and not routing.observed.requires_grad


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, False) for name in ROUTERS), *((name, True) for name in WITH_STATE)],
)
def test_padding_routes_nowhere_and_changes_nothing(
    name: str, training: bool, x_TD: Tensor
) -> None:
    router = made(name, training)
    real_T = torch.arange(TOKENS) < 30
    padded = router(x_TD, LIVE, real_T)
    assert not padded.mask_TE[30:].any() and not padded.unserved_T[30:].any()
    alone = router(x_TD[:30], LIVE)
    torch.testing.assert_close(padded.weights_TE[:30], alone.weights_TE)
    torch.testing.assert_close(padded.aux, alone.aux)
    for part in ("extra_TD", "free_T"):
        of_all, of_real = getattr(padded, part), getattr(alone, part)
        if of_real is not None:
            torch.testing.assert_close(of_all[:30], of_real)
            assert not of_all[30:].any()
    if alone.observed is not None:
        torch.testing.assert_close(padded.observed, alone.observed)


@pytest.mark.parametrize("name", ROUTERS)
def test_constructor_leaves_the_seed_alone(name: str) -> None:
    """The official gate calls torch.manual_seed(1): runs with other seeds then continue alike."""
    after = []
    for number in (123, 999):
        torch.manual_seed(number)
        made(name)
        after.append(torch.rand(4))
    assert not torch.equal(*after)


@pytest.mark.parametrize("name", ROUTERS)
def test_gate_is_fp32_under_autocast(name: str, x_TD: Tensor) -> None:
    router = made(name)
    plain = router(x_TD, LIVE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD, LIVE)
    assert torch.equal(plain.scores_TE, cast.scores_TE)
    assert torch.equal(plain.weights_TE, cast.weights_TE)


@pytest.mark.parametrize("name", ROUTERS)
def test_gate_and_state_are_fp32_in_a_model_of_bf16(name: str, x_TD: Tensor) -> None:
    """Lightning's bf16-true converts the weights and makes bf16 the default type meanwhile."""
    router = made(name, training=True).to(torch.bfloat16)
    try:
        torch.set_default_dtype(torch.bfloat16)
        routing = router(x_TD.bfloat16(), LIVE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert routing.weights_TE.dtype == routing.scores_TE.dtype == torch.float32
    assert routing.aux.dtype == torch.float32
    assert routing.observed is None or routing.observed.dtype == torch.float32
    assert all(b.dtype == torch.float32 for b in router.buffers())


@pytest.mark.parametrize("name", ROUTERS)
def test_flops_are_those_of_pytorchs_counter(name: str, x_TD: Tensor) -> None:
    """Two batches, because products whose size does not depend on the batch are left out."""
    router, totals = ROUTERS[name](DIM, SLOTS), []
    for number in (50, 20):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            router(x_TD[:number], LIVE)
        totals.append(counter.get_total_flops())
    each, fixed = router.flops(DIM)
    assert totals[0] - totals[1] == 30 * (SLOTS * each + fixed)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_are_finite(name: str, x_TD: Tensor) -> None:
    """Also of tokens without an expert, of a token of zeros, and of no token at all."""
    for tokens in (torch.cat([x_TD, torch.zeros(1, DIM)]), torch.zeros(0, DIM)):
        router = made(name, training=True)
        x = tokens.clone().requires_grad_()
        routing = router(x, LIVE)
        total = routing.weights_TE.square().sum() + routing.aux
        if routing.extra_TD is not None:
            total = total + routing.extra_TD.sum()
        if len(tokens) and total.requires_grad:
            total.backward()
            grads = [x.grad, *(p.grad for p in router.parameters())]
            assert all(grad.isfinite().all() for grad in grads if grad is not None)
        assert routing.mask_TE.shape == (len(tokens), SLOTS)


@pytest.mark.parametrize("name", ROUTERS)
def test_compact_keeps_outputs(name: str, x_TD: Tensor) -> None:
    layer = layers(name)[0].eval()
    if layer.adaptive:
        layer.remove_expert(1)
    small = layer.compact()
    assert torch.equal(small(x_TD), layer(x_TD))
    assert small.router.record(small.live) == layer.router.record(layer.live)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_export_keeps_outputs(name: str, x_TD: Tensor) -> None:
    layer = layers(name)[0].eval().compact()
    tokens = {"x": {0: torch.export.Dim("tokens", min=2, max=4096)}}
    program = torch.export.export(layer, (x_TD,), dynamic_shapes=tokens)
    more_TD = torch.randn(7, DIM)
    torch.testing.assert_close(program.module()(more_TD), layer(more_TD))


# State after the step.


def layers(name: str) -> Any:
    """Two MoE layers."""
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
    return nn.Sequential(*(MoELayer(mlp, DIM, ROUTERS[name], SLOTS, init="fresh") for _ in "ab"))


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Tensor]],
    first: int = 0,
    recompute: bool = False,
    loss: float | None = None,
) -> None:
    """Steps of micro-batches of equal size, from step ``first`` of 10."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    updates = RouterUpdates(model, optimizer, num_steps=10)
    updates.steps = first
    for step in steps:
        for x_TD in step:
            with record_routing(model) as tape:
                y_TD = checkpoint(model, x_TD, use_reentrant=False) if recompute else model(x_TD)
            nothing = 0 * sum(p.sum() for p in model.parameters())  # a graph without any token
            ((y_TD.square().sum() + 0.01 * aux_loss(tape)) / len(step) + nothing).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates.step(loss)
    updates.close()


def state(model: nn.Module) -> dict[str, Tensor]:
    """What ``update`` may move."""
    kept = model.state_dict().items()
    names = {name for name, _ in model.named_buffers()}
    return {n: v.clone() for n, v in kept if n in names and "router" in n}


def batches(number: int) -> list[list[Tensor]]:
    own = torch.Generator().manual_seed(5)
    return [[torch.randn(64, DIM, generator=own)] for _ in range(number)]


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_moves_after_the_step_alone(name: str) -> None:
    """No forward, evaluation or recomputation changes it; the same steps make the same state."""
    model, (*steps, last) = layers(name), batches(4)
    before = state(model)
    assert before and all(value.dtype == torch.float32 for value in before.values())
    train(model, steps)
    moved = state(model)
    assert any(not torch.equal(before[key], moved[key]) for key in before)
    again = layers(name)
    train(again, steps, recompute=True)
    model.eval()(last[0])
    with torch.no_grad():
        model.train()(last[0])
    model(last[0]).sum().backward()  # no step
    for key, value in state(model).items():
        assert torch.equal(value, moved[key]) and torch.equal(value, state(again)[key]), key


@pytest.mark.parametrize("name", [name for name in WITH_STATE if name not in BY_BATCH])
def test_micro_batches_count_as_one(name: str) -> None:
    whole, parts = layers(name), layers(name)
    train(whole, batches(3))
    train(parts, [[*step[0].chunk(2)] for step in batches(3)])
    for key, value in state(whole).items():
        torch.testing.assert_close(value, state(parts)[key])


@pytest.mark.parametrize("name", WITH_STATE)
def test_resumed_from_a_checkpoint(name: str) -> None:
    straight, first, resumed = layers(name), layers(name), layers(name)
    train(straight, batches(6))
    train(first, batches(6)[:3])
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, batches(6)[3:], first=3)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_step_that_does_not_count_moves_nothing(name: str) -> None:
    model = layers(name)
    train(model, batches(1))
    before = state(model)
    train(model, batches(1), loss=float("nan"))
    train(model, [[torch.zeros(0, DIM)]])
    assert all(torch.equal(before[key], value) for key, value in state(model).items())


class Block(nn.Module):
    """An FFN behind a residual connection, as ``blocks_of`` finds it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        dense = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        self.blocks = nn.ModuleList([Block(layer), Block(dense)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_can_be_quantised(name: str) -> None:
    """On the rows that the router gives them; routers that read experts choose as before."""
    mlp = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM, bias=False))
    model = Stack(MoELayer(mlp, DIM, ROUTERS[name], SLOTS, init="copy")).eval()
    layer: Any = model.blocks[0].mlp
    x_BND = torch.randn(5, 10, DIM)
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.add_(0.3 * torch.randn_like(p))
        layer.experts.fix_keys()
        with record_routing(model) as tape:
            model(x_BND)
    (load,) = [call.stats.load_E.tolist() for calls in tape.values() for call in calls]
    how = Quantisation(default=3, group_size=8)
    bits = dict.fromkeys((place.name for place in places_in(model)), 3)
    done = calibrate(model, [(x_BND,)], bits, how)
    idle = {e for e in range(SLOTS) if not load[e]}
    assert {int(each.split(".")[4]) for each in done.fallback} == idle
    assert len(done.errors) == len(bits) - 2 * len(idle)
    assert all(error <= rtn for error, rtn in done.errors.values())
    with torch.no_grad(), record_routing(model) as again:
        model(x_BND)
    assert [c.stats.load_E.tolist() for calls in again.values() for c in calls] == [load]

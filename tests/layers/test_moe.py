"""The MoE layer: copies keep the function, experts come and go, compaction changes nothing."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe.layers import (
    CosineTopKRouter,
    Experts,
    MoELayer,
    TopAnyRouter,
    TopKRouter,
    mask_padding,
    record_routing,
)
from dynmoe.layers.experts import linears
from dynmoe.layers.ffn import PackedGatedFFN

DIM = 12


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_mlp() -> nn.Module:
    mlp = nn.Sequential(nn.Linear(DIM, 20), nn.GELU(), nn.Linear(20, DIM))
    nn.init.normal_(mlp[2].bias)
    return mlp


def make_layer(**kwargs: object) -> MoELayer:
    options = {"router": TopAnyRouter, "num_experts": 3, "max_experts": 5, **kwargs}
    return MoELayer(make_mlp(), DIM, **options)  # type: ignore[arg-type]


def test_layer_of_copies_is_the_ffn_for_every_served_token() -> None:
    mlp = make_mlp()
    layer = MoELayer(mlp, DIM, TopAnyRouter, 3, 5)
    x = torch.randn(4, 7, DIM)
    torch.testing.assert_close(layer.eval()(x), mlp(x))
    routing = layer.train().router(x.view(-1, DIM), layer.live)
    served = ~routing.unserved_T.view(4, 7)
    assert (~served).any()
    torch.testing.assert_close(layer(x)[served], mlp(x)[served])
    assert not layer(x)[~served].any()


@pytest.mark.parametrize("as_list", [list, nn.ModuleList])
def test_given_experts_are_the_experts(as_list: Any) -> None:
    """Not copies of them; slots beyond them hold copies in turn."""
    given = [make_mlp() for _ in range(3)]
    layer = MoELayer(as_list(given), DIM, TopAnyRouter, 3, 5)
    assert [layer.experts.slots[slot] for slot in range(3)] == given
    for slot, source in ((3, given[0]), (4, given[1])):
        copied = layer.experts.slots[slot]
        assert copied is not source and torch.equal(copied[0].weight, source[0].weight)
    layer.add_expert(3, torch.ones(DIM), "copy_most_used", load={2: 9})
    assert torch.equal(layer.experts.slots[3][0].weight, given[2][0].weight)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ([make_mlp(), make_mlp()], {}, "2 experts are given.*num_experts=2"),
        ([make_mlp()] * 3, {"init": "fresh"}, "init=copy"),
        ([make_mlp()] * 3, {"keep_origin": True}, "no keep_origin"),
        ([make_mlp(), make_mlp(), nn.Linear(DIM, DIM)], {}, "equal shapes"),
        ([make_mlp(), make_mlp(), nn.Linear(DIM, 2)], {}, r"rows \[N, 12\] to rows"),
        ([], {}, "0 experts are given"),
        ([make_mlp(), make_mlp(), make_mlp().double()], {}, "equal"),
    ],
)
def test_given_experts_that_do_not_fit(given: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(given, DIM, TopAnyRouter, 3, 5, **arguments)


def test_print_shows_the_living_experts() -> None:
    layer = make_layer()
    layer.remove_expert(1)
    assert f"dim={DIM}, experts [0, 2] of 5 slots alive" in repr(layer)


def test_gmoe_layer_with_equal_scores_is_a_sixth_of_the_ffn() -> None:
    """GMoE does not renormalise at k = 1, so it does not start at the pretrained function."""
    mlp = make_mlp()
    layer = MoELayer(mlp, DIM, CosineTopKRouter, 6).eval()
    layer.router.embeddings.data.zero_()
    x = torch.randn(5, DIM)
    torch.testing.assert_close(layer(x), mlp(x) / 6)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RmsNorm])
def test_norms_of_fresh_experts_are_new(norm: type[nn.Module]) -> None:
    mlp = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 4))
    nn.init.constant_(mlp[1].weight, 2.0)
    for slot in Experts(mlp, 2, "fresh").slots:
        assert torch.equal(slot[1].weight, torch.ones(6))


def test_fresh_experts_differ_and_copies_do_not() -> None:
    copies, fresh = make_layer(), make_layer(init="fresh")
    assert torch.equal(copies.experts.slots[0][0].weight, copies.experts.slots[1][0].weight)
    assert not torch.equal(fresh.experts.slots[0][0].weight, fresh.experts.slots[1][0].weight)


def test_empty_slots_cost_nothing() -> None:
    """No gradient, so no optimizer state, no weight decay: AdamW leaves them bitwise alone."""
    layer = make_layer(init="fresh")
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        with record_routing(layer) as tape:
            y = layer(torch.randn(30, DIM))
        (y.square().sum() + tape[""][0].aux).backward()
        optimizer.step()
    changed = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(".3" in name or ".4" in name for name in changed)
    assert all(p not in optimizer.state for slot in (3, 4) for p in layer.slot_parameters(slot))


@pytest.mark.parametrize("init", ["slot", "copy_most_used", "mean", "pretrained", "fresh"])
def test_new_expert(init: str) -> None:
    layer = make_layer(init="fresh", keep_origin=True)
    slots = layer.experts.slots
    stale = slots[4][0].weight.clone()
    layer.add_expert(4, 3 * torch.ones(DIM), init, load={0: 1, 1: 9, 2: 4})
    assert layer.live == (0, 1, 2, 4)
    torch.testing.assert_close(layer.router.directions[4].data, torch.ones(DIM) / DIM**0.5)
    got = slots[4][0].weight
    expected = {
        "slot": stale,
        "copy_most_used": slots[1][0].weight,
        "mean": (slots[0][0].weight + slots[1][0].weight + slots[2][0].weight) / 3,
        "pretrained": layer.origin[0].weight,
    }
    if init == "fresh":
        assert not any(torch.equal(got, other) for other in expected.values())
        twin = make_layer(init="fresh")
        twin.add_expert(4, torch.ones(DIM), "fresh", seed=0)
        assert torch.equal(got, twin.experts.slots[4][0].weight)  # by seed, not by global RNG
    else:
        torch.testing.assert_close(got, expected[init])


@pytest.mark.parametrize("gate_up", [False, True])
def test_a_copy_of_which_half_the_units_are_drawn_anew(gate_up: bool) -> None:
    mlp: nn.Module = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))
    if gate_up:
        mlp = PackedGatedFFN(nn.Linear(DIM, 128), nn.SiLU(), nn.Linear(64, DIM), 0.0)
    layer = MoELayer(mlp, DIM, TopAnyRouter, 2, 3)
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        each.add_expert(2, torch.ones(DIM), "copy_redrawn", load={1: 9}, seed=7)
    old, new, again = (
        linears(m) for m in (layer.experts.slots[1], layer.experts.slots[2], twin.experts.slots[2])
    )
    assert all(a.weight.equal(b.weight) for a, b in zip(new, again, strict=True))  # by its seed
    changed = (old[0].weight != new[0].weight).all(1) & (old[0].bias != new[0].bias)
    units = changed.view(-1, 64)
    assert units.sum(1).eq(32).all() and units.eq(units[0]).all()  # gate and up of one unit
    assert (old[1].weight != new[1].weight).all(0).equal(units[0])
    assert old[1].bias.equal(new[1].bias)
    same = ~changed
    assert old[0].weight[same].equal(new[0].weight[same])
    torch.testing.assert_close(new[0].weight.std(), old[0].weight.std(), rtol=0.1, atol=0)


def test_new_expert_serves_the_tokens_it_was_made_for() -> None:
    layer = make_layer()
    lost = torch.stack([-sum(layer.router.directions[e].data for e in layer.live)] * 2)
    assert layer.router(lost, layer.live).unserved_T.all()
    with record_routing(layer) as tape:
        layer(lost)
    layer.add_expert(3, tape[""][0].stats.unserved_D)
    routing = layer.router(lost, layer.live)
    assert not routing.unserved_T.any()
    assert routing.mask_TE.tolist() == [[False, False, False, True]] * 2


def test_impossible_changes_are_refused() -> None:
    layer = make_layer(num_experts=1)
    with pytest.raises(ValueError, match=r"cannot remove slot 0.*\(0,\)"):
        layer.remove_expert(0)
    with pytest.raises(ValueError, match="cannot add to slot 0"):
        layer.add_expert(0, torch.ones(DIM))
    with pytest.raises(ValueError, match="keep_origin=True"):
        layer.add_expert(1, torch.ones(DIM), "pretrained")


def test_state_dict_carries_the_pool() -> None:
    layer = make_layer(init="fresh")
    layer.add_expert(4, torch.ones(DIM))
    layer.remove_expert(1)
    twin = make_layer(init="fresh")
    assert twin.live == (0, 1, 2)  # cached before loading
    twin.load_state_dict(layer.state_dict())
    assert twin.live == (0, 2, 4)
    x = torch.randn(9, DIM)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_after_training(again) -> None:  # type: ignore[no-untyped-def]
    layer = make_layer()
    with record_routing(layer):
        layer(torch.randn(9, DIM)).sum().backward()
    x = torch.randn(9, DIM)
    assert torch.equal(again(layer)(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
def test_compact_keeps_the_function(training: bool) -> None:
    layer = make_layer(init="fresh", num_experts=5).train(training)
    layer.remove_expert(0)
    layer.remove_expert(3)
    small = layer.compact()
    x = torch.randn(40, DIM)
    assert torch.equal(small(x), layer(x))
    assert small.live == (0, 1, 2) and small.max_experts == 3

    def size(m: nn.Module) -> int:
        return sum(p.numel() for p in m.parameters())

    slot = sum(p.numel() for p in layer.slot_parameters(0))
    assert size(small) == size(layer) - 2 * slot
    twin = make_layer(init="fresh", num_experts=3, max_experts=3).train(training)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("router", [TopKRouter, CosineTopKRouter])
def test_compact_of_a_fixed_pool_changes_nothing(router) -> None:  # type: ignore[no-untyped-def]
    layer = make_layer(router=router, num_experts=4, max_experts=4).eval()
    x = torch.randn(8, DIM)
    assert torch.equal(layer.compact()(x), layer(x))


def test_tape_counts_once_under_activation_checkpointing() -> None:
    layer = make_layer()
    x = torch.randn(25, DIM, requires_grad=True)
    with record_routing(layer) as plain:
        layer(x)
    for reentrant in (True, False):
        with record_routing(layer) as tape:
            y = checkpoint(layer, x, use_reentrant=reentrant)
        y.sum().backward()
        assert len(tape[""]) == 1
        for got, expected in zip(tape[""][0].stats, plain[""][0].stats, strict=True):
            torch.testing.assert_close(got, expected)


def test_tape_of_a_layer_used_twice() -> None:
    layer = make_layer()
    with record_routing(nn.Sequential(layer)) as tape:
        layer(layer(torch.randn(5, DIM)))
    assert len(tape["0"]) == 2 and layer.tape is None


def test_statistics_by_hand() -> None:
    layer = make_layer()
    x_TD = torch.randn(60, DIM)
    mask_T = torch.arange(60) < 45
    with record_routing(layer) as tape:
        layer(x_TD, mask_T)
    stats = tape[""][0].stats
    routing = layer.router(x_TD[:45], layer.live)
    k = routing.mask_TE.sum(1).tolist()
    assert stats.load_E.tolist() == routing.mask_TE.sum(0).tolist()
    assert stats.k_hist.tolist() == [k.count(i) for i in range(4)]
    torch.testing.assert_close(stats.unserved_D, x_TD[:45][torch.tensor(k) == 0].sum(0))


def test_evaluation_statistics_count_tokens_before_the_fallback() -> None:
    layer = make_layer().eval()
    lost = -sum(layer.router.directions[e].data for e in layer.live)
    with record_routing(layer) as tape:
        layer(lost[None])
    stats = tape[""][0].stats
    assert stats.k_hist.tolist() == [1, 0, 0, 0] and stats.load_E.sum() == 1


def test_statistics_are_fp32_under_autocast() -> None:
    """The sum of unserved tokens over a window would stagnate in bf16."""
    layer = make_layer()
    x_TD = torch.randn(300, DIM)
    with record_routing(layer) as tape:
        layer(x_TD)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x_TD)
    plain, mixed = (call.stats.unserved_D for call in tape[""])
    assert mixed.dtype == torch.float32 and plain.any()
    assert torch.equal(mixed, plain)


def test_pool_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="num_experts"):
        make_layer(num_experts=6)


def test_router_factory_gets_the_pool_size() -> None:
    layer = make_layer(router=partial(TopKRouter, top_k=4), num_experts=4, max_experts=4)
    assert layer.router.num_slots == 4


def test_repr_says_which_experts_live() -> None:
    layer = make_layer()
    layer.remove_expert(1)
    assert "dim=12, experts [0, 2] of 5 slots alive" in repr(layer)
    assert "k=any of 5 slots" in repr(layer)


def test_input_of_another_width_is_refused() -> None:
    layer = MoELayer(nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8)), 8, TopAnyRouter, 2)
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 8\], found \[2, 4\]"):
        layer(torch.zeros(2, 4))


@pytest.mark.parametrize("router", ["topk", None, TopAnyRouter(DIM, 4), nn.Linear])
def test_a_router_that_is_none_is_refused(router: Any) -> None:
    with pytest.raises(TypeError, match=r"a Router class or a function .*TopKRouter"):
        MoELayer(make_mlp(), DIM, router, 4)


class Conditioned(nn.Module):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + condition


def test_an_ffn_that_needs_more_than_its_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Conditioned has forward\(x.*'condition'"):
        MoELayer(Conditioned(), DIM, TopAnyRouter, 4)
    with pytest.raises(TypeError, match="mlp: expected an FFN, an nn"):
        MoELayer(torch.relu, DIM, TopAnyRouter, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"torch.bool.*found torch.float32 of shape \[2, 3\]"),
        (torch.ones(2, 4) > 0, r"\[2, 3\] of \[2, 3, \d+\], found \[2, 4\]"),
        (torch.ones(3, 2) > 0, r"found \[3, 2\]"),
    ],
)
def test_a_mask_of_other_tokens_is_refused(mask: Tensor, message: str) -> None:
    layer = MoELayer(make_mlp(), DIM, TopAnyRouter, 4)
    with pytest.raises(ValueError, match=message), mask_padding(layer, mask):
        layer(torch.randn(2, 3, DIM))
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 3, DIM), mask)


def test_a_layer_is_printed_without_its_slots() -> None:
    lines = repr(MoELayer(make_mlp(), DIM, TopAnyRouter, 4, 24)).splitlines()
    assert len(lines) < 10 and "TopAnyRouter(k=any of 24 slots" in lines[1]

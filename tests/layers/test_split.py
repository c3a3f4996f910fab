"""One FFN split into experts: its parts add up, near neurons come together, EMoE's router."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import GluMlp
from torch import nn

from dynmoe.errors import ConfigError
from dynmoe.layers import AverageKeyRouter, CosineTopKRouter, MoELayer
from dynmoe.layers.experts import Experts, balanced_clusters, split_ffn
from dynmoe.layers.ffn import GatedFFN, PackedGatedFFN

DIM, HIDDEN = 8, 24


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x).relu() * self.up(x))


class OutputSecond(nn.Module):
    """As Llama's published code lists its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)
        self._modules = {name: self._modules[name] for name in ("w1", "w2", "w3")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class UpFirst(nn.Module):
    """A packed FFN of a class of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(DIM, 2 * HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.both(x).chunk(2, -1)
        return self.down(gate.relu() * up)


def packed(gate_first: bool) -> PackedGatedFFN:
    down = nn.Linear(HIDDEN, DIM, bias=False)
    return PackedGatedFFN(nn.Linear(DIM, 2 * HIDDEN), nn.SiLU(), down, 0.0, gate_first)


def make_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Dropout(0.0), nn.Linear(HIDDEN, DIM, bias=False)
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("how", ["cluster", "random"])
@pytest.mark.parametrize(
    "make", [make_mlp, Gated, partial(packed, True), partial(packed, False), OutputSecond]
)
def test_parts_add_up_to_the_ffn(make, how) -> None:  # type: ignore[no-untyped-def]
    mlp, x = make(), torch.randn(5, DIM)
    before = {key: value.clone() for key, value in mlp.state_dict().items()}
    parts = split_ffn(mlp, 6, how)
    assert len(parts) == 6
    for part in parts:
        halves = 1 + isinstance(mlp, PackedGatedFFN)
        first = next(m for m in part.modules() if isinstance(m, nn.Linear))
        assert first.out_features == len(first.weight) == 4 * halves
        assert sum(p.numel() for p in part.parameters()) * 6 == sum(
            p.numel() for p in mlp.parameters()
        )
    torch.testing.assert_close(sum(part(x) for part in parts), mlp(x))
    assert all(torch.equal(value, before[key]) for key, value in mlp.state_dict().items())


def test_random_parts_are_slices() -> None:
    mlp = make_mlp()
    second = split_ffn(mlp, 3, "random")[1]
    assert torch.equal(second[0].weight, mlp[0].weight[8:16])
    assert torch.equal(second[3].weight, mlp[3].weight[:, 8:16])


@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_one_matrix_are_gate_and_up(gate_first: bool) -> None:
    """As with two matrices: in values, in mean keys, and in clusters, which the gate decides."""
    one = packed(gate_first)
    first, second = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN)
    for half, linear in enumerate((first, second)):
        rows = slice(half * HIDDEN, (half + 1) * HIDDEN)
        linear.weight.data, linear.bias.data = one.gate_up.weight[rows], one.gate_up.bias[rows]
    gate, up = (first, second) if gate_first else (second, first)
    two, x = GatedFFN(gate, up, nn.SiLU(), one.down, 0.0), torch.randn(5, DIM)
    timms = GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=not gate_first)
    timms.fc1.load_state_dict(one.gate_up.state_dict())
    torch.testing.assert_close(one(x), two(x))
    keys = [Experts(mlp, 1).mean_keys([0]) for mlp in (one, two, timms)]
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[2], keys[1])
    for found, expected in zip(
        split_ffn(one, 3, "cluster"), split_ffn(two, 3, "cluster"), strict=True
    ):
        torch.testing.assert_close(found(x), expected(x))


def test_mean_keys_are_those_of_the_gate() -> None:
    experts = Experts(UpFirst(), 2)
    expected = [mlp.both.weight[HIDDEN:].mean(0) for mlp in experts.slots]
    torch.testing.assert_close(experts.mean_keys([0, 1]), torch.stack(expected))


def test_clusters_find_planted_directions_whatever_the_lengths() -> None:
    centres_ED = torch.eye(4, DIM)
    true_H = torch.randperm(40) % 4
    keys_HD = centres_ED[true_H] + 0.1 * torch.randn(40, DIM)
    groups_EN = balanced_clusters(keys_HD * torch.rand(40, 1).add(0.1), 4)
    assert groups_EN.flatten().sort().values.tolist() == list(range(40))
    assert sorted(true_H[group_N].unique().tolist() for group_N in groups_EN) == [
        [0],
        [1],
        [2],
        [3],
    ]


def test_clusters_have_equal_sizes_even_where_keys_crowd() -> None:
    keys_HD = torch.ones(20, DIM) + 1e-3 * torch.randn(20, DIM)
    keys_HD[0] = -1
    assert balanced_clusters(keys_HD, 5).shape == (5, 4)


def test_clusters_are_the_same_each_time_and_leave_the_seed_alone() -> None:
    keys_HD = torch.randn(30, DIM)
    state = torch.get_rng_state()
    first = balanced_clusters(keys_HD, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(balanced_clusters(keys_HD, 5), first)


@pytest.mark.parametrize("how", ["cluster", "random"])
def test_uneven_shares_are_refused(how) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="24 hidden neurons do not divide into 5 experts"):
        split_ffn(make_mlp(), 5, how)


@pytest.mark.parametrize(
    "mlp",
    [
        nn.Sequential(nn.Linear(DIM, 6), nn.GELU(), nn.Linear(6, DIM)),
        nn.Sequential(nn.Linear(DIM, 6), nn.LayerNorm(6), nn.Linear(6, DIM, bias=False)),
        nn.Sequential(nn.Linear(DIM, 12), nn.GLU(), nn.Linear(6, DIM, bias=False)),
    ],
    ids=["output bias", "norm", "two halves"],
)
def test_ffns_that_do_not_split_are_refused(mlp: nn.Module) -> None:
    with pytest.raises(ConfigError, match="without output bias, found Sequential"):
        split_ffn(mlp, 2, "random")


def test_average_keys_follow_the_experts() -> None:
    """The router scores by the weights of now, and no gradient reaches them through it."""
    router = partial(AverageKeyRouter, top_k=2, weights_sum="k")
    layer = MoELayer(make_mlp(), DIM, router, 6, init="cluster")
    x = torch.randn(50, DIM)
    layer(x).sum().backward()
    assert not list(layer.router.parameters()) and not any(
        "router" in k for k in layer.state_dict()
    )
    with torch.no_grad():
        for slot in layer.experts.slots:
            slot[0].weight.copy_(torch.randn_like(slot[0].weight))
    layer(x)
    keys_ED = torch.stack([slot[0].weight.mean(0) for slot in layer.experts.slots])
    routing = layer.router(x, layer.live)
    torch.testing.assert_close(routing.scores_TE, x @ keys_ED.t())
    assert not routing.scores_TE.requires_grad
    expected = routing.scores_TE.topk(2, dim=1).indices.sort(1).values
    assert torch.equal(routing.mask_TE.nonzero()[:, 1].view(-1, 2), expected)
    assert torch.equal(routing.weights_TE, routing.mask_TE.float())


@pytest.mark.parametrize("router", [CosineTopKRouter, AverageKeyRouter])
def test_weights_that_sum_to_k(router) -> None:  # type: ignore[no-untyped-def]
    one, k = (router(DIM, 6, top_k=3, weights_sum=total).eval() for total in ("one", "k"))
    k.load_state_dict(one.state_dict())
    x = torch.randn(9, DIM)
    weights_TE = one(x, range(6)).weights_TE
    torch.testing.assert_close(weights_TE.sum(1), torch.ones(9))
    torch.testing.assert_close(k(x, range(6)).weights_TE, 3 * weights_TE)

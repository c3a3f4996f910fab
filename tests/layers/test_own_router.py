"""A router of one's own is one class: trained, adapted, recorded, counted and exported as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from dynmoe.adaptation import RouterUpdates
from dynmoe.layers import (
    Experts,
    MoELayer,
    Router,
    Routing,
    StepTotals,
    TopKRouter,
    mask_padding,
    record_routing,
)
from dynmoe.layers.experts import naive_forward
from dynmoe.layers.routers import hide_padding
from dynmoe.metrics.efficiency import count, flops
from dynmoe.metrics.routing import RoutingMeter

DIM, TOKENS = 8, 40


class DotRouter(Router):
    """Experts whose row has a product above ``cut`` with a token, weighed by its sigmoid.

    Experts whose first matrix is all zeros never fire: an example of reading the experts.
    """

    adaptive = True

    def __init__(self, dim: int, num_slots: int, cut: float = 0.0) -> None:
        super().__init__()
        self.cut = cut
        self.rows = nn.ParameterList(nn.Parameter(torch.randn(dim)) for _ in range(num_slots))
        self.register_buffer("works_E", torch.ones(num_slots, dtype=torch.bool), persistent=False)

    def prepare(self, experts: Experts, live: Sequence[int]) -> None:
        self.works_E = experts.mean_keys(live).any(1)

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        scores_TE = x_TD.float() @ torch.stack([self.rows[slot] for slot in live]).t()
        mask_TE = hide_padding((scores_TE > self.cut) & self.works_E, token_mask_T)
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        weights_TE = scores_TE.sigmoid() * mask_TE
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, scores_TE.mean() ** 2, mask_TE)

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        return [self.rows[slot]]

    @torch.no_grad()
    def point(self, slot: int, direction_D: Tensor) -> None:
        self.rows[slot].copy_(direction_D)

    def keep(self, slots: Sequence[int]) -> None:
        self.rows = nn.ParameterList(self.rows[slot] for slot in slots)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": [self.cut for _ in live]}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0


@pytest.fixture
def layer() -> MoELayer:
    """Slots 0, 2 and 3 of 5 are alive."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(DIM, 12), nn.GELU(), nn.Linear(12, DIM))
    node = {"_target_": f"{__name__}.DotRouter", "_partial_": True, "cut": 0.5}  # as in conf/moe
    made = MoELayer(mlp, DIM, instantiate(node), 4, 5, init="fresh")
    made.remove_expert(1)
    return made


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def test_trained(layer: MoELayer, x_TD: Tensor) -> None:
    """A step moves what the living experts have, and nothing of empty slots."""
    assert layer.adaptive and isinstance(layer.router, DotRouter) and layer.router.cut == 0.5
    before = {slot: [p.clone() for p in layer.slot_parameters(slot)] for slot in range(5)}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with record_routing(layer) as tape:
        y_TD = layer(x_TD)
    routing = layer.router(x_TD, layer.live)
    torch.testing.assert_close(y_TD, naive_forward(layer.experts, x_TD, routing, layer.live))
    (y_TD.square().mean() + tape[""][0].aux).backward()
    optimizer.step()
    for slot, parameters in before.items():
        pairs = zip(parameters, layer.slot_parameters(slot), strict=True)
        assert {torch.equal(old, new) for old, new in pairs} == {slot not in layer.live}


def test_reads_the_experts_before_every_forward(layer: MoELayer, x_TD: Tensor) -> None:
    nn.init.zeros_(layer.experts.slots[2][0].weight)  # type: ignore[index]
    with record_routing(layer) as tape:
        layer(x_TD)
    load_E = tape[""][0].stats.load_E
    assert load_E[1] == 0 and load_E[0] > 0 and load_E[2] > 0


def test_adapted(layer: MoELayer) -> None:
    direction_D = torch.arange(DIM).float()
    layer.add_expert(1, direction_D, load={3: 1})
    assert layer.live == (0, 1, 2, 3)
    assert torch.equal(layer.slot_parameters(1)[0], direction_D)
    twin = layer.experts.slots[3]
    for new, old in zip(layer.slot_parameters(1)[1:], twin.parameters(), strict=True):
        assert torch.equal(new, old)


def test_recorded(layer: MoELayer, x_TD: Tensor) -> None:
    meter = RoutingMeter(model := nn.Sequential(layer))
    with record_routing(model) as tape:
        model(x_TD)
    meter.update("train", tape)
    (line,) = meter.records(["train"], reduce=lambda t: t)
    mask_TE = layer.router(x_TD, layer.live).mask_TE
    assert line["load"] == mask_TE.sum(0).tolist() and line["slots"] == [0, 2, 3]
    assert line["thresholds"] == [0.5, 0.5, 0.5]


def test_counted(layer: MoELayer, x_TD: Tensor) -> None:
    costs = count(nn.Sequential(layer), x_TD[None])
    sizes = {"expert": 2 * DIM * 12 + 12 + DIM, "router": DIM, "router_fixed": 0}
    assert costs["parameters"]["layers"] == {"0": sizes}
    expected = TOKENS * (1.5 * 4 * DIM * 12 + 3 * 2 * DIM)
    assert flops(costs, {"0": 3}, {"0": 1.5}) == expected


def test_exported(layer: MoELayer, x_TD: Tensor) -> None:
    small = layer.eval().compact()
    assert small.live == (0, 1, 2) and torch.equal(small(x_TD), layer(x_TD))
    assert len(small.router.rows) == 3  # type: ignore[arg-type]
    program = torch.export.export(small, (x_TD,))
    torch.testing.assert_close(program.module()(x_TD), layer(x_TD))


class Nearest(Router):
    """The least a router is: a forward."""

    def __init__(self, dim: int, num_slots: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(num_slots, dim))

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        scores_TE = x_TD @ self.rows.t()
        mask_TE = hide_padding(scores_TE == scores_TE.amax(1, keepdim=True), token_mask_T)
        unserved_T = torch.zeros(len(x_TD), dtype=torch.bool)
        aux = scores_TE.new_zeros(())
        return Routing(mask_TE.float(), mask_TE, scores_TE, unserved_T, aux, mask_TE)


def test_defaults_fit_a_fixed_pool(x_TD: Tensor) -> None:
    model = nn.Sequential(MoELayer(nn.Sequential(nn.Linear(DIM, DIM)), DIM, Nearest, 3))
    layer, meter = model[0], RoutingMeter(model)
    assert torch.equal(layer.compact()(x_TD), layer(x_TD))
    (line,) = meter.records(["train"], reduce=lambda t: t)
    assert line["thresholds"] is None
    costs = count(model, x_TD)
    assert costs["flops"] is None  # they are not known
    assert costs["parameters"]["layers"]["0"]["router_fixed"] == 3 * DIM


class Sequences(Router):
    """With state, and told of the sequences that its tokens are of."""

    takes_shape = True
    observes = 1

    def __init__(self, dim: int, num_slots: int) -> None:
        super().__init__()
        self.register_buffer("counted", torch.zeros(()))
        self.weight = nn.Parameter(torch.randn(num_slots, dim))

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Any = None, shape: Any = None
    ) -> Routing:
        scores_TE = x_TD @ self.weight.t()
        mask_TE = hide_padding(scores_TE > 0, token_mask_T)
        observed = torch.tensor([float(shape[0] if len(shape) > 1 else 0)])
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        aux = scores_TE.new_zeros(())
        return Routing(
            scores_TE * mask_TE, mask_TE, scores_TE, unserved_T, aux, mask_TE, observed=observed
        )

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        self.counted += own.observed[0]


def test_told_of_sequences_and_of_the_step(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MoELayer, "warns_of_still_state", True)
    layer = MoELayer(nn.Sequential(nn.Linear(DIM, DIM)), DIM, Sequences, 3)
    x_BND = torch.randn(2, 5, DIM)
    layer.eval()(x_BND)
    assert not caplog.messages
    for _ in range(2):
        layer.train()(x_BND)
    (text,) = caplog.messages
    assert "Sequences" in text and "RouterUpdates" in text and "RouterCallback" in text
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    updates = RouterUpdates(layer, optimizer)
    layer(x_BND)
    with mask_padding(layer, torch.ones(3, 5, dtype=torch.bool)):
        layer(x_BND.new_ones(15, DIM))  # a block that passes rows
    layer(x_BND[0]).sum().backward()
    optimizer.step()
    updates.step()
    assert layer.router.counted == 2 + 3 + 0 and len(caplog.messages) == 1


@pytest.mark.parametrize("router", [Nearest, partial(TopKRouter, top_k=1)])
def test_a_fixed_pool_takes_no_expert(router: Any) -> None:
    layer = MoELayer(nn.Linear(DIM, DIM), DIM, router, 2, 3 if router is Nearest else 2)
    with pytest.raises(ValueError, match="fixed pool of experts"):
        layer.add_expert(2, torch.ones(DIM))

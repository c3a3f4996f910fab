"""Token gradient conflict: one backward pass against golden values and a two-pass specification."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import cases
from processes import in_processes, join_group
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    AverageKeyRouter,
    BiasedTopKRouter,
    BlockFFNRouter,
    ConflictLoss,
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
    ZeroCostRouter,
    aux_loss,
    conflict_loss,
    mask_padding,
    moe_layers,
    record_routing,
)
from dynmoe.metrics.routing import TRAIN, RoutingMeter

DIM = 8


def mlp(dim: int = DIM, hidden: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Model(nn.Module):
    """Two residual MoE layers and a head."""

    def __init__(self, router: Any, weight: float, experts: Any = mlp, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        loss = ConflictLoss(weight, threshold=0.2)
        self.layers = nn.ModuleList(
            MoELayer(experts(), DIM, router, 4, init="fresh", conflict=loss) for _ in range(2)
        )
        self.layers[1].conflict = copy.copy(loss) if weight else None
        self.head = nn.Linear(DIM, 3)
        self.again = again
        for p in self.parameters():  # fresh experts hardly differ
            nn.init.normal_(p, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return self.head(x)


def batch() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(3)
    return torch.randn(2, 12, DIM, generator=make), torch.randint(3, (2, 12), generator=make)


def step(
    model: Model, scale: float = 1.0, real_BN: Tensor | None = None, taken: int | None = None
) -> dict[str, Tensor]:
    x, label = batch()
    torch.manual_seed(7)  # noise of routers
    with record_routing(model) as tape, mask_padding(model, real_BN):
        logits = model(x)
    if real_BN is not None:
        logits, label = logits[real_BN], label[real_BN]
    loss = F.cross_entropy(logits.flatten(0, -2), label.flatten()) + 0.01 * aux_loss(tape)
    (scale * (loss + conflict_loss(model, tape, taken))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def two_passes(router: Any, weight: float, real_BN: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients of all losses by the definition: pairs one by one, flags first."""
    model = Model(router, 0.0)
    runs: list[tuple[MoELayer, int, Tensor]] = []
    for layer in model.layers:
        for column, slot in enumerate(layer.live):
            layer.experts.slots[slot].register_forward_hook(partial(_kept, runs, layer, column))
        layer.experts.layout = None  # experts are called one by one
        layer.router.register_forward_hook(_remember)
    x, label = batch()
    torch.manual_seed(7)
    with record_routing(model) as tape, mask_padding(model, real_BN):
        logits = model(x)
    if real_BN is not None:
        logits, label = logits[real_BN], label[real_BN]
    loss = F.cross_entropy(logits.flatten(0, -2), label.flatten()) + 0.01 * aux_loss(tape)
    grads = torch.autograd.grad(loss, [out for *_, out in runs], retain_graph=True)
    for layer in model.layers:
        x_TD, routing = layer.router.last
        z_TC = layer.router.logits(x_TD.detach(), layer.live)
        terms = []
        for (owner, column, _), grad_ND in zip(runs, grads, strict=True):
            if owner is not layer:
                continue
            tokens = routing.dispatch_TE[:, column].nonzero().flatten().tolist()
            mean_D = grad_ND.mean(0)
            for t, grad_D in zip(tokens, grad_ND, strict=True):
                if not routing.mask_TE[t, column] or not grad_D.any():
                    continue
                if F.cosine_similarity(grad_D, mean_D, dim=0, eps=1e-20) < 0.2:
                    terms.append(-(-z_TC[t]).log_softmax(0)[column])
        if terms:
            loss = loss + weight * torch.stack(terms).mean()
        model.found = getattr(model, "found", 0) + len(terms)
    assert model.found  # else nothing would be compared
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _kept(runs: list[Any], layer: MoELayer, column: int, _: Any, __: Any, out: Tensor) -> None:
    runs.append((layer, column, out))


def _remember(router: Any, args: Any, out: Any) -> None:
    router.last = args[0], out


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, atol=2e-6, rtol=2e-5, msg=name)


ROUTERS = {
    "top_k": partial(TopKRouter, top_k=2),
    "cosine": partial(CosineTopKRouter, top_k=2, projection=6),
    "loss_free": partial(BiasedTopKRouter, top_k=2),
    "beam": partial(MaskedTopKRouter, top_k=2),
    "null": partial(NullExpertRouter, num_null=2, top_k=3),
    "prefix": partial(PrefixRouter, top_p=0.6, normalise_logits=True),
    "gemoe": GeMoERouter,
    "relu": ReLURouter,
    "block_ffn": BlockFFNRouter,
    "expert_choice": ExpertChoiceRouter,
    "threshold": ExpertThresholdRouter,
    "zero_cost": partial(ZeroCostRouter, gate_residual=False),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_one_backward_is_the_two_passes(router: Any) -> None:
    assert_equal(step(Model(router, 0.7)), two_passes(router, 0.7))


def test_padding_is_in_no_pair() -> None:
    real_BN = torch.arange(12) < torch.tensor([[12], [7]])
    router = ROUTERS["top_k"]
    assert_equal(step(Model(router, 0.7), 1.0, real_BN), two_passes(router, 0.7, real_BN))


def test_foreign_experts_recomputation_and_scale_change_nothing() -> None:
    router = ROUTERS["top_k"]
    one = Model(router, 0.7)
    expected = step(one)
    again = Model(router, 0.7, again=True)
    assert_equal(step(again), expected)
    device = torch.device("cpu")
    for layer, other in zip(one.layers, again.layers, strict=True):
        found = layer.conflict.take(device)
        assert found[0] == 48 and 0 < found[1] < 48  # 24 tokens, each with 2 experts, once
        assert torch.equal(other.conflict.take(device), found)
        assert not layer.conflict.take(device).any()
    foreign = Model(router, 0.7)
    for layer in foreign.layers:
        layer.experts.layout = None
    assert_equal(step(foreign), expected)
    # The share of one micro-batch in a step.
    quarter = step(Model(router, 0.7), 0.25)
    assert_equal({name: 4 * grad for name, grad in quarter.items()}, expected)


def test_weight_0_is_off() -> None:
    model, plain = Model(ROUTERS["top_k"], 0.0), Model(ROUTERS["top_k"], 0.0)
    for layer in plain.layers:
        assert layer.conflict is None
    off, expected = step(model), step(plain)
    assert all(torch.equal(off[name], expected[name]) for name in expected)


def test_only_due_steps_have_the_loss() -> None:
    loss = ConflictLoss(1.0, every=3, start=4)
    assert [step for step in range(12) if loss.is_due(step)] == [4, 7, 10]
    router, plain = ROUTERS["top_k"], step(Model(ROUTERS["top_k"], 0.0))
    late = Model(router, 0.7)
    for layer in late.layers:
        layer.conflict.start = 1
    found = step(late, taken=0)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert not late.layers[0].conflict.take(torch.device("cpu")).any()


@pytest.mark.parametrize("case", cases("stgc"), ids=lambda case: case["name"])
@pytest.mark.parametrize(
    ("proxy", "name", "flags"),
    [
        ("output", "cos_output_grad", "conflicting_by_output_grad"),
        ("bias", "cos_bias_grad", "conflicting_by_bias_grad"),
        ("full", "cos_full_weight_grad", "conflicting_by_full_grad"),
    ],
)
def test_golden(case: dict[str, Any], proxy: Any, name: str, flags: str) -> None:
    weights = [torch.tensor(case[key]) for key in ("W1_EHD", "b1_EH", "W2_EDH")]
    experts = []
    for w1, b1, w2 in zip(*weights, strict=True):
        expert = mlp(w1.shape[1], w1.shape[0])
        values = {"0.weight": w1, "0.bias": b1, "2.weight": w2, "2.bias": torch.zeros(len(w2))}
        expert.load_state_dict(values)
        experts.append(expert)
    x_TD, head = torch.tensor(case["x_TD"]), torch.tensor(case["head_CD"])
    loss = ConflictLoss(1.0, case["tau"], proxy)
    router = partial(TopKRouter, top_k=case["top_k"])
    layer = MoELayer(experts, x_TD.shape[1], router, len(experts), conflict=loss)
    layer.router.weight.data = torch.tensor(case["router_ED"])
    grads = []
    for wanted in (False, True):
        with record_routing(layer) as tape:
            y_TD = x_TD + layer(x_TD)
        main = F.cross_entropy(y_TD @ head.t(), torch.tensor(case["label_T"]))
        assert main.item() == pytest.approx(case["main_loss"], abs=1e-5)
        layer.zero_grad()
        (main + conflict_loss(layer, tape) if wanted else main).backward()
        grads.append(layer.router.weight.grad.clone())

    flags_TE, expected = torch.zeros(len(x_TD), len(experts)), 0.0
    for each in case["experts"]:
        flags_TE[each["tokens"], each["expert"]] = torch.tensor(each[flags], dtype=torch.float)
        expected += sum(each[name])
    pairs, flagged, cosine = loss.take(torch.device("cpu")).tolist()
    assert (pairs, flagged) == (len(x_TD) * case["top_k"], flags_TE.sum().item())
    assert cosine == pytest.approx(expected, abs=1e-4)
    grad_TE = by_hand(torch.tensor(case["logits_TE"]), flags_TE)
    torch.testing.assert_close(grads[1] - grads[0], grad_TE.t() @ x_TD, atol=1e-5, rtol=0)
    if proxy == "bias":
        stored_TE = torch.tensor(case["loss_cel_grad_logits_TE"])
        torch.testing.assert_close(grad_TE, stored_TE, atol=1e-5, rtol=0)


@pytest.mark.parametrize("proxy", ["bias", "full"])
@pytest.mark.parametrize("again", [False, True])
def test_proxies_see_what_autograd_does(proxy: Any, again: bool) -> None:
    """Of single pairs, whose gradients by all linear layers are asked for one by one."""
    plain, model = Model(ROUTERS["top_k"], 0.0), Model(ROUTERS["top_k"], 0.7, again=again)
    for layer in model.layers:
        layer.conflict.proxy = proxy
    step(model)
    found = [layer.conflict.take(torch.device("cpu")) for layer in model.layers]

    rows: dict[tuple[int, int], list[Any]] = {}
    for number, layer in enumerate(plain.layers):
        layer.experts.layout = None
        for slot, expert in enumerate(layer.experts.slots):
            for linear in (expert[0], expert[2]):
                linear.register_forward_hook(partial(_seen, rows.setdefault((number, slot), [])))
    step(plain)
    for number, found_3 in enumerate(found):
        cosine_sum, conflicts, pairs = 0.0, 0, 0
        for slot in range(4):
            parts = []
            for x_NI, grads in rows[number, slot]:
                grad_NO = grads[0]
                parts.append(grad_NO)
                if proxy == "full":
                    parts.append((grad_NO[:, :, None] * x_NI[:, None]).flatten(1))
            if parts:
                each = torch.cat(parts, 1)
                cosine_N = F.cosine_similarity(each, each.mean(0, keepdim=True), dim=1)
                cosine_sum += cosine_N.sum().item()
                conflicts, pairs = conflicts + int((cosine_N < 0.2).sum()), pairs + len(each)
        assert found_3[:2].tolist() == [pairs, conflicts] and pairs == 48
        assert found_3[2].item() == pytest.approx(cosine_sum, abs=1e-4)


def _seen(rows: list[Any], _: Any, args: Any, out: Tensor) -> None:
    rows.append((args[0].detach(), []))
    out.register_hook(rows[-1][1].append)


def test_equal_tokens_do_not_conflict() -> None:
    layer = MoELayer(mlp(), DIM, ROUTERS["top_k"], 4, conflict=ConflictLoss())
    with record_routing(layer) as tape:
        y = layer(torch.ones(6, DIM))
    (y.sum() + conflict_loss(layer, tape)).backward()
    pairs, flagged, cosine = layer.conflict.take(torch.device("cpu")).tolist()
    assert (pairs, flagged) == (12, 0)
    assert cosine == pytest.approx(12)


@pytest.mark.parametrize("router", [TopAnyRouter, AverageKeyRouter, ZeroCostRouter])
def test_a_router_without_logits_is_refused(router: Any) -> None:
    options = {"top_k": 2} if router is AverageKeyRouter else {}
    with pytest.raises(ConfigError, match=r"moe.conflict.weight.*logits.*moe=topk"):
        MoELayer(mlp(), DIM, partial(router, **options), 4, conflict=ConflictLoss())


def test_a_proxy_that_sees_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe.conflict.proxy.*Set it to output"):
        MoELayer(nn.Tanh(), DIM, ROUTERS["top_k"], 4, conflict=ConflictLoss(proxy="bias"))


def test_every_layer_of_a_model_counts_its_own() -> None:
    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=DIM, depth=2, num_heads=1, num_classes=3
    )
    add_moe_layers(
        vit,
        router=ROUTERS["top_k"],
        num_experts=4,
        max_experts=4,
        layers="all",
        init="copy",
        conflict={"weight": 0.5, "proxy": "bias"},
    )
    with record_routing(vit) as tape:
        logits = vit(torch.randn(2, 3, 8, 8))
    (logits.sum() + conflict_loss(vit, tape)).backward()
    pairs = []
    for layer in moe_layers(vit).values():
        assert layer.conflict is not None and layer.conflict.weight == 0.5
        pairs.append(layer.conflict.take(torch.device("cpu"))[0].item())
    # Of 2 images of 5 tokens, 2 experts each; the last layer serves the class token alone.
    assert pairs == [20, 4]


@pytest.mark.parametrize(
    "options", [{"weight": -1.0}, {"threshold": 2.0}, {"proxy": "x"}, {"every": 0}, {"start": -1}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"moe.conflict.*{next(iter(options))}"):
        ConflictLoss(**options)


def test_the_share_of_a_stretch_is_recorded() -> None:
    model = Model(ROUTERS["top_k"], 0.7)
    meter = RoutingMeter(model)
    meter.update(TRAIN, {})
    step(model)
    layers = {f"layers.{i}": layer.conflict._found_3 for i, layer in enumerate(model.layers)}
    for record in meter.records([TRAIN], lambda sums: 2 * sums):  # two equal ranks
        pairs, flagged, cosine = layers[record["layer"]].tolist()
        assert record["conflict_share"] == flagged / pairs
        assert record["conflict_cosine"] == pytest.approx(cosine / pairs)
    for record in meter.records([TRAIN, "dev"], lambda sums: sums):
        assert record.get("conflict_share") is None
        assert ("conflict_share" in record) == (record["source"] == TRAIN)


def test_low_precision_keeps_the_loss_in_fp32() -> None:
    model = Model(ROUTERS["top_k"], 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = step(model)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert model.layers[0].conflict.take(torch.device("cpu"))[0] == 48


def _rank(rank: int, ranks: int, port: int, folder: str) -> None:
    join_group(rank, ranks, port)
    model = Model(ROUTERS["top_k"], 0.7)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    x, label = batch()
    with record_routing(model) as tape:
        logits = parallel(x[rank : rank + 1])
    loss = F.cross_entropy(logits[0], label[rank])
    (loss + conflict_loss(model, tape)).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_find_conflicts_of_their_own_and_average(tmp_path: Path) -> None:
    in_processes(_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    own = []
    for rank in (0, 1):
        model = Model(ROUTERS["top_k"], 0.7)
        x, label = batch()
        with record_routing(model) as tape:
            logits = model(x[rank : rank + 1])
        (F.cross_entropy(logits[0], label[rank]) + conflict_loss(model, tape)).backward()
        own.append([p.grad for p in model.parameters()])
    for a, b, one, two in zip(first, second, *own, strict=True):
        zero = torch.zeros_like(a)
        mean = ((zero if one is None else one) + (zero if two is None else two)) / 2
        assert torch.equal(a, b)
        torch.testing.assert_close(a, mean, atol=1e-6, rtol=1e-5)


def by_hand(z_TE: Tensor, flags_TE: Tensor) -> Tensor:
    """The gradient of the mean of ``-log softmax(-z_t)[e]`` over flagged pairs."""
    z_TE = z_TE.clone().requires_grad_()
    loss = -((-z_TE).log_softmax(1) * flags_TE).sum() / flags_TE.sum().clamp(min=1)
    return torch.autograd.grad(loss, z_TE)[0]

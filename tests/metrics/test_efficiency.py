"""The formulas against the model's own parameters, its routing, and PyTorch's FLOP counter."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.vision import build_vit
from dynmoe.layers import (
    CosineTopKRouter,
    MoELayer,
    Routing,
    TopAnyRouter,
    TopKRouter,
    ZeroCostRouter,
    moe_layers,
    record_routing,
)
from dynmoe.metrics.efficiency import activated, count, exported, flops, total
from dynmoe.runtime import set_fused_attention

DIM, PX, BATCH = 16, 28, 6
SMALL = {"patch_size": 7, "embed_dim": DIM, "depth": 4, "num_heads": 2}


def vit(model: str = "vit_tiny_patch16_224", mlp_ratio: float = 4.0, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    backbone = build_vit(model, 5, 1, PX, options={**SMALL, "mlp_ratio": mlp_ratio}, **kwargs)
    set_fused_attention(backbone, False)  # PyTorch's counter does not know the fused one of CPUs
    return backbone


def with_moe(
    backbone: nn.Module, router: Callable[..., nn.Module], experts: int, shared: int = 0
) -> nn.Module:
    """MoE layers in blocks 1 and 3. Top-any has an empty slot in one, another in the other, and
    thresholds that leave tokens unserved."""
    adaptive = router is TopAnyRouter
    options: Any = {"layers": [1, 3], "init": "fresh", "shared_experts": shared}
    slots = experts + adaptive
    add_moe_layers(backbone, router=router, num_experts=experts, max_experts=slots, **options)
    if adaptive:
        first, second = moe_layers(backbone).values()
        first.remove_expert(1)
        second.add_expert(experts, torch.ones(DIM), "mean")
        for layer in (first, second):
            for threshold in layer.router.thresholds:
                nn.init.constant_(threshold, 0.2)
    return backbone


def uneven() -> Any:
    """FFNs of another size in every block."""
    backbone = vit()
    for index, block in enumerate(backbone.blocks):
        block.mlp = Mlp(DIM, 24 + 8 * index)
    return backbone


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": vit,
    "dynmoe": lambda: with_moe(vit(drop_path=0.1), TopAnyRouter, 4),
    "top-1 of 4": lambda: with_moe(vit(), partial(TopKRouter, top_k=1), 4),
    "top-2 of 4": lambda: with_moe(vit(), partial(TopKRouter, top_k=2), 4),
    "gmoe": lambda: with_moe(vit(), CosineTopKRouter, 6),
    "gmoe with capacity": lambda: with_moe(vit(), partial(CosineTopKRouter, capacity_factor=1), 6),
    "two shared experts": lambda: with_moe(vit(), partial(TopKRouter, top_k=2), 4, shared=2),
    "zero-cost experts": lambda: with_moe(vit(), ZeroCostRouter, 4),
    "uneven blocks": lambda: with_moe(uneven(), TopAnyRouter, 4),
    "recomputed blocks": lambda: with_moe(vit(grad_checkpointing=True), TopAnyRouter, 4),
    "sparse tokens, adapters": lambda: with_moe(
        vit(token_sparsify={"keep": 0.5, "blocks": [1]}, adapter={"dim": 4}), TopAnyRouter, 4
    ),
    "SwiGLU, LayerScale": lambda: with_moe(vit("vit_giant_patch14_dinov2"), TopAnyRouter, 4),
}


@pytest.fixture(autouse=True)
def no_padding() -> Iterator[None]:
    """At "highest" no row is computed in vain (`grouped.row_multiple`)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(params=MODELS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> nn.Module:
    return MODELS[name]().eval()


@pytest.fixture(scope="module")
def costs(name: str) -> dict[str, Any]:
    return count(MODELS[name]().eval(), torch.zeros(1, 1, PX, PX))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(BATCH, 1, PX, PX, generator=torch.Generator().manual_seed(1))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def living(model: nn.Module) -> dict[str, int]:
    return {name: len(layer.live) for name, layer in moe_layers(model).items()}


def masks_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The pairs of one pass, from the routers themselves."""
    masks: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, routing: Routing) -> None:
        masks[name] = routing.mask_TE

    hooks = [
        layer.router.register_forward_hook(partial(keep, name))
        for name, layer in moe_layers(model).items()
    ]
    torch.manual_seed(2)
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return masks


def mean_k(masks: dict[str, Tensor]) -> dict[str, float]:
    return {name: int(mask.sum()) / len(mask) for name, mask in masks.items()}


def gram(model: nn.Module) -> int:
    """The product of directions in top-any's auxiliary loss, which the formula leaves out."""
    layers = moe_layers(model).values()
    return sum(2 * len(m.live) ** 2 * DIM for m in layers if isinstance(m.router, TopAnyRouter))


def test_parameters_are_the_models(model: nn.Module, costs: dict[str, Any]) -> None:
    experts = living(model)
    assert total(costs) == size(model)
    for name, layer in moe_layers(model).items():
        model.set_submodule(name, layer.compact())
    assert exported(costs, experts) == size(model)


def test_activated_parameters_token_by_token(
    model: nn.Module, costs: dict[str, Any], images: Tensor
) -> None:
    """What lies outside, the living experts' routers, and the chosen experts' FFNs."""
    experts, masks = living(model), masks_of(model, images)
    used = float(size(model) - sum(map(size, moe_layers(model).values())))
    for name, layer in moe_layers(model).items():
        slots = layer.experts.slots
        chosen = [
            sum(size(slots[layer.live[e]]) for e in row.nonzero().flatten()) for row in masks[name]
        ]
        used += size(layer.compact().router) + size(layer.shared) + sum(chosen) / len(chosen)
    assert activated(costs, experts, mean_k(masks)) == pytest.approx(used, rel=1e-12)


def test_flops_of_a_forward_pass(model: nn.Module, costs: dict[str, Any], images: Tensor) -> None:
    k = mean_k(masks_of(model, images))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    by_formula = flops(costs, living(model), k)
    assert by_formula is not None
    assert BATCH * by_formula == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_flops_of_a_training_step(model: nn.Module, costs: dict[str, Any], images: Tensor) -> None:
    """Three times the forward pass, but for the gradient of the images, which nobody needs."""
    if getattr(model, "grad_checkpointing", False):
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    model.train()
    k = mean_k(masks_of(model, images))
    torch.manual_seed(2)
    with FlopCounterMode(display=False) as counter:
        with record_routing(model) as tape:
            logits = model(images)
        loss = F.cross_entropy(logits, torch.arange(BATCH) % 5)
        (loss + sum(call.aux for calls in tape.values() for call in calls)).backward()
    by_formula = flops(costs, living(model), k)
    assert by_formula is not None
    patches = 2 * BATCH * (PX // 7) ** 2 * 7**2 * DIM
    tokens = sum(layer["tokens"] for layer in costs["flops"]["layers"].values())
    unserved = 2 * BATCH * tokens * DIM  # on the tape, `RoutingStats`
    expected = 3 * (BATCH * by_formula + gram(model)) - patches + unserved
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_flops_by_hand() -> None:
    """A block of DeiT-S, and the GMoE layer in place of its FFN."""
    deit = build_vit("deit_small_patch16_224", num_classes=7, options={"depth": 1})
    images = torch.empty(1, 3, 224, 224)
    tokens, dim = 197, 384
    ffn = 2 * 2 * dim * 4 * dim
    attention = tokens * 2 * dim * 4 * dim + 2 * 2 * tokens**2 * dim
    outside = attention + 2 * 196 * 3 * 16**2 * dim + 2 * dim * 7
    assert flops(count(deit, images), {}, {}) == outside + tokens * ffn
    options: Any = {"router": CosineTopKRouter, "layers": [0], "init": "copy"}
    add_moe_layers(deit, num_experts=6, max_experts=6, **options)
    router = {"router": 2 * 256, "router_fixed": 2 * dim * 256}
    layers = {"blocks.0.mlp": {"tokens": tokens, "expert": ffn, **router}}
    assert count(deit, images)["flops"] == {"other": outside, "layers": layers}


def test_the_copy_kept_for_new_experts_is_no_part_of_the_model() -> None:
    layer = MoELayer(Mlp(DIM, 32), DIM, TopAnyRouter, 2, keep_origin=True)
    model = nn.Sequential(nn.Linear(8, DIM), layer)
    assert layer.origin is not None
    assert total(count(model, torch.empty(1, 8))) == size(model) - size(layer.origin)


def test_counting_changes_nothing(images: Tensor) -> None:
    model = with_moe(vit(drop_path=0.1), TopAnyRouter, 4).train()
    model.blocks[0].eval()  # type: ignore[index, union-attr]
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    live = [layer.live for layer in moe_layers(model).values()]
    with record_routing(model) as tape:
        model(images)
        taped = {name: list(calls) for name, calls in tape.items()}
        state = torch.get_rng_state()
        count(model, images[:1])
        assert torch.equal(torch.get_rng_state(), state)
        assert all(tape[name] is layer.tape for name, layer in moe_layers(model).items())
    assert all(len(calls) == 1 and calls[0] is taped[name][0] for name, calls in tape.items())
    assert [m.training for m in model.modules()] == modes
    assert [layer.live for layer in moe_layers(model).values()] == live
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_flops_of_pytorchs_own_attention() -> None:
    """It takes a fast path in evaluation, which PyTorch's counter does not see."""
    model = nn.Sequential(nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True)).eval()
    square, products, ffn = 4 * 2 * 3 * DIM * DIM, 4 * 3**2 * DIM, 2 * 2 * 3 * DIM * 32
    expected = {"other": square + products + ffn, "layers": {}}
    assert count(model, torch.empty(1, 3, DIM))["flops"] == expected


class OwnRouter(TopKRouter):
    def flops(self, dim: int) -> None:
        """Not known."""


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model",
    [
        MoELayer(Mlp(DIM, 32), DIM, OwnRouter, 2),
        Branching(DIM, DIM),
    ],
    ids=lambda model: type(model).__name__,
)
def test_no_flops_where_a_formula_is_missing(model: nn.Module) -> None:
    costs = count(nn.Sequential(model), torch.empty(1, 3, DIM))
    assert costs["flops"] is None and flops(costs, {}, {}) is None
    assert total(costs) == size(model)


def test_reports_need_no_torch_for_the_formulas() -> None:
    code = "import sys, dynmoe.metrics.efficiency; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"

"""ViTs with MoE layers: published sizes, the pretrained function at the start, weight files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from dynmoe.backbones.surgery import add_moe_layers, placed_blocks
from dynmoe.backbones.vision import build_vit
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    AverageKeyRouter,
    BudgetTopAnyRouter,
    CosineTopKRouter,
    TopAnyRouter,
    TopKRouter,
    moe_layers,
)
from dynmoe.metrics.efficiency import count

SMALL = {"patch_size": 7, "embed_dim": 16, "depth": 4, "num_heads": 2}


def small_vit(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return build_vit("vit_tiny_patch16_224", 5, 1, 28, options=SMALL, **kwargs)  # type: ignore[arg-type]


def add(vit: nn.Module, **kwargs: object) -> None:
    options = {
        "router": TopAnyRouter,
        "num_experts": 3,
        "max_experts": 4,
        "layers": "last_two",
        "init": "copy",
        **kwargs,
    }
    add_moe_layers(vit, **options)  # type: ignore[arg-type]


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts() -> None:
    """GMoE-S/16 (Li et al. 2023): DeiT-S/16 with six experts in blocks 8 and 10."""
    vit = build_vit("deit_small_patch16_224", num_classes=7)
    assert size(vit) == 21_668_359
    assert size(vit) - size(vit.head) == 21_665_664
    add(vit, router=CosineTopKRouter, num_experts=6, max_experts=6, layers="every_two")
    assert size(vit) == 33_684_233
    assert size(vit) - size(vit.head) == 33_681_538
    assert list(moe_layers(vit)) == ["blocks.8.mlp", "blocks.10.mlp"]
    counts = count(vit, torch.empty(1, 3, 224, 224))["parameters"]["layers"]["blocks.8.mlp"]
    assert counts == {"expert": 1_181_568, "router": 0, "router_fixed": 100_097}


@pytest.mark.parametrize(
    ("layers", "depth", "blocks"),
    [
        ("every_two", 12, [8, 10]),
        ("last_two", 12, [10, 11]),
        ("all", 3, [0, 1, 2]),
        ("none", 12, []),
        ([5, 2], 6, [2, 5]),
    ],
)
def test_placement(layers: object, depth: int, blocks: list[int]) -> None:
    assert placed_blocks(layers, depth) == blocks  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [[12], "every_two"])
def test_blocks_that_are_not_there(layers: object) -> None:
    with pytest.raises(ConfigError, match="the backbone has 3 blocks, 0 to 2"):
        placed_blocks(layers, 3)  # type: ignore[arg-type]


def test_vit_of_copies_starts_at_the_dense_function() -> None:
    """Thresholds below every score: all experts serve every token, and their mean is the FFN."""
    dense, sparse = small_vit().eval(), small_vit().eval()
    add(sparse)
    for layer in moe_layers(sparse).values():
        for threshold in layer.router.thresholds:
            threshold.data.fill_(-2.0)
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("init", ["cluster", "random"])
def test_all_parts_together_are_the_dense_vit(init: str) -> None:
    dense, sparse = small_vit(), small_vit()
    for vit in (dense.eval(), sparse):
        for block in vit.blocks:
            nn.init.constant_(block.mlp.fc2.bias, 0.1)
    router = partial(AverageKeyRouter, top_k=8, weights_sum="k")
    add(sparse, router=router, num_experts=8, max_experts=8, init=init, expert_dropout=0.1)
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(sparse.eval()(x), dense(x))
    assert size(sparse) == size(dense)


# Gate and up apart, in one matrix with the gate first, both with biases or not; norms inside.
GATED = {
    "vit_small_plus_patch16_dinov3": ("SwiGLU", True),
    "vit_giant_patch14_reg4_dinov2": ("GluMlp", True),
    "aimv2_large_patch14_224": ("SwiGLU", True),
    "eva02_tiny_patch14_224": ("GluMlp", True),
    "eva02_base_patch14_224": ("SwiGLU", False),
    "beit3_base_patch16_224": ("Mlp", False),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_vits(name: str) -> None:
    """Copies, parts, and a dropout inside experts that acts once, before their last matrix."""
    torch.manual_seed(0)
    options = {"patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 4}
    dense = build_vit(name, 5, 1, 28, options=options).eval()
    for key, parameter in dense.named_parameters():
        if key.endswith(("bias", "gamma_1", "gamma_2", ".gamma")):
            nn.init.normal_(parameter, std=0.5)  # the FFNs would hardly have a say
    copies, parts = copy.deepcopy(dense), copy.deepcopy(dense)
    x = torch.randn(3, 1, 28, 28)
    expected = dense(x)
    kind, splits = GATED[name]
    router = partial(TopKRouter, top_k=2)
    add(copies, router=router, layers=[0, 2], num_experts=4, expert_dropout=0.1)
    torch.testing.assert_close(copies(x), expected, atol=1e-5, rtol=1e-5)
    layers = moe_layers(copies)
    assert list(layers) == ["blocks.0.mlp", "blocks.2.mlp"]
    assert all(type(mlp).__name__ == kind for mlp in layers["blocks.0.mlp"].experts.slots)
    assert [m.p for m in copies.modules() if isinstance(m, nn.Dropout) and m.p > 0] == [0.1] * 8
    copies(x).sum().backward()
    assert all(any(p.grad is not None for p in layer.parameters()) for layer in layers.values())

    router, make = partial(AverageKeyRouter, top_k=4, weights_sum="k"), partial(add, parts)
    make = partial(make, router=router, layers=[0, 2], num_experts=4, init="random")
    if not splits:
        with pytest.raises(ConfigError, match=r"moe.init.*LayerNorm inside.*moe.init=copy"):
            make()
        return
    make(expert_dropout=0.1)
    assert size(parts) == size(dense)
    torch.testing.assert_close(parts(x), expected, atol=1e-5, rtol=1e-5)
    assert [m.p for m in parts.modules() if isinstance(m, nn.Dropout) and m.p > 0] == [0.1] * 8
    assert set(moe_layers(parts)) == {"blocks.0.mlp.moe", "blocks.2.mlp.moe"}


def test_blocks_whose_ffn_is_not_apart_are_refused() -> None:
    vit = build_vit("vit_base_patch16_xp_224", 5, 1, 28, options=SMALL)
    with pytest.raises(ConfigError, match=r"attention share a matrix.*docs/models.md.*moe=dense"):
        add(vit)


def test_expert_dropout_acts_after_the_activation_of_experts_only() -> None:
    vit = small_vit()
    add(vit, expert_dropout=0.1)
    assert [m.p for m in vit.modules() if isinstance(m, nn.Dropout) and m.p > 0] == [0.1] * 8
    assert moe_layers(vit)["blocks.2.mlp"].experts.slots[0].drop1.p == 0.1


def test_pretrained_from_a_file_with_other_size_and_classes(tmp_path: Path) -> None:
    donor = small_vit()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(donor.state_dict(), file)
    vit = build_vit("vit_tiny_patch16_224", 3, 1, 35, pretrained=str(file), options=SMALL)
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, donor.blocks[1].mlp.fc1.weight)
    assert vit(torch.randn(2, 1, 35, 35)).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("vit_smal_patch16_224", False, "backbone.model=vit_smal_patch16_224: timm knows no such"),
        ("resnet18", False, "a Vision Transformer with blocks is needed"),
        ("swin_tiny_patch4_window7_224", False, "a Vision Transformer with blocks is needed"),
        ("vit_tiny_patch16_224", "{tmp}/wrong.pth", "could not be loaded"),
    ],
)
def test_refused_backbones(
    model: str, pretrained: bool | str, message: str, tmp_path: Path
) -> None:
    if isinstance(pretrained, str):
        pretrained = pretrained.format(tmp=tmp_path)
        torch.save({"blocks.0.mlp.fc1.weight": torch.zeros(3, 3)}, pretrained)
    with pytest.raises(ConfigError, match=message):
        build_vit(model, 7, 3, 224, pretrained=pretrained)


def test_expert_dropout_null_keeps_the_backbones_own() -> None:
    vit = build_vit("vit_tiny_patch16_224", 5, 1, 28, options={**SMALL, "proj_drop_rate": 0.2})
    add(vit)
    assert moe_layers(vit)["blocks.2.mlp"].experts.slots[0].drop1.p == 0.2


def test_blocks_without_an_ffn_are_refused() -> None:
    mixer = build_vit("mixer_s16_224", num_classes=5)
    with pytest.raises(ConfigError, match="block 6 of MlpMixer has no FFN"):
        add(mixer)


def test_routers_can_be_partials() -> None:
    vit = small_vit()
    add(vit, router=partial(CosineTopKRouter, top_k=2, projection=4), max_experts=3)
    assert vit(torch.randn(2, 1, 28, 28)).shape == (2, 5)


def test_one_target_for_each_layer() -> None:
    vit = small_vit()
    add(vit, router=partial(BudgetTopAnyRouter, target_k=[1.5, 2]))
    assert [layer.router.target_k for layer in moe_layers(vit).values()] == [1.5, 2.0]
    with pytest.raises(ConfigError, match=r"target_k: expected one number, or 2, .* found 3"):
        add(small_vit(), router=partial(BudgetTopAnyRouter, target_k=[1.5, 2, 2]))


def test_options_that_a_router_refuses() -> None:
    with pytest.raises(ConfigError, match=r"moe.router: target_k is 9: .* of slots, 4"):
        add(small_vit(), router=partial(BudgetTopAnyRouter, target_k=9))

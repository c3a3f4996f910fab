"""Sparse tokens and dense adapters in ViTs: the official code's values, and invariants."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dynmoe.backbones.sparse import DenseAdapter, SparseBlock, TokenSparsifier, token_counts
from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.vision import build_vit
from dynmoe.errors import ConfigError
from dynmoe.layers import TopAnyRouter, TopKRouter, moe_layers, record_routing
from dynmoe.metrics import efficiency

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sparse_tuning.json").read_text())["cases"]
CASES = {case["name"]: case for case in GOLDEN}
SMALL = {"patch_size": 7, "embed_dim": 16, "depth": 4, "num_heads": 2}
KEEP = {"keep": 0.5, "blocks": [1, 3]}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    return build_vit(name, 5, 1, 28, options={**SMALL, **options.pop("options", {})}, **options)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def official(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name.replace("adaptmlp", "adapter"): torch.tensor(value)
        for name, value in parameters.items()
    }


# The official code.


def test_the_adapter_is_the_official_one() -> None:
    case = CASES["dense adapter"]
    adapter = DenseAdapter(*case["dims"])
    adapter.load_state_dict(official(case["parameters"]))
    torch.testing.assert_close(
        adapter(torch.tensor(case["x_BND"])), torch.tensor(case["out_BND"]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("fused_attention", [False, True])
@pytest.mark.parametrize("name", ["prune and fuse", "prune, no fuse"])
def test_the_block_is_the_official_one(name: str, fused_attention: bool) -> None:
    case = CASES[name]
    norm = partial(nn.LayerNorm, eps=1e-6)
    inner = Block(case["dim"], case["heads"], mlp_ratio=1.0, qkv_bias=True, norm_layer=norm)
    sparsifier = TokenSparsifier(inner.attn, 1, case["keep_rate"], case["fuse"])
    block = SparseBlock(inner, sparsifier)
    block.adapter = DenseAdapter(case["dim"], 4, 2)
    block.load_state_dict(official(case["parameters"]))
    block.attn.fused_attn = fused_attention
    expected = torch.tensor(case["out_BND"])
    x_BND = block.eval()(torch.tensor(case["x_BND"]))
    assert x_BND.shape[1] == case["tokens_out"]
    torch.testing.assert_close(x_BND, expected, atol=1e-5, rtol=1e-5)


def test_the_whole_model_is_the_official_one() -> None:
    case = CASES["whole ViT"]
    sizes = {"patch_size": case["patch"], "embed_dim": case["dim"], "num_heads": case["heads"]}
    model = build_vit(
        *("vit_tiny_patch16_224", 3, 3, case["img_size"]),
        token_sparsify={"keep": 0.7},
        adapter={"dim": 4, "inner": 2, "link_embeddings": True, "link_last": False},
        options={**sizes, "depth": case["depth"], "mlp_ratio": case["mlp_ratio"]},
    )
    model.load_state_dict(official(case["parameters"]))
    image = torch.tensor(case["image_BCHW"])
    features = model.eval().forward_features(image)[:, 0]
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    close(features, torch.tensor(case["features_BD"]))
    close(model(image), torch.tensor(case["logits_BC"]))
    assert token_counts(model) == [1 + n for n in case["tokens_after_block_without_cls"]]


# A naive version: whole attention matrices, complements by sets.


def naive(model: Any, image: Tensor, embeds: bool, last: bool) -> Tensor:
    """One image through a model with adapters and links, block by block."""
    x_ND = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    linked = [x_ND] if embeds else []
    prefix = model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        attn = block.attn
        normed_ND = block.norm1(x_ND)
        q, k, v = (
            part.reshape(len(x_ND), attn.num_heads, -1).transpose(0, 1)
            for part in attn.qkv(normed_ND).chunk(3, dim=-1)
        )
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights_HNN = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        x_ND = x_ND + block.ls1(attn.proj((weights_HNN @ v).transpose(0, 1).reshape(x_ND.shape)))
        if block.sparsifier is not None:
            score_P = weights_HNN.mean(0)[0, prefix:]
            order = score_P.argsort(descending=True).tolist()
            kept = math.ceil(block.sparsifier.keep * len(order))
            patch_PD, others = x_ND[prefix:], order[kept:]
            rows = [*x_ND[:prefix], *(patch_PD[i] for i in order[:kept])]
            if others and block.sparsifier.fuse:
                rows.append(sum(score_P[i] * patch_PD[i] for i in others))
            x_ND = torch.stack(rows)
        adapted_ND = block.adapter(x_ND)
        x_ND = x_ND + block.ls2(block.mlp(block.norm2(x_ND))) + adapted_ND
        if last or index + 1 < len(model.blocks):
            linked.append(adapted_ND)
        following = model.blocks[index + 1 :][:1]
        if not following or following[0].sparsifier is not None:
            x_ND, linked = x_ND + sum(linked), []
    out: Tensor = model.forward_head(model.norm(x_ND)[None])[0]
    return out


MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers, LayerScale": ("vit_small_patch14_reg4_dinov2", {}),
    "norms of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "norm before": ("vit_base_patch32_clip_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_against_the_naive_version(name: str, checkpointing: bool) -> None:
    model_name, options = MODELS[name]
    embeds, last = name == "plain", name != "plain"
    adapter = {"dim": 8, "inner": 4, "link_embeddings": embeds, "link_last": last}
    model = vit(model_name, token_sparsify=KEEP, adapter=adapter, options=options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = images(2).double()
    model.eval()
    expected = torch.stack([naive(model, image, embeds, last) for image in x])
    expected.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.train(checkpointing)
    model.set_grad_checkpointing(checkpointing)
    if "distilled" in name:
        model.eval()  # in training it has two outputs
    out = model(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[key], msg=lambda text, key=key: key + text)


# Invariants.


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_all_tokens_and_fresh_adapters_are_the_plain_model_bit_for_bit(name: str) -> None:
    plain, tuned = vit(name), vit(name, token_sparsify={"keep": 1.0}, adapter={})
    tuned.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(tuned.eval()(images()), plain.eval()(images()))


def test_the_link_of_embeddings_changes_the_model_at_the_start() -> None:
    plain, tuned = vit(), vit(adapter={"link_embeddings": True})
    tuned.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(tuned.eval()(images()), plain.eval()(images()), atol=1e-3)


def test_weights_of_the_fused_token_are_what_the_kept_ones_leave() -> None:
    block = vit(token_sparsify=KEEP).eval().blocks[1]
    x_BND = torch.randn(2, 17, 16)
    queries = block.attn.qkv(block.norm1(x_BND)).reshape(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k, _ = queries.unbind(0)
    row_BN = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)[:, :, 0].mean(1)
    block.attn(block.norm1(x_BND))
    ones_BND = torch.ones_like(x_BND)
    out_BND = block.sparsifier(ones_BND)
    assert out_BND.shape == (2, 1 + 8 + 1, 16)
    kept_B = row_BN[:, 1:].topk(8).values.sum(1)
    torch.testing.assert_close(out_BND[:, -1, 0], 1 - row_BN[:, 0] - kept_B)


def test_dropped_tokens_have_gradients_through_the_fused_one_alone() -> None:
    x_BND = torch.randn(1, 17, 16, requires_grad=True)
    for fuse in (True, False):
        block = vit(token_sparsify={**KEEP, "fuse": fuse}).blocks[1]
        block.attn(block.norm1(x_BND.detach()))  # scores without gradients
        out_BND = block.sparsifier(x_BND)
        (grad_BND,) = torch.autograd.grad(out_BND[:, :9].sum(), x_BND, retain_graph=True)
        assert int((grad_BND != 0).any(-1).sum()) == 9
        if fuse:
            (grad_BND,) = torch.autograd.grad(out_BND[:, 9:].sum(), x_BND)
            assert int((grad_BND != 0).any(-1).sum()) == 8


def test_scores_are_fp32_under_autocast() -> None:
    block = vit(token_sparsify=KEEP).eval().blocks[1]
    x_BND = 3 * torch.randn(2, 17, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x_BND).dtype == torch.float32
        block.attn(block.norm1(x_BND))
        q, k = (block.sparsifier._seen[key].float() for key in "qk")
        kept_BND = block.sparsifier(x_BND)[:, 1:9]
    row_BN = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)[:, :, 0].mean(1)
    index_BK1 = row_BN[:, 1:].topk(8).indices[:, :, None]
    assert torch.equal(kept_BND, x_BND[:, 1:].gather(1, index_BK1.expand(-1, -1, 16)))


def test_copies_are_independent_and_pickled_ones_work(tmp_path: Path) -> None:
    model = vit(token_sparsify=KEEP, adapter={}).eval()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = model(images())
    other(images())
    assert torch.equal(model(images()), expected)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(images()), expected)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"keep": 0.5, "blocks": [0]}, [10, 10, 10, 10]),
        ({"keep": [0.5, 0.25], "blocks": [1, 3]}, [17, 10, 10, 5]),
        ({"keep": 0.5, "fuse": False}, [17, 9, 5, 3]),
        ({"keep": 1.0}, [17, 17, 17, 17]),
    ],
)
def test_numbers_of_tokens(options: dict[str, Any], counts: list[int]) -> None:
    model = vit(token_sparsify=options)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    model(images())
    assert token_counts(model) == counts == seen


def test_a_share_that_shrinks_is_a_function_of_the_step_and_in_checkpoints() -> None:
    """EViT's schedule: 1 up to the start, then half a cosine."""
    options = {"keep": 0.5, "blocks": [1], "shrink_start": 10, "shrink_steps": 20}
    model = vit(token_sparsify=options)
    assert token_counts(model)[1] == 10  # what an evaluation or an estimate sees before training
    found = []
    for step in (0, 10, 20, 30, 99):
        model.blocks[1].sparsifier.go_to(step)
        found.append(token_counts(model)[1])
    assert found == [17, 17, 1 + 12 + 1, 10, 10]
    model.blocks[1].sparsifier.go_to(20)
    other = vit(token_sparsify=options)
    other.load_state_dict(model.bfloat16().float().state_dict())
    assert token_counts(other) == token_counts(model) == [17, 14, 14, 14]
    assert torch.equal(other.eval()(images()), model.eval()(images()))


# Frozen, with MoE layers.


def moe(model: Any, router: Any = TopAnyRouter) -> None:
    add_moe_layers(model, router=router, num_experts=3, max_experts=3, layers=[0, 3], init="copy")


def test_adapters_head_and_moe_layers_are_trained(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(vit().state_dict(), file)
    model = vit(pretrained=str(file), adapter={"dim": 4}, token_sparsify=KEEP)
    moe(model)
    with record_routing(model) as tape:
        loss = model(images()).square().sum()
    loss = loss + sum(call.aux for calls in tape.values() for call in calls)
    loss.backward()
    parts = ("adapter.", "head.", "mlp.experts.", "mlp.router.")
    for name, parameter in model.named_parameters():
        trained = any(part in name for part in parts)
        assert parameter.requires_grad == trained, name
        assert trained or parameter.grad is None
    assert model.blocks[0].adapter.up2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("freeze", "trained"), [(None, True), (False, True), (True, False)])
def test_from_scratch_all_is_trained_unless_asked_otherwise(
    freeze: bool | None, trained: bool
) -> None:
    model = vit(adapter={"freeze": freeze})
    assert model.blocks[0].attn.qkv.weight.requires_grad == trained


@pytest.mark.parametrize("router", [TopAnyRouter, partial(TopKRouter, top_k=2)])
def test_moe_layers_and_flops_see_the_tokens_that_are_left(router: Any) -> None:
    model = vit(token_sparsify=KEEP, adapter={"dim": 4, "inner": 2})
    moe(model, router)
    with record_routing(model) as tape:
        model(images())
    assert [calls[0].mask.shape[:2] for calls in tape.values()] == [(3, 17), (3, 7)]
    costs = efficiency.count(model, images(1))
    assert [each["tokens"] for each in costs["flops"]["layers"].values()] == [17, 7]
    dense = efficiency.count(vit(), images(1))
    assert costs["flops"]["other"] < dense["flops"]["other"]
    layers = moe_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.compact())
    torch.testing.assert_close(model.eval()(images()), model(images()))


# Refused.


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_base_patch16_siglip_224", {}, r"token_sparsify: .*class token.*Choose a backbone"),
        ("mixer_s16_224", {}, r"token_sparsify: .*class token.*=null"),
        ("eva02_tiny_patch14_224", {}, r"token_sparsify: works in .*found a Eva.*=null"),
        ("beit_base_patch16_224", {}, r"token_sparsify: works in .*found a Beit"),
        ("vit_tiny_patch16_224", {"keep": [0.5]}, r"token_sparsify.keep: expected one share, or 3"),
        ("vit_tiny_patch16_224", {"keep": 0.0}, r"token_sparsify.keep: expected shares above 0"),
        ("vit_tiny_patch16_224", {"blocks": [4]}, r"token_sparsify.blocks: .*0 to 3, or quarters"),
        ("vit_tiny_patch16_224", {"blocks": [2, 1]}, r"token_sparsify.blocks: expected rising"),
        ("vit_tiny_patch16_224", {"rate": 1}, r"token_sparsify: .*rate"),
    ],
)
def test_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    options = {} if name == "mixer_s16_224" else SMALL
    size = 224 if name == "mixer_s16_224" else 28
    with pytest.raises(ConfigError, match=message):
        build_vit(name, 5, 1, size, token_sparsify=arguments, options=options)


def test_refused_adapters() -> None:
    with pytest.raises(ConfigError, match=r"adapter.link_embeddings: .*links is false"):
        vit(adapter={"links": False, "link_embeddings": True})
    with pytest.raises(ConfigError, match=r"adapter.link_embeddings: .*block 0"):
        vit(adapter={"link_embeddings": True}, token_sparsify={"blocks": [0]})
    with pytest.raises(ConfigError, match=r"backbone.adapter: .*width"):
        vit(adapter={"width": 3})
    vit("vit_base_patch16_siglip_224", adapter={}, options=SMALL)  # needs no class token

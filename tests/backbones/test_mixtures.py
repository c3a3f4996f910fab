"""Models that are mixtures already: their experts as ours, under their own router or another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from vl_models import BOS, IMG, prompts, vl_model

from dynmoe.backbones.families import FAMILIES
from dynmoe.backbones.mixtures import own_router
from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.text import TextClassifier, build_text_classifier
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    MoELayer,
    TopAnyRouter,
    TopKRouter,
    aux_loss,
    mask_padding,
    moe_layers,
    record_routing,
)
from dynmoe.metrics import efficiency

SIZES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 40},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
}
LOCAL = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}
GRANITE = {**LOCAL, "attention_multiplier": 0.3}
NARROW = {**ROUTED, "moe_intermediate_size": 8}
HEADED = {**NARROW, "head_dim": 8}
DEEPSEEK = {
    **{**SIZES, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
LATENT = {
    **{**DEEPSEEK, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**LOCAL, "head_dim": 8},
    "minimax": {**LOCAL, "head_dim": 8, "layer_types": ["full_attention"] * 3},
    "olmoe": ROUTED,
    "flex_olmo": ROUTED,
    "mellum": HEADED,
    "qwen3_moe": {**HEADED, "norm_topk_prob": True},
    "qwen2_moe": {**NARROW, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
    "qwen3_next": {
        **{**HEADED, "shared_expert_intermediate_size": 8},
        **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        **{
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention"] + ["full_attention"] * 2,
        },
    },
    "granitemoe": GRANITE,
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 8},
    "jamba": {
        **{**ROUTED, "mamba_d_state": 4, "mamba_expand": 1, "expert_layer_offset": 0},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "routed_scaling_factor": 3.0},
    "deepseek_v3": {**LATENT, "q_lora_rank": 8},
    "dots1": {**DEEPSEEK, "head_dim": 8},
    "glm4_moe": {**DEEPSEEK, "head_dim": 8},
    "ernie4_5_moe": {
        **{**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "head_dim": 8},
        "moe_num_shared_experts": 1,
    },
    "phimoe": LOCAL,
}
OWN = [name for name in MODELS if FAMILIES[name].weights]


def decoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**MODELS[name], **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def keep(model: nn.Module, router: Any = own_router, **kwargs: Any) -> nn.Module:
    options = {"max_experts": 4, "layers": "all", "init": "keep", **kwargs}
    options = {"num_experts": 4, **options}
    add_moe_layers(model, router=router, **options)
    return model


def tokens(lengths: tuple[int, ...] = (7, 4, 5), width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", OWN)
def test_own_routing_stays_the_function_of_the_model(name: str) -> None:
    """Values, all gradients and greedy answers; padding routes nowhere."""
    native = decoder(name)
    ours = keep(copy.deepcopy(native))
    layers = moe_layers(ours)
    assert layers and all(isinstance(layer.router, TopKRouter) for layer in layers.values())
    batch = tokens()
    real = batch["attention_mask"].bool()
    with mask_padding(ours, real):
        found = ours(**batch).logits[real]
    expected = native(**batch).logits[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    theirs = dict(native.named_parameters())
    seen = 0
    for path, layer in layers.items():
        place = path.removesuffix(".moe")
        gate_up = theirs[f"{place}.experts.gate_up_proj"].grad
        down = theirs[f"{place}.experts.down_proj"].grad
        router = theirs[f"{place}.{FAMILIES[name].router}.weight"].grad
        torch.testing.assert_close(layer.router.weight.grad, router, atol=1e-4, rtol=1e-4)
        for slot, expert in enumerate(layer.experts.slots):
            if expert.down.weight.grad is None:
                assert not gate_up[slot].any()
                continue
            seen += 1
            torch.testing.assert_close(
                expert.gate_up.weight.grad, gate_up[slot], atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(expert.down.weight.grad, down[slot], atol=1e-4, rtol=1e-4)
    assert seen
    kept = {n: p for n, p in ours.named_parameters() if n in theirs}
    assert kept.keys() >= {n for n in theirs if "self_attn" in n or "norm" in n}
    for path, parameter in kept.items():
        torch.testing.assert_close(parameter.grad, theirs[path].grad, atol=1e-4, rtol=1e-4)

    prompt = {
        "input_ids": batch["input_ids"][:, :4],
        "attention_mask": batch["attention_mask"][:, :4],
    }
    said = [m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (native, ours)]
    assert torch.equal(*said)


@pytest.mark.parametrize("name", MODELS)
def test_the_router_can_be_exchanged(name: str) -> None:
    """Tokens of one expert with weight 1 get what the expert makes of them."""
    native = decoder(name)
    ours = keep(copy.deepcopy(native), TopAnyRouter, max_experts=6)
    assert not ours.config.to_dict().get("output_router_logits")
    for path, layer in moe_layers(ours).items():
        stacked = native.get_submodule(path.removesuffix(".moe")).experts
        assert layer.live == (0, 1, 2, 3) and layer.max_experts == 6
        for slot, expert in enumerate(layer.experts.slots):
            assert torch.equal(expert.gate_up.weight, stacked.gate_up_proj[slot % 4])
            assert torch.equal(expert.down.weight, stacked.down_proj[slot % 4])
    batch = tokens()
    with record_routing(ours) as tape, mask_padding(ours, batch["attention_mask"].bool()):
        ours.train()(**batch).logits.sum().backward()
    assert [call.mask.shape[:2] for calls in tape.values() for call in calls] == [(3, 7)] * len(
        tape
    )


def test_experts_become_ours_without_a_copy() -> None:
    native = decoder("olmoe")
    stacked = native.model.layers[0].mlp.experts
    keep(native)
    layer = native.model.layers[0].mlp
    assert isinstance(layer, MoELayer)
    for slot, expert in enumerate(layer.experts.slots):
        assert expert.gate_up.weight.data_ptr() == stacked.gate_up_proj[slot].data_ptr()
        assert expert.down.weight.data_ptr() == stacked.down_proj[slot].data_ptr()


def test_one_balance_loss_takes_the_place_of_the_other() -> None:
    model = decoder("mixtral", output_router_logits=True)
    batch = tokens()
    theirs = model(**batch, labels=batch["input_ids"])
    assert theirs.aux_loss > 0
    with record_routing(keep(model)) as tape:
        ours = model(**batch, labels=batch["input_ids"])
    assert not ours.aux_loss and aux_loss(tape) > 0
    plain = theirs.loss - model.config.router_aux_loss_coef * theirs.aux_loss
    torch.testing.assert_close(ours.loss, plain)


def test_a_shared_expert_stays_in_the_block() -> None:
    native = decoder("qwen2_moe")
    keep(native, TopAnyRouter)
    blocks = native.model.layers
    assert isinstance(blocks[0].mlp.moe, MoELayer) and not moe_layers(blocks[1])
    x = torch.randn(2, 16)
    shared = blocks[0].mlp.shared(x) * blocks[0].mlp.shared_gate(x).sigmoid()
    torch.testing.assert_close(blocks[0].mlp(x), blocks[0].mlp.moe(x) + shared)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", [0, 2]), ("sparse", [0]), ("second_half", [2]), ([2], [2]), ([0, 2], [0, 2])],
)
def test_placements_count_mixtures(layers: Any, chosen: list[int]) -> None:
    """Block 1 is dense; a mixture that is not chosen stays as it is, and so does the function."""
    native = decoder("qwen2_moe")
    expected = native(**tokens()).logits
    ours = keep(native, layers=layers)
    assert [n for n, block in enumerate(ours.model.layers) if moe_layers(block)] == chosen
    torch.testing.assert_close(ours(**tokens()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "kwargs", "words"),
    [
        ("qwen2_moe", {}, {"layers": [1]}, ("moe.layers=[1]", "[0, 2]")),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, {}, ("moe.layers=all", "moe=dense")),
        ("olmoe", {}, {"num_experts": 3}, ("moe.num_experts=3", "moe.num_experts=4")),
        ("olmoe", {}, {"init": "copy"}, ("moe.init=copy", "moe.init=keep")),
        ("olmoe", {}, {"init": "cluster"}, ("moe.init=cluster", "moe.init=keep")),
        ("olmoe", {}, {"keep_origin": True}, ("moe.adaptation.init=pretrained", "copy_most_used")),
        (
            "mixtral",
            {"router_jitter_noise": 0.1},
            {},
            ("router_jitter_noise", "Set it to 0"),
        ),
        ("deepseek_v3", {}, {}, ("moe: native", "sigmoid", "moe=dynmoe")),
        ("phimoe", {}, {}, ("moe: native", "SparseMixer", "moe=dynmoe")),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 2},
            {},
            ("moe: native", "group_limited_greedy"),
        ),
    ],
)
def test_refusals_say_the_key_and_the_fix(
    name: str, options: Any, kwargs: Any, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as raised:
        keep(decoder(name, **options), **kwargs)
    assert all(word in str(raised.value) for word in words), raised.value


def test_experts_that_cannot_be_kept() -> None:
    for kind, reason in (("gpt_oss", "biases"), ("jetmoe", "attention"), ("dbrx", "another build")):
        model = nn.Module()
        model.config = AutoConfig.for_model(kind)
        with pytest.raises(ConfigError, match=f"'{kind}'.*{reason}.*moe=dense"):
            keep(model)
    for router, key in ((own_router, "moe.router"), (TopKRouter, "moe.init=keep")):
        dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
        with pytest.raises(ConfigError, match=f"{key}: .*found LlamaForCausalLM.*moe.init=auto"):
            keep(dense, router, init="copy" if router is own_router else "keep")


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "granitemoe"])
def test_costs_are_those_of_the_model_itself(name: str) -> None:
    """Of the k experts of a token, whether its blocks were converted, some of them, or none."""
    wholes = []
    for layers in ("none", [0], "all"):
        model = keep(decoder(name), layers=layers)
        costs = efficiency.count(model, tokens((5,), 5)["input_ids"])
        k = dict.fromkeys(costs["slots"], 2.0)
        wholes.append(
            (
                efficiency.flops(costs, costs["slots"], k),
                efficiency.activated(costs, costs["slots"], k),
                efficiency.total(costs),
            )
        )
    assert wholes[0] == wholes[1] == wholes[2] and wholes[0][0]
    assert wholes[0][1] < wholes[0][2]


def classifier(**kwargs: Any) -> TextClassifier:
    torch.manual_seed(0)
    model = build_text_classifier(
        None, 3, vocab_size=40, pad_token_id=0, architecture="olmoe", options=ROUTED, **kwargs
    )
    return model.eval()


def test_experts_come_and_go(tmp_path: Path) -> None:
    model = keep(classifier(), TopAnyRouter, max_experts=6)
    layer = next(iter(moe_layers(model).values()))
    layer.remove_expert(1)
    layer.add_expert(4, torch.ones(16), "copy_most_used", load={2: 5})
    assert layer.live == (0, 2, 3, 4)
    slots = layer.experts.slots
    assert torch.equal(slots[4].gate_up.weight, slots[2].gate_up.weight)
    expected = model(tokens())

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = keep(classifier(), TopAnyRouter, max_experts=6)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(tokens()), expected)
    model.model.model.layers[0].mlp = layer.compact()
    torch.testing.assert_close(model(tokens()), expected)


@pytest.mark.parametrize("router", [own_router, TopAnyRouter])
def test_checkpointing_and_adapters(router: Any) -> None:
    """Blocks recomputed with their padding give the same gradients; frozen experts are trained."""
    pytest.importorskip("peft")
    grads = []
    for checkpointing in (False, True):
        model = classifier(grad_checkpointing=checkpointing, lora={"r": 2, "dropout": 0.0})
        torch.manual_seed(3)
        keep(model, router).train()(tokens()).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert any("gate_up" in name for name in trained)
        assert any(".router." in name for name in trained)
        assert not any("base_layer" in name for name in trained)
        grads.append(trained)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("moe", [own_router, TopAnyRouter])
def test_questions_about_images_are_answered_alike(moe: Any) -> None:
    """Left-padded, cached and ended at different times, as the model itself or each alone."""
    sizes = {**MODELS["mixtral"], "num_hidden_layers": 2}
    native = vl_model("mixtral", None, **sizes)
    ours = keep(copy.deepcopy(native), moe)
    asked = [[BOS, 7, 8, 9, 4], [BOS, *IMG, 11, 4], [BOS, 4]]
    said = ours.generate(prompts(*asked), 6)
    if moe is own_router:
        assert torch.equal(said, native.generate(prompts(*asked), 6))
    for question, answer in zip(asked, said, strict=True):
        alone = ours.generate(prompts(question), 6)[0]
        assert answer[: len(alone)].equal(alone)

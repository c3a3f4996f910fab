"""Models of transformers with MoE layers, written for transformers and loaded by it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.convert.transformers_folder import logits_of, random_texts, save_transformers
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    AverageKeyRouter,
    CosineTopKRouter,
    MoELayer,
    Router,
    SoftSlots,
    TopAnyRouter,
    TopKRouter,
    moe_layers,
)
from dynmoe.layers.ffn import GatedFFN
from dynmoe.layers.routers import Routing

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
CODE = "modeling_mixture.py"


def mixture(
    kind: str,
    head: str,
    router: Callable[[int, int], Router] | None,
    layers: Any = "last_two",
    **options: Any,
) -> Any:
    """A model of three blocks with random weights; adaptive layers lack slot 1."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "num_labels": 3, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": None}
    sizes |= {**ends, **OPTIONS.get(kind, {}), **options}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = getattr(transformers, head)._from_config(config)
    experts = {"num_experts": 4, "max_experts": 4, "init": "fresh"}
    add_moe_layers(model, router=router, layers=layers if router else "none", **experts)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, layer in moe_layers(model).items():
        if layer.adaptive:
            layer.remove_expert(1)
        model.set_submodule(name, layer.compact())
    return model.eval()


def assert_equal_logits(model: Any, loaded: Any) -> Tensor:
    texts = random_texts(model, 12)
    ours = logits_of(model, texts)
    assert ours.std() > 1e-3
    torch.testing.assert_close(logits_of(loaded.eval(), texts), ours, atol=1e-5, rtol=1e-5)
    return ours


TOP_ANY = partial(TopAnyRouter)
TOP_1, TOP_2 = (partial(TopKRouter, top_k=k) for k in (1, 2))
COSINE = partial(CosineTopKRouter, top_k=2, projection=5)
KEYS = partial(AverageKeyRouter, top_k=2, weights_sum="k")


@pytest.mark.parametrize(
    ("kind", "head", "router", "routers"),
    [
        ("bert", "BertForSequenceClassification", TOP_ANY, {"TopAny"}),
        ("roberta", "RobertaForSequenceClassification", TOP_1, {"TopK"}),
        ("gpt2", "GPT2ForSequenceClassification", KEYS, {"TopKeys"}),
        ("llama", "LlamaForSequenceClassification", COSINE, {"TopK", "CosineTopK"}),
        ("phi", "PhiForCausalLM", TOP_ANY, {"TopAny"}),
        ("llama", "LlamaForCausalLM", TOP_2, {"TopK"}),  # one block is dense: no Mixtral
    ],
)
def test_code_of_its_own(
    kind: str,
    head: str,
    router: Any,
    routers: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    model = mixture(kind, head, router)
    made = save_transformers(model, tmp_path)
    files = {file.name for file in tmp_path.iterdir()} - {"generation_config.json"}
    assert files == {CODE, "config.json", "model.safetensors"}
    code = (tmp_path / CODE).read_text()
    assert "dynmoe." not in code and f"import {head} as BaseModel" in code
    every = {"TopAny", "TopK", "CosineTopK", "TopKeys"}
    assert {name for name in every if f"class {name}(" in code} == routers
    for implementation in IMPLEMENTATIONS:
        loaded = made.from_pretrained(tmp_path, experts_implementation=implementation)
        assert loaded.config._experts_implementation == implementation
        assert_equal_logits(model, loaded)
    loaded.set_experts_implementation("grouped_mm")
    assert_equal_logits(model, loaded)


@pytest.mark.parametrize(
    ("kind", "router", "layers", "native"),
    [
        ("llama", TOP_2, "all", "MixtralForSequenceClassification"),
        ("mistral", TOP_2, "all", "MixtralForSequenceClassification"),
        ("llama", TOP_1, "all", None),  # Mixtral's single expert has weight 1
        ("qwen3", TOP_1, [1], "Qwen3MoeForSequenceClassification"),
        ("qwen3", TOP_2, "all", "Qwen3MoeForSequenceClassification"),
        ("qwen3", partial(TopKRouter, top_k=2, weights_sum="k"), "all", None),
    ],
)
def test_native_classes_where_they_compute_the_same(
    kind: str, router: Any, layers: Any, native: str | None, tmp_path: Path
) -> None:
    heads = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}
    model = mixture(kind, f"{heads[kind]}ForSequenceClassification", router, layers)
    made = save_transformers(model, tmp_path)
    assert (tmp_path / CODE).exists() == (native is None)
    assert made.__name__ == (native or "MixtureModel")
    assert_equal_logits(model, made.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("kind", "name", "router", "native"),
    [
        ("mixtral", "Mixtral", TOP_2, True),
        ("mixtral", "Mixtral", TOP_1, False),
        ("olmoe", "Olmoe", TOP_1, True),
        ("qwen3_moe", "Qwen3Moe", TOP_ANY, False),
    ],
)
def test_models_that_were_mixtures_already(
    kind: str, name: str, router: Any, native: bool, tmp_path: Path
) -> None:
    """With another number of experts than before."""
    model = mixture(kind, f"{name}ForCausalLM", None, num_experts_per_tok=1, num_key_value_heads=1)
    for block in model.model.layers:
        gate, up, down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        for linear in (gate, up, down):
            linear.bias = None
        expert = GatedFFN(gate, up, nn.SiLU(), down, 0.0)
        block.mlp = MoELayer(expert, 16, router, 3, init="fresh").eval()
    made = save_transformers(model, tmp_path)
    assert (made.__name__ == f"{name}ForCausalLM") == native
    assert (tmp_path / CODE).exists() != native
    assert_equal_logits(model, made.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("llama", "Llama", {"mlp_bias": True}),
        ("modernbert", "ModernBert", {"mlp_bias": True, "cls_token_id": 1, "sep_token_id": 2}),
        ("seed_oss", "SeedOss", {"head_dim": 8, "num_key_value_heads": 2}),
    ],
)
def test_what_stays_behind_gated_experts(
    kind: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """An output bias, a dropout."""
    model = mixture(kind, f"{name}ForSequenceClassification", TOP_2, "all", **options)
    made = save_transformers(model, tmp_path)
    assert made.__name__ == "MixtureModel"
    assert_equal_logits(model, made.from_pretrained(tmp_path))


def test_layers_of_ones_own(tmp_path: Path) -> None:
    model = mixture("llama", "LlamaForCausalLM", None)
    mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Identity(), nn.Linear(24, 16))
    model.model.layers[1].mlp = layer = MoELayer(mlp, 16, TOP_ANY, 2, init="fresh").eval()
    made = save_transformers(model, tmp_path / "out")
    assert_equal_logits(model, made.from_pretrained(tmp_path / "out"))
    model.model.layers[1].mlp = nn.Sequential(layer, nn.Tanh())
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.0 is a part of Sequential"):
        save_transformers(model, tmp_path / "other")


def test_a_dense_model_stays_what_it_is(tmp_path: Path) -> None:
    model = mixture("bert", "BertForSequenceClassification", None)
    made = save_transformers(model, tmp_path)
    assert made is transformers.BertForSequenceClassification
    assert_equal_logits(model, made.from_pretrained(tmp_path))


def test_generation_is_that_of_the_model(tmp_path: Path) -> None:
    model = mixture("llama", "LlamaForCausalLM", TOP_ANY, "all", tie_word_embeddings=True)
    loaded = save_transformers(model, tmp_path).from_pretrained(tmp_path).eval()
    prompt = torch.tensor([[3, 17, 41, 8]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert loaded.generate(prompt, max_new_tokens=6, do_sample=False).equal(expected)


def test_padding_changes_no_text(tmp_path: Path) -> None:
    model = mixture("bert", "BertForSequenceClassification", TOP_ANY)
    loaded = save_transformers(model, tmp_path).from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 9, 2, 30]])
    padded = nn.functional.pad(ids, (0, 5))
    with torch.no_grad():
        alone = loaded(ids, attention_mask=torch.ones_like(ids)).logits
        among = loaded(padded, attention_mask=(padded > 0).long()).logits
    torch.testing.assert_close(among, alone)


def test_the_router_stays_fp32(tmp_path: Path) -> None:
    """Scores and thresholds in steps of 2^-8 would tie."""
    made = save_transformers(mixture("bert", "BertForSequenceClassification", TOP_ANY), tmp_path)
    loaded = made.from_pretrained(tmp_path, dtype=torch.bfloat16)
    block = loaded.bert.encoder.layer[2].intermediate
    assert {p.dtype for p in block.router.parameters()} == {torch.float32}
    assert block.experts.up_proj.dtype == torch.bfloat16
    assert loaded(torch.tensor([[5, 9, 2]])).logits.isfinite().all()


class DotRouter(Router):
    """A router that no one else has."""

    def __init__(self, dim: int, num_slots: int) -> None:
        super().__init__()

    def forward(self, x_TD: Tensor, live: Any, token_mask_T: Tensor | None = None) -> Routing:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (DotRouter, "has a DotRouter, expected one of TopAnyRouter"),
        (partial(TopAnyRouter, combine="tutel"), "combine=tutel"),
        (partial(TopKRouter, capacity_factor=1.5), "capacity_factor=1.5"),
        (partial(TopKRouter, forced_balance=True), "forced_balance=True"),
        (SoftSlots, "format=onnx"),
        (partial(AverageKeyRouter, top_k=2, capacity_factor=1.5), "capacity_factor=1.5"),
    ],
)
def test_refused_routers(router: Any, message: str, tmp_path: Path) -> None:
    model = mixture("bert", "BertForSequenceClassification", router)
    with pytest.raises(ConfigError, match=message):
        save_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_experts(tmp_path: Path) -> None:
    model = mixture("bert", "BertForSequenceClassification", TOP_ANY)
    layer = MoELayer(nn.Linear(16, 16), 16, TOP_ANY, 2, shared_experts=1)
    model.bert.encoder.layer[1].intermediate = layer
    with pytest.raises(ConfigError, match=r"layer\.1\.intermediate has shared experts"):
        save_transformers(model, tmp_path / "out")
    model = mixture("bert", "BertForSequenceClassification", TOP_ANY)
    normed = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 16))
    layer = MoELayer(normed, 16, TOP_ANY, 2)
    model.bert.encoder.layer[1].intermediate = layer
    with pytest.raises(ConfigError, match=r"layer\.1\.intermediate has experts of Sequential"):
        save_transformers(model, tmp_path)

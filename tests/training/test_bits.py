"""Which linear layers a model has, and the policies that give them bits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.config.quantize import Choice, Quantisation
from dynmoe.errors import ConfigError
from dynmoe.layers import TopKRouter
from dynmoe.layers.quantized import Rounding
from dynmoe.layers.soft import SoftSlots
from dynmoe.training.bits import Place, Seen, average_bits, bit_map, places_in

GOLDEN = Path(__file__).parent.parent / "layers" / "golden" / "quantmoe.json"


def with_layers(model: nn.Module, layers: Any, router: Any = TopKRouter, **more: Any) -> nn.Module:
    made = partial(router, top_k=2) if router is TopKRouter else router
    options = {"num_experts": 3, "max_experts": 3, "init": "copy", **more}
    add_moe_layers(model, router=made, layers=layers, **options)
    return model


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2
    )


def text(kind: str, **more: Any) -> nn.Module:
    sizes = {
        **dict.fromkeys(["hidden_size", "n_embd"], 16),
        **dict.fromkeys(["num_hidden_layers", "n_layer"], 2),
        **dict.fromkeys(["num_attention_heads", "n_head"], 2),
        **dict.fromkeys(["intermediate_size", "n_inner"], 32),
        "vocab_size": 40,
    }
    config = AutoConfig.for_model(kind, **sizes, **more)
    return AutoModelForSequenceClassification.from_config(config)


def kinds(model: nn.Module) -> dict[str, str]:
    return {place.name: place.kind for place in places_in(model)}


def test_layers_of_a_vit() -> None:
    assert kinds(with_layers(vit(), [1], shared_experts=1)) == {
        "blocks.0.attn.qkv": "attention",
        "blocks.0.attn.proj": "attention",
        "blocks.0.mlp.fc1": "dense",
        "blocks.0.mlp.fc2": "dense",
        "blocks.1.attn.qkv": "attention",
        "blocks.1.attn.proj": "attention",
        **{f"blocks.1.mlp.experts.slots.{e}.fc{n}": "expert" for e in range(3) for n in (1, 2)},
        "blocks.1.mlp.shared.0.fc1": "shared",
        "blocks.1.mlp.shared.0.fc2": "shared",
    }


def test_layers_of_soft_moe() -> None:
    found = kinds(with_layers(vit(), [0], SoftSlots))
    assert [name for name, kind in found.items() if kind == "expert"] == [
        f"blocks.0.mlp.experts.slots.{e}.fc{n}" for e in range(3) for n in (1, 2)
    ]


def test_layers_of_a_bert() -> None:
    found = kinds(with_layers(text("bert"), [1]))
    by_kind = {kind: sum(each == kind for each in found.values()) for kind in found.values()}
    assert by_kind == {"attention": 8, "dense": 2, "expert": 6}
    assert found["bert.encoder.layer.0.attention.output.dense"] == "attention"
    assert found["bert.encoder.layer.1.intermediate.experts.slots.2.0"] == "expert"


def test_transposed_layers_of_gpt2() -> None:
    places = places_in(with_layers(text("gpt2"), [1]))
    shapes = {place.name: tuple(place.weight_OI.shape) for place in places}
    assert shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert shapes["transformer.h.0.mlp.c_fc"] == (32, 16)
    assert shapes["transformer.h.1.mlp.c_fc.experts.slots.0.0"] == (32, 16) or "expert" in {
        place.kind for place in places
    }
    place = next(p for p in places if p.is_transposed)
    place.weight_OI.fill_(2)
    assert (place.module.weight == 2).all()


def test_a_mixture_of_transformers_has_a_shared_ffn_and_no_gate() -> None:
    model = text("qwen2_moe", num_experts=3, moe_intermediate_size=8)
    found = kinds(with_layers(model, "all", init="keep"))
    assert {kind for kind in found.values()} == {"attention", "shared", "expert"}
    assert not any("gate" in name.split(".")[-2:] or name.endswith("_gate") for name in found)


def place(name: str, kind: Any, block: int, layer: str = "", expert: int = 0) -> Place:
    return Place(name, None, kind, block, layer, expert)


def mixtral() -> tuple[list[Place], dict[str, tuple[int, int]]]:
    """The linear layers of Mixtral-8x7B, and their shapes."""
    places, shapes = [], {}
    for block in range(32):
        root = f"model.layers.{block}"
        for each, outputs in zip("qkvo", (4096, 1024, 1024, 4096), strict=True):
            places.append(place(f"{root}.self_attn.{each}_proj", "attention", block))
            shapes[places[-1].name] = (outputs, 4096)
        layer = f"{root}.block_sparse_moe"
        for expert in range(8):
            for each, shape in (
                ("w1", (14336, 4096)),
                ("w2", (4096, 14336)),
                ("w3", (14336, 4096)),
            ):
                name = f"{layer}.experts.{expert}.{each}"
                places.append(place(name, "expert", block, layer, expert))
                shapes[name] = shape
    return places, shapes


MIXTRAL = {
    "main_2.attn_4": Quantisation(default=2, attention=4),
    "main_2.attn_4.layer_0_4.layer_1_4.layer_2_4.layer_3_4": Quantisation(
        default=2, attention=4, blocks=Choice("first", 4)
    ),
    "main_2.attn_8.exp_l1e3_4": Quantisation(
        default=2, attention=8, named={"model.layers.1.block_sparse_moe.experts.3": 4}
    ),
}


def test_maps_and_average_bits_of_the_official_code() -> None:
    places, shapes = mixtral()
    cases = [each for each in json.loads(GOLDEN.read_text())["cases"] if "spec" in each]
    assert {each["spec"] for each in cases} == set(MIXTRAL)
    for case in cases:
        bits = bit_map(places, MIXTRAL[case["spec"]], Seen())
        counts: dict[str, int] = {}
        for each in places:
            key = f"{each.kind} {bits[each.name]} bit"
            counts[key] = counts.get(key, 0) + 1
        assert counts == case["linears_by_kind_and_bits"]
        assert {name: bits[name] for name in case["examples"]} == case["examples"]
        mean, _ = average_bits(shapes, bits, Rounding(2))
        assert mean == pytest.approx(case["average_bits"], abs=1e-6)


TWO_BLOCKS = [
    place("0.attn", "attention", 0),
    place("0.ffn", "dense", 0),
    place("1.attn", "attention", 1),
    *(place(f"1.moe.{e}", "expert", 1, "1.moe", e) for e in range(3)),
    place("1.shared", "shared", 1),
    place("2.attn", "attention", 2),
    *(place(f"2.moe.{e}", "expert", 2, "2.moe", e) for e in range(3)),
]
SEEN = Seen(
    load={"1.moe": [5, 9, 1], "2.moe": [30, 0, 2]},
    similarity={1: 0.9, 2: 0.7},
    outliers={place.name: float(n) for n, place in enumerate(TWO_BLOCKS)},
)


def raised(**options: Any) -> set[str]:
    """The layers that have other bits than 2."""
    bits = bit_map(TWO_BLOCKS, Quantisation(default=2, **options), SEEN)
    return {name.replace("moe.", "") for name, number in bits.items() if number != 2}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ""),
        ({"attention": 4}, "0.attn 1.attn 2.attn"),
        ({"dense": 4}, "0.ffn"),
        ({"shared": 8}, "1.shared"),
        ({"experts": Choice("frequency", 1)}, "1.1 2.0"),
        ({"experts": Choice("frequency", 2)}, "1.1 1.0 2.0 2.2"),
        ({"experts": Choice("frequency", 0.5)}, "2.0 1.1 1.0"),
        ({"experts": Choice("rare", 1)}, "1.2 2.1"),
        ({"experts": Choice("rare", 0.4)}, "2.1 1.2 2.2"),
        ({"blocks": Choice("first", 1)}, "1.0 1.1 1.2 1.shared"),
        ({"blocks": Choice("last", 1)}, "2.0 2.1 2.2"),
        ({"blocks": Choice("predictor", 1)}, "2.0 2.1 2.2"),
        ({"blocks": Choice("first", 9)}, "1.0 1.1 1.2 1.shared 2.0 2.1 2.2"),
        ({"linears": Choice("outlier", 0.25)}, "2.2 2.1"),
        ({"named": {"0": 8, "1.moe.2": 3}}, "0.attn 0.ffn 1.2"),
    ],
)
def test_a_policy_raises(options: dict[str, Any], expected: str) -> None:
    assert raised(**options) == set(expected.split())


@pytest.mark.parametrize("key", ["experts", "blocks", "linears"])
def test_random_choices_are_as_many_and_those_of_the_seed(key: str) -> None:
    amount = 0.3 if key == "linears" else 1
    found = [raised(**{key: Choice("random", amount)}, seed=seed) for seed in (0, 0, *range(1, 9))]
    assert found[0] == found[1] and len({frozenset(each) for each in found}) > 1
    assert {len(each) for each in found} <= {3, 4} if key == "blocks" else {len(found[0])}


def test_later_policies_win() -> None:
    """Default, attention, shared, experts, blocks, linear layers, names."""
    how = Quantisation(
        default=2,
        attention=8,
        shared=3,
        experts=Choice("frequency", 1),
        blocks=Choice("first", 1),
        high=5,
        named={"1.moe.1": 6, "2.attn": 16},
    )
    bits = bit_map(TWO_BLOCKS, how, SEEN)
    expected = {"0.attn": 8, "0.ffn": 2, "1.attn": 8, "2.attn": 16, "1.shared": 5}
    expected |= {"1.moe.0": 5, "1.moe.1": 6, "1.moe.2": 5, "2.moe.0": 5, "2.moe.1": 2, "2.moe.2": 2}
    assert bits == expected


def test_average_bits_by_hand() -> None:
    shapes = {"a": (4, 10), "b": (2, 8), "c": (8, 1)}
    bits = {"a": 2, "b": 4, "c": 16}
    mean, with_grids = average_bits(shapes, bits, Rounding(2, group_size=4))
    assert mean == pytest.approx((40 * 2 + 16 * 4 + 8 * 16) / 64)
    # a: 4 rows of 3 groups, b: 2 rows of 2 groups, each 16 bits of scale and a zero.
    grids = 12 * (16 + 2) + 4 * (16 + 4)
    assert with_grids == pytest.approx(mean + grids / 64)


def test_a_name_that_no_module_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant.bits.named: .*1\.mo\. Expected such as 0\.attn"):
        raised(named={"1.mo": 4})


def test_shared_experts_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant\.bits\.shared: .*no shared experts"):
        bit_map(TWO_BLOCKS[:1], Quantisation(shared=4), SEEN)

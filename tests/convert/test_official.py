"""Published checkpoints: their names and shapes, there and back, and what they compute."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import official_forward
import pytest
import torch
import yaml
from official_models import DENSE, EXPERTS, FAMILIES, VOCAB, config_of, weights
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, SiglipVisionConfig

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.convert.config import describe, official_config
from dynmoe.convert.weights import MEAN, STD, to_dynmoe, to_official, tower
from dynmoe.errors import ConfigError, DataError
from dynmoe.layers import TopAnyRouter, TopKRouter, moe_layers, record_routing

TOP_ANY, TOP_2 = -1, 2
EVERY = [(family, top_k) for family in FAMILIES for top_k in (TOP_ANY, TOP_2, DENSE)]
LANGUAGE = "language_model."
CONF = Path(__file__).parents[2] / "conf"


def language_model(settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        settings["language_model"]["architecture"], **settings["language_model"]["options"]
    )
    model = AutoModelForCausalLM.from_config(config)
    moe = settings["moe"]
    if moe["name"] == "dense":
        return model.eval()
    router = partial(TopKRouter, top_k=moe["top_k"]) if moe["name"] == "topk" else TopAnyRouter
    keys = ("num_experts", "max_experts", "layers", "init", "expert_dropout")
    add_moe_layers(model, router=router, **{key: moe[key] for key in keys})
    return model.eval()


def language_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(LANGUAGE): v for k, v in state.items() if k.startswith(LANGUAGE)}


@pytest.mark.parametrize(("family", "top_k"), EVERY)
def test_a_converted_model_computes_what_the_official_code_does(family: str, top_k: int) -> None:
    config, state = config_of(family, top_k), weights(family, top_k)
    settings = describe(config)
    model = language_model(settings)
    model.load_state_dict(language_weights(to_dynmoe(state, settings)), strict=True)
    ids = torch.arange(20) * 7 % VOCAB
    with torch.no_grad(), record_routing(model) as tape:
        found = model(ids[None]).logits[0]
    expected = official_forward.logits(family, state, config, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if top_k == TOP_ANY:  # else a part of the gate was not tried
        assert [layer.live for layer in moe_layers(model).values()] == [(0, 2, 3), (0, 1, 2)]
        k_hist = sum(call.stats.k_hist for calls in tape.values() for call in calls)
        assert (k_hist[:3] > 0).all()  # type: ignore[index]


@pytest.mark.parametrize(("family", "top_k"), EVERY)
def test_there_and_back(family: str, top_k: int) -> None:
    state = {k: v.bfloat16() for k, v in weights(family, top_k).items()}
    settings = describe(config_of(family, top_k))
    ours = to_dynmoe(state, settings)
    assert_equal(to_official(ours, settings), state)
    assert {name.partition(".")[0] for name in ours} == {"language_model", "projector"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_tower_comes_along_up_to_the_layer_that_is_read(family: str) -> None:
    state, settings = weights(family, TOP_2, tower=True), describe(config_of(family, TOP_2))
    ours = to_dynmoe(state, settings)
    assert {name for name in ours if name.startswith("vision")} == {
        "vision.model.embeddings.class_embedding",
        *(
            f"vision.model.encoder.layers.{i}.mlp.fc1.{k}"
            for i in (0, 1)
            for k in ("weight", "bias")
        ),
    }
    read = {k: v for k, v in state.items() if ".layers.2.mlp.fc1" not in k or "tower" not in k}
    read = {k: v for k, v in read.items() if "post_layernorm" not in k}
    assert_equal(to_official(ours, settings), read)
    assert_equal(to_dynmoe(read, settings), ours)


@pytest.mark.parametrize(("family", "top_k"), EVERY)
def test_back_and_there(family: str, top_k: int) -> None:
    settings = describe(config_of(family, top_k))
    model = language_model(settings)
    ours = {LANGUAGE + name: tensor for name, tensor in model.state_dict().items()}
    for index, width in {"0": 12, "2": 16}.items():
        layer = nn.Linear(width, 16)
        ours |= {f"projector.{index}.{k}": v for k, v in layer.state_dict().items()}
    official = to_official(ours, settings)
    assert {k: v.shape for k, v in official.items()} == {
        k: v.shape for k, v in weights(family, top_k).items()
    }
    assert_equal(to_dynmoe(official, settings), ours)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_qwens_gate_is_its_second_matrix() -> None:
    state = weights("qwen", TOP_2)
    ours = to_dynmoe(state, describe(config_of("qwen", TOP_2)))
    block = "language_model.model.layers.1.mlp"
    for name, official in {"gate": "w2", "up": "w1", "down": "c_proj"}.items():
        theirs = state[f"transformer.h.1.mlp.{official}.weight"]
        assert torch.equal(ours[f"{block}.{name}_proj.weight"], theirs)


def test_what_can_be_computed_is_left_out() -> None:
    settings = describe(config_of("stablelm", TOP_2))
    state = weights("stablelm", TOP_2)
    vision = "model.image_tower.image_tower.vision_model"
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        f"{vision}.embeddings.position_ids": torch.arange(3),
    }
    ours = to_dynmoe({**state, **more}, settings)
    assert_equal(ours, to_dynmoe(state, settings))
    origin = {"language_model.model.layers.0.mlp.origin.gate.weight": torch.ones(2)}
    assert_equal(to_official({**ours, **origin}, settings), state)


def test_a_linear_projector() -> None:
    settings = describe({**config_of("phi", TOP_2), "image_projector_type": "linear"})
    state = weights("phi", TOP_2)
    for leaf in ("weight", "bias"):
        name = "model.mm_projector.image_spatial_proj"
        state[f"{name}.{leaf}"] = state.pop(f"{name}.0.{leaf}")
        del state[f"{name}.2.{leaf}"]
    ours = to_dynmoe(state, settings)
    assert torch.equal(
        ours["projector.0.bias"], state["model.mm_projector.image_spatial_proj.bias"]
    )
    assert_equal(to_official(ours, settings), state)


def test_queries_without_biases() -> None:
    settings = describe({**config_of("stablelm", TOP_2), "use_qkv_bias": False})
    state = weights("stablelm", TOP_2)
    for name in [
        name for name in state if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    ]:
        del state[name]
    language_model(settings).load_state_dict(language_weights(to_dynmoe(state, settings)))


# What does not fit.


def test_missing_and_unknown_names_are_listed() -> None:
    settings, state = describe(config_of("phi", TOP_ANY)), weights("phi", TOP_ANY)
    del state["model.layers.1.mlp.fc2.bias"]
    state["model.layers.0.mlp.coefficient.weight"] = torch.ones(2, 16)
    state["model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.4.fc1.bias"] = torch.ones(2)
    message = (
        r"missing: model.layers.1.mlp.fc2.bias \(1 in all\); unknown: "
        r"model.layers.0.mlp.coefficient.weight, .*deepspeed_experts.4.fc1.bias \(2 in all\)"
    )
    with pytest.raises(DataError, match=message):
        to_dynmoe(state, settings)
    ours = to_dynmoe(weights("phi", TOP_ANY), settings)
    slot = {name for name in ours if ".layers.2.mlp.experts.slots.3." in name}
    few = {name: tensor for name, tensor in ours.items() if name not in slot}
    message = r"missing: language_model.*slots.3.0.weight, .* \.\.\. \(4 in all\)$"
    with pytest.raises(DataError, match=message):
        to_official(few, settings)


GATE = "model.layers.0.mlp.deepspeed_moe.gate.wg"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", torch.ones(1), r"gate.wg.sim_matrix: expected a temperature of 1, found"),
        ("experts_mask", torch.zeros(4), "expected a mask of zeros and ones, found .0.0, 0.0"),
        ("experts_mask", torch.full((4,), 0.5), "expected a mask of zeros and ones, found .0.5"),
        ("gates", torch.ones(5), "gate.wg.sim_matrix: the configuration has another number"),
    ],
)
def test_gates_without_a_place_here(name: str, value: Tensor, message: str) -> None:
    state = weights("stablelm", TOP_ANY)
    state[f"{GATE}.{name}"] = value
    with pytest.raises(DataError, match=message):
        to_dynmoe(state, describe(config_of("stablelm", TOP_ANY)))


def test_weights_without_a_place_there() -> None:
    settings = describe(config_of("phi", TOP_2))
    ours = to_dynmoe(weights("phi", TOP_2), settings)
    bias = {"language_model.lm_head.bias": torch.ones(VOCAB)}
    with pytest.raises(DataError, match=r"lm_head.weight: expected a zero bias"):
        to_official({**ours, **bias}, settings)
    active = {"language_model.model.layers.0.mlp.active_E": torch.arange(EXPERTS) > 0}
    with pytest.raises(DataError, match=r"router.weight: expected a fixed pool"):
        to_official({**ours, **active}, settings)


# config.json


@pytest.mark.parametrize(("family", "top_k"), EVERY)
def test_settings_there_and_back(family: str, top_k: int) -> None:
    config = config_of(family, top_k)
    settings = describe(config)
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings
    back = official_config(settings)
    assert describe(back) == settings
    assert {key: back[key] for key in config if key != "moe"} == {
        key: config[key] for key in config if key != "moe"
    }
    if top_k == DENSE:
        assert "moe" not in back and settings["moe"] == {"name": "dense", "layers": []}
        return
    assert {key: back["moe"][key] for key in config["moe"]} == config["moe"] | (
        {} if top_k == TOP_2 else {"eval_capacity_factor": EXPERTS}
    )


def test_what_the_settings_say() -> None:
    settings = describe(config_of("qwen", TOP_2))
    options = settings["language_model"]["options"]
    assert settings["language_model"]["architecture"] == "qwen2"
    assert (options["intermediate_size"], options["num_key_value_heads"]) == (24, 2)
    assert options["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert settings["vision"]["fit"] == "pad"
    assert settings["moe"] == {
        "name": "topk",
        "num_experts": 4,
        "max_experts": 4,
        "top_k": 2,
        "layers": [0, 2],
        "init": "copy",
        "expert_dropout": None,
        "aux_weight": 0.01,
    }
    assert describe(config_of("qwen", TOP_ANY))["moe"]["num_experts"] == 2


@pytest.mark.parametrize("top_k", [TOP_ANY, TOP_2])
def test_pools_are_configured_by_keys_that_the_files_have(top_k: int) -> None:
    moe = describe(config_of("phi", top_k))["moe"]
    file = CONF / "moe" / f"{moe['name']}.yaml"
    assert moe.keys() <= OmegaConf.load(file).keys()  # type: ignore[operator]


def test_what_differs_is_noted() -> None:
    (noise,) = describe(config_of("phi", TOP_2))["notes"]
    assert noise.startswith("The official gate draws the second expert with noise")
    assert describe(config_of("phi", TOP_ANY))["notes"] == []
    config = config_of("phi", TOP_2)
    config["moe"]["eval_capacity_factor"] = 1.0
    assert "at most 50% of the tokens" in describe(config)["notes"][1]


def test_every_problem_of_a_config_is_named() -> None:
    config = config_of("qwen", TOP_2)
    del config["seq_length"]
    config |= {"rotary_pct": 0.5, "image_projector_type": "qformer4", "mm_video_tower": "some"}
    config["moe"] |= {"use_residual": True, "moe_layers_idx": None}
    with pytest.raises(DataError) as error:
        describe(config)
    assert str(error.value).splitlines() == [
        "config.json: expected the keys seq_length, moe.moe_layers_idx, found none",
        "config.json: rotary_pct: expected 1.0, found 0.5, which is not supported",
        "config.json: mm_video_tower: expected None, found some, which is not supported",
        "config.json: moe.use_residual: expected False, found True, which is not supported",
        "config.json: image_projector_type: expected one of linear, mlp2x_gelu, found qformer4",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "moe_llava_llama"},
            "llava_phi, llava_stablelm, llava_qwen, llava_phi, fou",
        ),
        ({"model_type": "llava_phi"}, "expected the keys num_key_value_heads, max_position_embedd"),
        ({"kv_channels": 16}, "kv_channels: expected heads of 16 in all, found 32"),
        ({"moe": {"num_experts": [4, 2]}}, r"moe.num_experts: expected as many in every layer"),
        ({"moe": {"top_k_experts": 3}}, "moe.top_k_experts: expected 1, 2 or -1, found 3"),
    ],
)
def test_configs_that_are_refused(changed: dict[str, Any], message: str) -> None:
    config = config_of("qwen", TOP_2)
    moe = config["moe"] | changed.get("moe", {})
    with pytest.raises(DataError, match=message):
        describe({**config, **changed, "moe": moe})


# Image towers.


def test_towers_by_name() -> None:
    for name in ("openai/clip-vit-large-patch14-336", "cache/clip-vit-large-patch14-336"):
        found = tower(name, None)
        shipped = OmegaConf.load(CONF / "backbone" / "vl_stablelm.yaml").vision  # type: ignore[union-attr]
        assert found == {key: shipped[key] for key in found}
    with pytest.raises(ConfigError, match=r"Another CLIP is read from its folder: vision=FOLDER"):
        tower("google/siglip-so400m-patch14-384", None)


def test_towers_by_folder(tmp_path: Path) -> None:
    """Also of a whole CLIP."""
    CLIPConfig(vision_config={"image_size": 30, "patch_size": 10}).save_pretrained(tmp_path)
    found = tower("some/clip", str(tmp_path))
    sizes = {"model": "some/clip", "path": str(tmp_path), "image_size": 30, "patch_size": 10}
    assert found == {**sizes, "mean": MEAN, "std": STD}
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    found = tower("some/clip", str(tmp_path))
    assert (found["mean"], found["std"]) == (images["image_mean"], images["image_std"])
    SiglipVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a CLIP, found a 'siglip_vision_model'"):
        tower("some/clip", str(tmp_path))

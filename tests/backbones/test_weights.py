"""Files of pretrained weights: which forms are understood, and that nothing is left over."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dynmoe.backbones.text import build_text_classifier
from dynmoe.backbones.vision import build_vision_tower, build_vit
from dynmoe.backbones.weights import align, loaded_parts, read
from dynmoe.errors import ConfigError

SMALL = {"patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def donor() -> State:
    """Weights of which none equals the start of a new model."""
    torch.manual_seed(1)
    model = build_vit("vit_tiny_patch16_224", 1000, 3, 28, options=SMALL)
    return {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def zeros(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head")}


def vit(file: Path, **settings: Any) -> Any:
    return build_vit(
        "vit_tiny_patch16_224", 5, image_size=28, pretrained=str(file), options=SMALL, **settings
    )


def openai(state: State) -> State:
    """The names and shapes of OpenAI's CLIP; see ``_convert_openai_clip`` of timm."""
    words = {
        **{"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "attn.qkv.": "attn.in_proj_"},
        **{"attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
        **{"norm1": "ln_1", "norm2": "ln_2", "blocks.": "transformer.resblocks."},
        **{"cls_token": "class_embedding", "pos_embed": "positional_embedding"},
    }
    found = {}
    for name, tensor in body(state).items():
        shape = tensor.flatten() if name == "cls_token" else tensor
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm\.", "ln_post.", name)
        found[name] = shape.squeeze(0) if name == "positional_embedding" else shape
    return found | {"proj": torch.ones(16, 4)}


FORMS = {
    "plain": lambda s: s,
    "half": lambda s: {name: tensor.half() for name, tensor in s.items()},
    "lightning": lambda s: {"state_dict": below("model.", s), "epoch": 3},
    "timm": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "args": argparse.Namespace()},
    "dino": lambda s: {
        "student": below("module.backbone.", zeros(s)),
        "teacher": below("backbone.", s) | {"head.mlp.0.weight": torch.ones(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    },
    "flat dino": lambda s: below("student.", zeros(s)) | below("teacher.", s),
    "ddp": lambda s: below("module.", s),
    "compiled": lambda s: {"model": below("_orig_mod.module.", s)},
    "backbone": lambda s: below("backbone.", s) | {"fc.weight": torch.ones(2)},
    "module.backbone": lambda s: {"state_dict": below("module.backbone.", s)},
    "encoder": lambda s: below("encoder.", s) | below("decoder.", {"x": torch.ones(1)}),
    "visual": lambda s: below("visual.", s) | {"logit_scale": torch.ones(())},
    "open_clip": lambda s: below("visual.trunk.", s) | {"text.ln_final.bias": torch.ones(2)},
    "any word": lambda s: {"my_weights": below("net.vit.", s)},
    "mae": lambda s: {
        "model": s | {"mask_token": torch.ones(1), "decoder_pos_embed": torch.ones(1)}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_people_save(form: str, donor: State, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(FORMS[form](donor), file)
    model = vit(file)
    exact = 1e-3 if form == "half" else 0
    for name, tensor in body(donor).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=exact, rtol=exact)
    assert loaded_parts(model)[""]["tensors"] == len(body(donor))
    assert loaded_parts(model)[""]["fresh"] == ("head.bias", "head.weight")


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual."])
def test_visual_half_of_openais_clip(prefix: str, tmp_path: Path) -> None:
    model = build_vit("vit_base_patch16_clip_224", 1000, 3, 28, options=SMALL)
    state = {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    file = tmp_path / "clip.bin"
    text = {"token_embedding.weight": torch.ones(2, 2)} if prefix else {}
    torch.save(below(prefix, openai(state)) | text, file)
    found = build_vit(
        "vit_base_patch16_clip_224", 5, image_size=28, pretrained=str(file), options=SMALL
    )
    for name, tensor in body(state).items():
        assert torch.equal(found.state_dict()[name], tensor), name


def without(state: State, word: str) -> State:
    return {name: tensor for name, tensor in state.items() if word not in name}


MISFITS = {
    "no tensor": (lambda s: {}, "holds no tensors"),
    "a list": (lambda s: list(s.values()), "expected tensors by name, found a list"),
    "blocks missing": (
        lambda s: without(s, "blocks.1"),
        r"missing in the weights: blocks.1.norm1.weight, .* \.\.\. \(12 in all\)",
    ),
    "a constant missing": (lambda s: without(s, "norm1.bias"), r"missing .*\(3 in all\)"),
    "below a prefix": (lambda s: below("encoder.", without(s, "blocks.1")), "missing in"),
    "a block more": (
        lambda s: s | {"blocks.3.norm1.weight": torch.ones(16)},
        r"not in the model: blocks.3.norm1.weight \(1 in all\)",
    ),
    "another part": (lambda s: below("vit.", s) | {"neck.weight": torch.ones(1)}, "neck.weight"),
    "another model": (lambda s: {"layer1.0.conv1.weight": torch.ones(1)}, "not in the model"),
    "another width": (
        lambda s: {name: torch.cat([tensor, tensor]) for name, tensor in s.items()},
        r"another size: .*",
    ),
    "two models": (lambda s: below("a.", s) | below("b.", s), "holds several models"),
    "two parts": (lambda s: {"a": s, "b": s}, "holds several models"),
    "other naming": (lambda s: below("x_", s), "missing in the weights: .*not in the model: x_"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_leave_something_over_are_refused(
    case: str, donor: State, tmp_path: Path
) -> None:
    change, message = MISFITS[case]
    file = tmp_path / "weights.pth"
    torch.save(change(donor), file)
    with pytest.raises(ConfigError, match=message) as caught:
        vit(file)
    assert str(caught.value).startswith(f"backbone.pretrained={file}: ")


def test_the_tower_of_a_vision_language_model_is_compared_too(donor: State, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(without(donor, "blocks.2"), file)
    with pytest.raises(
        ConfigError, match=r"^backbone\.vision\.pretrained=.*missing in the weights"
    ):
        build_vision_tower(
            28, 7, [0.5], [0.5], model="vit_tiny_patch16_224", pretrained=str(file), options=SMALL
        )


def test_resized_position_embeddings_are_recorded(donor: State, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(donor, file)
    model = build_vit("vit_tiny_patch16_224", 5, image_size=35, pretrained=str(file), options=SMALL)
    assert loaded_parts(model)[""]["resized"] == ("pos_embed",)


def test_layers_of_a_text_model_that_the_configuration_lacks_are_refused(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    build_text_classifier(
        None, 2, architecture="bert", options={**size, "num_hidden_layers": 3}
    ).model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"not in the model: bert.encoder.layer.2.*16 in all"):
        build_text_classifier(
            None, 2, path=str(tmp_path), pretrained=True, options={"num_hidden_layers": 2}
        )
    model = build_text_classifier(None, 2, path=str(tmp_path), pretrained=True)
    assert loaded_parts(model)["model"]["tensors"] == len(model.state_dict())


def test_a_head_is_kept_where_it_fits(donor: State, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    own = {**body(donor), "head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}
    safetensors.torch.save_file(below("backbone.", own), file)
    assert torch.equal(vit(file, head="keep").head.weight, own["head.weight"])
    assert not torch.equal(vit(file).head.weight, own["head.weight"])
    safetensors.torch.save_file(donor, file)  # of 1,000 classes
    with pytest.raises(ConfigError, match=r"head"):
        vit(file, head="keep")
    safetensors.torch.save_file(body(donor), file)
    with pytest.raises(ConfigError, match=r"missing in the weights: head"):
        vit(file, head="keep")
    with pytest.raises(ConfigError, match=r"backbone\.head=keep.*backbone\.pretrained"):
        build_vit("vit_tiny_patch16_224", 5, options=SMALL, head="keep")


def test_a_text_models_head_is_kept_where_it_fits(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    own = build_text_classifier(
        None, 3, architecture="bert", options={**size, "num_hidden_layers": 1}
    ).model
    own.save_pretrained(tmp_path)
    load = partial(build_text_classifier, None, path=str(tmp_path), pretrained=True)
    found = load(3, head="keep").model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in own.state_dict().items())
    assert not torch.equal(load(3).model.classifier.weight, own.classifier.weight)
    with pytest.raises(ConfigError, match=r"missing in the weights: classifier"):
        load(2, head="keep")
    with pytest.raises(ConfigError, match=r"backbone\.head=keep.*backbone\.pretrained"):
        build_text_classifier(None, 3, path=str(tmp_path), head="keep")


def test_adapters_alone_are_no_weights(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="holds adapters of peft"):
        build_text_classifier(None, 2, path=str(tmp_path), pretrained=True)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / name)


def test_a_prefix_needs_most_of_the_names() -> None:
    names = {f"blocks.{i}.weight" for i in range(4)}
    state = {f"a.blocks.{i}.weight": torch.ones(1) for i in range(4)}
    assert align(state, names).prefix == "a."
    assert align({"a.blocks.0.weight": torch.ones(1)}, names).prefix == ""

"""Features are the patch tokens behind the named block, of every kind of tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dynmoe.backbones.vision import build_vision_tower, build_vit
from dynmoe.errors import ConfigError

PX, PATCH, DEPTH, WIDTH = 16, 4, 4, 12
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
}
VISION = {**SIZES, "image_size": PX, "patch_size": PATCH}
TEXT = {**SIZES, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
ALONE = {
    "clip": CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": SiglipVisionModel(SiglipVisionConfig(**VISION)),
}
WHOLE = {
    "clip": CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
    "siglip": SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
}
TIMM = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, PX, PX, generator=torch.Generator().manual_seed(0))


def build(**arguments: Any) -> Any:
    given = {"image_size": PX, "patch_size": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return build_vision_tower(**{**given, **arguments}).eval()


@pytest.mark.parametrize("layer", [-2, -1, -DEPTH])
@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("whole", [False, True])
def test_hidden_states_of_transformers(kind: str, whole: bool, layer: int, tmp_path: Path) -> None:
    """`hidden_states[-2]`: neither the last block nor the last norm; without CLIP's class token."""
    donor = (WHOLE if whole else ALONE)[kind]
    donor.save_pretrained(tmp_path)
    tower = build(library="transformers", path=str(tmp_path), pretrained=True, layer=layer)
    seen = donor.vision_model if whole else donor
    with torch.no_grad():
        expected = seen(images(), output_hidden_states=True).hidden_states[layer]
        found = tower(images())
    assert (tower.patches, tower.width) == (16, WIDTH) and found.shape == (2, 16, WIDTH)
    torch.testing.assert_close(found, expected[:, kind == "clip" :])
    assert len(tower.model.encoder.layers) == DEPTH + 1 + layer
    assert not hasattr(tower.model, "head")
    learnt = {name for name, _ in tower.named_parameters()}
    tower.train()(images()).sum().backward()
    assert learnt == {name for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", [-2, -1, -DEPTH])
@pytest.mark.parametrize(
    "model",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"],
)
def test_output_of_a_block_of_timm(model: str, layer: int, tmp_path: Path) -> None:
    """What a hook on the block sees, without class and register tokens."""
    donor: Any = build_vit(model, num_classes=0, image_size=PX, options=TIMM).eval()
    file = tmp_path / "weights.pth"
    torch.save(donor.state_dict(), file)
    tower = build(model=model, pretrained=str(file), layer=layer, options=TIMM)
    seen: list[Tensor] = []
    donor.blocks[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        donor(images())
        found = tower(images())
    assert (tower.patches, tower.width) == (16, WIDTH) and found.shape == (2, 16, WIDTH)
    torch.testing.assert_close(found, seen[0][:, donor.num_prefix_tokens :])
    assert len(tower.model.blocks) == DEPTH + 1 + layer
    tower.train()(images()).sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_without_weights_a_folder_gives_the_architecture(tmp_path: Path) -> None:
    donor = ALONE["clip"]
    donor.save_pretrained(tmp_path)
    options = {"num_hidden_layers": 3, "hidden_size": 8}
    tower = build(library="transformers", path=str(tmp_path), options=options)
    assert (len(tower.model.encoder.layers), tower.width) == (2, 8)
    tower = build(library="transformers", path=str(tmp_path))
    weight = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(tower.model.get_parameter(weight), donor.get_parameter(weight))


def test_weights_are_fp32_whatever_the_folder_says(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION)).bfloat16().save_pretrained(tmp_path)
    tower = build(library="transformers", path=str(tmp_path), pretrained=True)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


def test_dropped_blocks_cost_nothing() -> None:
    names = {name for name, _ in build(model="vit_tiny_patch16_224", options=TIMM).named_modules()}
    assert "model.blocks.2" in names and "model.blocks.3" not in names
    assert isinstance(build(model="vit_tiny_patch16_224", options=TIMM).model.norm, nn.Identity)


ALSO = {"library": "transformers", "path": "{folder}"}
VIT = {"model": "vit_tiny_patch16_224", "options": TIMM}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({**VIT, "layer": 0}, r"^backbone.vision.layer: counted from the end, -1 is the last: 0"),
    ({**VIT, "layer": -5}, r"^backbone.vision.layer=-5: this tower has 4 blocks"),
    ({**ALSO, "layer": -5}, r"^backbone.vision.layer=-5: this tower has 4 blocks"),
    ({}, r"^backbone.vision: library=timm takes a timm name as model"),
    ({**VIT, "path": "x"}, r"^backbone.vision: library=timm takes a timm name as model"),
    ({"model": "vit_tinny"}, r"^backbone.vision.model=vit_tinny: timm knows no such model"),
    (
        {"model": "resnet18"},
        r"^backbone.vision.model=resnet18: a Vision Transformer",
    ),
    (
        {**VIT, "patch_size": 8},
        r"^backbone.vision.patch_size=8: this tower makes 16 patches of 16 px. Give the size they",
    ),
    ({**ALSO, "patch_size": 8}, r"^backbone.vision.patch_size=8: this tower makes 16 patches"),
    ({**ALSO, "image_size": 32}, r"^backbone.vision.image_size=32: this tower is for 16 px"),
    ({**ALSO, "pretrained": "x.pth"}, r"^backbone.vision.pretrained: expected true or false"),
    ({"library": "transformers"}, r"^backbone.vision: expected a model of the hub"),
    (
        {"library": "transformers", "path": "nowhere"},
        r"^backbone.vision.path=nowhere: expected a folder with config.json",
    ),
    (
        {**ALSO, "options": {"num_layers": 2}},
        r"^backbone.vision.options: CLIPVisionConfig has no 'num_layers'. Did you mean 'num_lab",
    ),
    ({**ALSO, "options": {"hidden_size": "x"}}, r"(?s)^backbone.vision.options: .*expected int"),
    (
        {**ALSO, "pretrained": True, "options": {"num_hidden_layers": 5}},
        r"^backbone.vision.path=.*: the weights do not fit .*encoder.layers.4.*\(16 in all\)",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip")
    ALONE["clip"].save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_refused_towers(arguments: dict[str, Any], message: str, folder: str) -> None:
    given = dict(arguments)
    if given.get("path") == "{folder}":
        given["path"] = folder
    with pytest.raises(ConfigError, match=message):
        build(**given)


def test_other_models_of_transformers_are_no_towers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match=r"^backbone.vision: expected a CLIP or SigLIP, found a"):
        build(library="transformers", path=str(tmp_path))

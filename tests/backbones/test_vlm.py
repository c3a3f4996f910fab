"""A vision-language model: images stand where they are shown, padding nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vl_models
from torch import Tensor, nn
from torch.nn import functional as F
from vl_models import (
    BOS,
    EOS,
    GATED,
    IMG,
    MODELS,
    PAD,
    PATCHES,
    SIZES,
    VOCAB,
    WIDTH,
    tokens,
    vl_model,
)

from dynmoe.backbones.surgery import FORMS
from dynmoe.backbones.vlm import VisionLanguageModel, build_vision_language_model, train_only
from dynmoe.errors import ConfigError
from dynmoe.layers import moe_layers, record_routing

TEXT = [BOS, 7, 8, 9, 10]
ONE = [BOS, *IMG, 11, 12]
TWO = [BOS, *IMG, 13, *IMG, 14, 15, 16]
ROWS = (TWO, TEXT, ONE)

same = torch.testing.assert_close


# Images.


def test_patches_stand_in_the_places_of_their_images() -> None:
    model, batch = vl_model(), tokens(*ROWS)
    assert batch["images"].shape[0] == 3
    embedded_BND = model.embed(batch)
    patches_IPD = model.projector(model.vision(batch["images"]))
    assert patches_IPD.shape == (3, PATCHES, WIDTH)
    first, after = slice(1, 1 + PATCHES), slice(2 + PATCHES, 2 + 2 * PATCHES)
    assert torch.equal(embedded_BND[0, first], patches_IPD[0])
    assert torch.equal(embedded_BND[0, after], patches_IPD[1])
    assert torch.equal(embedded_BND[2, first], patches_IPD[2])
    words_BND = model.language_model.get_input_embeddings()(batch["input_ids"])
    text_BN = ~batch["image_mask"]
    assert torch.equal(embedded_BND[text_BN], words_BND[text_BN])


@pytest.mark.parametrize("name", MODELS)
def test_without_images_it_is_the_language_model(name: str) -> None:
    model, batch = vl_model(name), tokens(TEXT, TEXT[:3])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model.language_model(**text).logits
    found = model(batch)
    assert found.shape == (2, 5, VOCAB)
    assert torch.equal(found, expected)
    images = model(tokens(ONE))
    assert not torch.equal(images, model({**tokens(ONE), "images": torch.zeros(1, 3, 8, 8)}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("moe", [None, "topk", "dynmoe"])
def test_conversations_do_not_see_each_others_padding(name: str, moe: str | None) -> None:
    model = vl_model(name, moe)
    together = model(tokens(*ROWS))
    for index, row in enumerate(ROWS):
        same(model(tokens(row))[0], together[index, : len(row)], atol=1e-5, rtol=0)


# Heads that are more than a matrix: scales, soft caps, biases, norms and projections before them.
OWN_HEADS: dict[str, dict[str, Any]] = {
    "granite": {**GATED, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gemma2": {**GATED, "head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**GATED, "head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {**GATED, "logit_scale": 0.25},
    "granitemoe": {**GATED, "logits_scaling": 3.0, "num_local_experts": 2},
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "phi3": {**GATED, "pad_token_id": PAD},
    "olmo2": GATED,
    "qwen3": {**GATED, "head_dim": 8},
    "bloom": SIZES,
    "bert": {**SIZES, "intermediate_size": 24, "is_decoder": True},  # a transform before its head
}


@pytest.mark.parametrize("name", [*MODELS, *OWN_HEADS])
def test_loss_and_gradients_are_the_language_models_own(name: str) -> None:
    model = vl_model(name, **OWN_HEADS.get(name, {}))
    batch = vl_models.conversations([TEXT, TEXT[:3]], [(3, 4), (2,)])
    text = {key: batch.tokens[key] for key in ("input_ids", "attention_mask")}
    own = model.language_model(**text, labels=batch.label)
    own.loss.backward()
    expected = gradients(model.language_model)
    scored_M, _ = batch.scored
    same(model(batch.tokens, scored_M), own.logits.flatten(0, 1)[scored_M])
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    same(loss, own.loss)
    same(gradients(model.language_model), expected)


def test_a_head_is_computed_at_scored_positions_only() -> None:
    model, batch = vl_model(), tokens(*ROWS)
    rows: list[int] = []
    head = model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
    model(batch, torch.tensor([3, 0, 12]))
    assert rows == [3]


def test_a_head_that_is_not_called_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = vl_model(), tokens(*ROWS)
    scored_M = torch.tensor([3, 0, 12, 30])
    expected = model(batch, scored_M)
    monkeypatch.setattr(model.language_model, "get_output_embeddings", lambda: nn.Identity())
    same(model(batch, scored_M), expected)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def loss_of(model: VisionLanguageModel, batch: Any) -> Tensor:
    scored_M, target_M = batch.scored
    return F.cross_entropy(model(batch.tokens, scored_M), target_M)


def test_only_images_teach_the_projector() -> None:
    model = vl_model()
    loss_of(model, vl_models.conversations([ONE, TEXT], [(6,), (4,)])).backward()
    assert all(grad is not None and grad.any() for grad in gradients(model.projector))
    model.zero_grad()
    loss_of(model, vl_models.conversations([ONE, TEXT], [(), (4,)])).backward()
    assert all(grad is not None and not grad.any() for grad in gradients(model.projector))


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_without_images_the_projector_has_a_gradient_of_zero(projector: str) -> None:
    """None would make data-parallel processes wait for one another."""
    model = vl_model(projector=projector)
    layers = [nn.Linear, nn.GELU, nn.Linear] if projector == "mlp2x_gelu" else [nn.Linear]
    assert [type(layer) for layer in model.projector] == layers
    loss_of(model, vl_models.conversations([TEXT], [(4,)])).backward()
    assert all(grad is not None and not grad.any() for grad in gradients(model.projector))


def test_a_frozen_tower_stays_in_evaluation_mode_and_keeps_nothing() -> None:
    model = vl_model()
    train_only(model, ["projector", "language_model"])
    assert model.training and model.language_model.training and model.projector.training
    assert not any(module.training for module in model.vision.modules())
    patches: list[Tensor] = []
    model.vision.register_forward_hook(lambda *call: patches.append(call[2]))
    model(tokens(ONE))
    assert not patches[0].requires_grad
    train_only(model, ["vision"])
    assert all(module.training for module in model.vision.modules())
    loss_of(model, vl_models.conversations([ONE], [(6,)])).backward()
    assert all(grad is not None for grad in gradients(model.vision.model.blocks))


@pytest.mark.parametrize("moe", ["topk", "dynmoe"])
def test_padding_is_routed_nowhere(moe: str) -> None:
    """Images, prompts and answers are; also when activations are computed again."""
    counts = []
    for checkpointing in (False, True):
        model = vl_model(moe=moe, grad_checkpointing=checkpointing).train()
        batch = vl_models.conversations(ROWS, [(12,), (4,), (6,)])
        with record_routing(model) as tape:
            scored_M, target_M = batch.scored
            loss = F.cross_entropy(model(batch.tokens, scored_M), target_M)
        model(tokens([BOS, 7]))  # of which the recomputation knows nothing
        loss.backward()
        calls = [call for calls in tape.values() for call in calls]
        assert [int(call.stats.k_hist.sum()) for call in calls] == [13 + 5 + 7] * 2
        assert not any(call.mask[batch.tokens["attention_mask"] == 0].any() for call in calls)
        counts.append([call.stats for call in calls])
        counts.append(gradients(model))
    same(counts[2], counts[0])
    same(counts[3], counts[1])


# Experts.


def test_copies_start_at_the_dense_function() -> None:
    """Of every model, as long as every token has an expert."""
    for name in MODELS:
        batch = tokens(*ROWS)
        real_BN = batch["attention_mask"].bool()
        expected = vl_model(name)(batch)[real_BN]
        for moe in ("topk", "dynmoe"):
            model = vl_model(name, moe, {"init": "copy"})
            for layer in moe_layers(model).values():
                for threshold in getattr(layer.router, "thresholds", []):
                    nn.init.constant_(threshold, -10.0)
            same(model(batch)[real_BN], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("sparse", [0, 2, 4]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ([3, 1], [1, 3]),
        ("none", []),
    ],
)
def test_placements(layers: Any, blocks: list[int]) -> None:
    model = vl_model(moe="topk", moe_arguments={"layers": layers}, num_hidden_layers=5)
    names = [f"language_model.model.layers.{block}.mlp" for block in blocks]
    assert list(moe_layers(model)) == names


# What is trained.


def trained(model: VisionLanguageModel, *parts: Any) -> set[str]:
    train_only(model, parts)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


LAYER = "language_model.model.layers"
SWIGLU = ("gate", "up", "down")
FFNS: dict[str, tuple[set[str], set[str]]] = {
    "llama": (
        {f"{LAYER}.0.mlp.router.weight"}
        | {f"{LAYER}.0.mlp.experts.slots.{i}.{part}.weight" for i in (0, 1) for part in SWIGLU},
        {f"{LAYER}.1.mlp.{part}_proj.weight" for part in SWIGLU},
    ),
    "phi": (
        {f"{LAYER}.0.mlp.router.weight"}
        | {
            f"{LAYER}.0.mlp.experts.slots.{i}.{part}.{kind}"
            for i in (0, 1)
            for part in (0, 2)
            for kind in ("weight", "bias")
        },
        {f"{LAYER}.1.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
    ),
    "gpt2": (  # the output bias stays outside of the layer, one for all experts
        {
            "language_model.transformer.h.0.mlp.c_fc.router.weight",
            "language_model.transformer.h.0.mlp.c_proj.bias",
        }
        | {
            f"language_model.transformer.h.0.mlp.c_fc.experts.slots.{i}.{part}"
            for i in (0, 1)
            for part in ("0.weight", "0.bias", "2.weight")
        },
        {
            f"language_model.transformer.h.1.mlp.{part}.{kind}"
            for part in ("c_fc", "c_proj")
            for kind in ("weight", "bias")
        },
    ),
}
PROJECTOR = {f"projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", FFNS)
def test_what_is_trained(name: str) -> None:
    two = {"num_experts": 2, "max_experts": 2, "layers": "sparse", "keep_origin": True}
    model = vl_model(name, "topk", two)
    every = {key for key, _ in model.named_parameters()}
    origin = {key for key in every if ".origin." in key}
    moe, dense = FFNS[name]
    assert origin and moe | dense <= every - origin
    assert trained(model, "projector") == PROJECTOR
    assert trained(model, "moe_layers") == moe
    assert trained(model, "dense_ffns") == dense
    assert trained(model, "moe_layers", "dense_ffns", "projector") == moe | dense | PROJECTOR
    language = {key for key in every - origin if key.startswith("language_model.")}
    assert trained(model, "language_model") == language
    tower = {key for key in every if key.startswith("vision.")}
    assert trained(model, "vision") == tower
    assert trained(model, "vision", "projector", "language_model") == every - origin


def test_something_has_to_be_trained() -> None:
    message = (
        r"^task.module.trains: \['moe_layers'\] leaves nothing to train in this model. Choose "
        "among vision, projector, language_model, moe_layers, dense_ffns$"
    )
    with pytest.raises(ConfigError, match=message):
        train_only(vl_model(), ["moe_layers"])
    with pytest.raises(ConfigError, match=r"trains: \[\] leaves nothing"):
        train_only(vl_model(), [])


def test_a_language_model_without_a_known_form_can_be_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(FORMS, "opt")
    torch.manual_seed(0)
    options = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, **vl_models.SIZES}
    model = build_vision_language_model(
        vl_models.vision(), "linear", "simple", architecture="opt", options=options
    )
    assert trained(model, "projector") == {"projector.0.weight", "projector.0.bias"}
    with pytest.raises(ConfigError, match="'opt' models: not known where their FFNs are"):
        trained(model, "dense_ffns")


def test_every_token_needs_a_position() -> None:
    model = vl_model("gpt2", n_positions=20)
    model.check_length(20, 12, 8)
    for lengths in ((21, 1, 1), (20, 12, 9)):
        with pytest.raises(ConfigError, match=r"positions for 20 tokens.*Set data.max_length=20"):
            model.check_length(*lengths)
    vl_model("llama").check_length(10**6, 10**6, 10**6)


# Where the language model comes from.


def build(**arguments: Any) -> VisionLanguageModel:
    return build_vision_language_model(vl_models.vision(), "linear", "simple", **arguments)


def test_a_language_model_from_a_folder(tmp_path: Path) -> None:
    donor = vl_model("gpt2").language_model
    donor.generation_config.repetition_penalty = 2.0
    donor.bfloat16().save_pretrained(tmp_path)
    model = build(path=str(tmp_path), pretrained=True, vocab_size=7, pad_token_id=5)
    assert model.training and all(module.training for module in model.language_model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for key, value in donor.float().state_dict().items():
        assert torch.equal(model.language_model.state_dict()[key], value), key
    assert (model.config.vocab_size, model.pad_token_id) == (VOCAB, 5)
    assert model.config.pad_token_id == PAD  # the folder's
    assert model.config.eos_token_id == EOS  # the folder's
    assert model.language_model.generation_config.repetition_penalty is None
    untrained = build(path=str(tmp_path), pad_token_id=PAD).language_model
    weight = untrained.transformer.wte.weight
    assert not torch.equal(weight, donor.float().transformer.wte.weight)


def test_an_architecture_has_the_datas_words() -> None:
    model = vl_model()
    assert (model.config.vocab_size, model.pad_token_id) == (VOCAB, PAD)
    assert model.config.eos_token_id == EOS
    assert model.language_model.get_input_embeddings().weight.shape == (VOCAB, WIDTH)


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_the_end_token_is_learnt_where_it_is_the_padding(tmp_path: Path, pad: int) -> None:
    donor = vl_model("llama").language_model
    donor.config.pad_token_id = pad
    donor.save_pretrained(tmp_path)
    for named in ({"path": str(tmp_path)}, {"architecture": "llama", "options": MODELS["llama"]}):
        model = build(**named, vocab_size=VOCAB, pad_token_id=EOS, eos_token_id=EOS)
        model(tokens([BOS, 7, EOS, 8])).sum().backward()
        gradient = model.language_model.get_input_embeddings().weight.grad
        assert gradient[EOS].abs().max() > 0 and gradient[9].abs().max() == 0


def test_every_token_needs_an_embedding(tmp_path: Path) -> None:
    vl_model("gpt2").language_model.save_pretrained(tmp_path)
    build(path=str(tmp_path), vocab_size=VOCAB)
    with pytest.raises(ConfigError) as error:
        build(path=str(tmp_path), vocab_size=VOCAB + 1)
    assert str(error.value) == (
        f"backbone.path={tmp_path}: its tokenizer has 41 tokens, its language model embeddings of "
        "40. Take the tokenizer it was trained with, or give it more embeddings (transformers' "
        "resize_token_embeddings) and save it: backbone.path=FOLDER"
    )


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """transformers would draw what is absent."""
    vl_model("gpt2").language_model.save_pretrained(tmp_path)
    for options, found in (({"n_layer": 3}, "h.2.*12 in all"), ({"n_inner": 8}, "6 in all")):
        message = f"^backbone.path={tmp_path}: the weights do not fit the configuration; .*{found}"
        with pytest.raises(ConfigError, match=message):
            build(path=str(tmp_path), pretrained=True, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^backbone: expected a model of the hub"),
        ({"architecture": "lama"}, "^backbone.architecture=lama: transformers knows no such"),
        ({"architecture": "vit"}, "^backbone: transformers makes no causal language model of"),
        ({"architecture": "bert"}, "^backbone: a 'bert' sees .*backbone.options.is_decoder=true"),
        ({"architecture": "llama", "pretrained": True}, "an architecture has no weights"),
        ({"path": "nowhere"}, "^backbone.path=nowhere: expected a folder with config.json"),
        ({"architecture": "llama", "options": {"hiden_size": 8}}, "Did you mean 'hidden_size'"),
    ],
)
def test_refused_language_models(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**arguments)

"""Text classifiers with MoE layers: dense at the start, and padding changes nothing."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, BertModel

from dynmoe.backbones import hub
from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.text import TextClassifier, build_text_classifier
from dynmoe.config.models import AFTER_PADDING, PLACES, POSITIONS, positions_of
from dynmoe.errors import ConfigError
from dynmoe.layers import (
    AverageKeyRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    MoELayer,
    TopAnyRouter,
    TopKRouter,
    moe_layers,
    record_routing,
)
from dynmoe.runtime import set_fused_attention

NO_DROPOUT = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
NO_DROPOUT["gpt2"] = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)


def classifier(architecture: str, options: Any = None, **kwargs: Any) -> TextClassifier:
    torch.manual_seed(0)
    model = build_text_classifier(
        None,
        3,
        vocab_size=40,
        pad_token_id=0,
        architecture=architecture,
        options={**tiny(architecture), **(options or {})},
        **kwargs,
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():  # biases start at 0: they would hide errors
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def add(model: nn.Module, router: Any, num_experts: int = 4, **kwargs: Any) -> nn.Module:
    options = {"max_experts": num_experts, "layers": "all", "init": "copy", **kwargs}
    add_moe_layers(model, router=router, num_experts=num_experts, **options)
    return model


def tokens(lengths: tuple[int, ...] = (7, 4, 5), width: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_copies_start_at_the_dense_function(name: str) -> None:
    """As long as every token has an expert. All other types: test_forms.py."""
    dense = classifier(name)
    expected = dense(tokens())
    sparse = add(copy.deepcopy(dense), TopAnyRouter)
    for layer in moe_layers(sparse).values():
        for threshold in layer.router.thresholds:  # type: ignore[union-attr]
            nn.init.constant_(threshold, -10.0)
    torch.testing.assert_close(sparse(tokens()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "phi", "modernbert", "llama"])
def test_all_clusters_together_are_the_dense_function(name: str) -> None:
    dense = classifier(name)
    expected = dense(tokens())
    before = sum(p.numel() for p in dense.parameters())
    add(dense, partial(AverageKeyRouter, top_k=8, weights_sum="k"), 8, init="cluster")
    assert sum(p.numel() for p in dense.parameters()) == before
    torch.testing.assert_close(dense(tokens()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_can_be_chosen(fused: bool) -> None:
    for name in ("bert", "deberta", "gpt2", "llama", "modernbert", "mpnet"):
        model = classifier(name)
        expected = model(tokens())
        set_fused_attention(model, fused)
        used = model.config._attn_implementation
        assert used == ("sdpa" if fused and model.model._supports_sdpa else "eager")
        torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=0)


def test_a_copy_under_top_1_starts_at_the_probability_of_its_choice() -> None:
    ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    layer, x = MoELayer(ffn, 8, partial(TopKRouter, top_k=1), 4), torch.randn(5, 8)
    best = layer.router.logits(x).softmax(1).amax(1, keepdim=True)  # type: ignore[operator]
    torch.testing.assert_close(layer(x), best * ffn(x))


# Padding: what is routed, counted and learned must be the same without it.

ROUTERS = {"top-any": TopAnyRouter, "top-k": partial(TopKRouter, top_k=2)}


def sparse(name: str, router: str, training: bool, **kwargs: Any) -> TextClassifier:
    model = classifier(name, NO_DROPOUT[name], **kwargs)
    add(model, ROUTERS[router], init="fresh")
    for layer in moe_layers(model).values():
        for threshold in getattr(layer.router, "thresholds", []):
            nn.init.constant_(threshold, 0.3)  # some tokens are served by none
    return model.train(training)


def learn(model: TextClassifier, batch: dict[str, Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
    """Logits, routing and gradients."""
    model.zero_grad()
    with record_routing(model) as tape:
        logits = model(batch)
    calls = [call for calls in tape.values() for call in calls]
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % 3)
    (loss + sum(call.aux for call in calls)).backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return logits.detach(), [call.stats for call in calls], grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_padding_changes_nothing(
    name: str, router: str, training: bool, checkpointing: bool
) -> None:
    model = sparse(name, router, training, grad_checkpointing=checkpointing)
    bare = tokens((5, 5, 5), width=5)
    padded = {key: F.pad(value, (0, 4)) for key, value in bare.items()}
    expected, found = learn(model, bare), learn(model, padded)
    if router == "top-any":  # else there is no fallback to test
        assert any(0 < stats.k_hist[0] < 15 for stats in expected[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_sentences_do_not_see_each_others_padding(name: str) -> None:
    model, batch = sparse(name, "top-any", training=False), tokens((7, 2, 5))
    with record_routing(model) as together:
        logits = model(batch)
    with record_routing(model) as alone:
        for row, length in enumerate((7, 2, 5)):
            each = model({key: value[row : row + 1, :length] for key, value in batch.items()})
            torch.testing.assert_close(each[0], logits[row], atol=1e-5, rtol=0)
    for layer, (call,) in together.items():
        assert call.mask[batch["attention_mask"] == 0].sum() == 0
        for key in ("load_E", "k_hist", "unserved_D"):
            total = sum(getattr(one.stats, key) for one in alone[layer])
            torch.testing.assert_close(getattr(call.stats, key), total, atol=1e-5, rtol=1e-5)


def test_recomputation_sees_the_padding_of_its_own_forward() -> None:
    plain = sparse("bert", "top-any", training=True)
    recomputed = sparse("bert", "top-any", training=True, grad_checkpointing=True)
    _, _, expected = learn(plain, tokens((7, 4, 5)))
    logits = recomputed(tokens((7, 4, 5)))
    with record_routing(recomputed) as tape:
        logits = recomputed(tokens((7, 4, 5)))
    recomputed(tokens((2, 3, 7)))
    aux = sum(call.aux for calls in tape.values() for call in calls)
    (F.cross_entropy(logits, torch.arange(3)) + aux).backward()
    found = [torch.zeros(()) if p.grad is None else p.grad for p in recomputed.parameters()]
    torch.testing.assert_close(found, expected)


# Where models come from.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert")
    classifier("bert").model.save_pretrained(path)
    return str(path)


def test_weights_from_a_folder_under_a_head_of_another_size(folder: str) -> None:
    model = build_text_classifier("not/used", 1, path=folder, pretrained=True)
    donor = classifier("bert")
    assert model.eval()(tokens()).shape == (3, 1)
    for key, value in donor.model.bert.state_dict().items():
        assert torch.equal(model.model.bert.state_dict()[key], value)


def test_the_head_of_another_task_is_not_kept(folder: str) -> None:
    torch.manual_seed(2)
    model = build_text_classifier(None, 3, path=folder, pretrained=True)
    donor = classifier("bert")
    assert not torch.equal(model.model.classifier.weight, donor.model.classifier.weight)
    assert not model.model.classifier.bias.any()
    assert torch.equal(model.model.bert.pooler.dense.weight, donor.model.bert.pooler.dense.weight)


def test_the_architecture_of_a_folder_alone(folder: str) -> None:
    model = build_text_classifier(None, 2, path=folder, options={"num_hidden_layers": 1})
    assert len(model.model.bert.encoder.layer) == 1
    weight = model.model.bert.embeddings.word_embeddings.weight
    assert not torch.equal(weight, classifier("bert").model.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("pretrained", [False, True])
def test_fewer_embeddings_than_tokens_are_refused(folder: str, pretrained: bool) -> None:
    words = build_text_classifier(None, 2, path=folder).model.get_input_embeddings().num_embeddings
    build_text_classifier(None, 2, vocab_size=words, path=folder, pretrained=pretrained)
    with pytest.raises(ConfigError, match=f"backbone.path={folder}: .*{words + 1} tokens") as error:
        build_text_classifier(None, 2, vocab_size=words + 1, path=folder, pretrained=pretrained)
    assert "resize_token_embeddings" in str(error.value)


def test_token_types_go_to_the_models_that_know_them() -> None:
    batch = tokens()
    types = {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}
    known, unknown = (classifier(name).eval() for name in ("bert", "distilbert"))
    assert not torch.equal(known(types), known(batch))
    assert torch.equal(unknown(types), unknown(batch))
    known.check_pairs()
    unknown.check_pairs()
    with pytest.raises(ConfigError, match=r"token_type_ids.*backbone.path=FOLDER"):
        classifier("roberta", {"type_vocab_size": 1}).check_pairs()


def test_weights_are_fp32_whatever_the_folder_says(tmp_path: Path) -> None:
    classifier("bert").model.bfloat16().save_pretrained(tmp_path)
    for pretrained in (False, True):
        model = build_text_classifier(None, 2, path=str(tmp_path), pretrained=pretrained)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_decoders_get_a_token_for_padding(tmp_path: Path) -> None:
    assert classifier("gpt2").config.pad_token_id == 0
    folder = str(tmp_path)
    classifier("gpt2", {"pad_token_id": 3}).model.save_pretrained(folder)
    for given in (0, 7, None):
        for pretrained in (False, True):
            model = build_text_classifier(
                None, 2, pad_token_id=given, path=folder, pretrained=pretrained
            )
            assert model.config.pad_token_id == (0 if given is None else given)
    model = build_text_classifier(None, 2, architecture="gpt2", options=tiny("gpt2"))
    assert model.config.pad_token_id == model.config.eos_token_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a model of the hub"),
        ({"architecture": "bert", "path": "{folder}"}, "expected a model of the hub"),
        ({"architecture": "brt"}, "backbone.architecture=brt: transformers knows no such"),
        ({"architecture": "bert", "pretrained": True}, "an architecture has no weights"),
        ({"path": "{folder}/no"}, "expected a folder with config.json, weights and tokenizer"),
        (
            {"path": "{folder}", "options": {"num_layers": 1}},
            "BertConfig has no 'num_layers'. Did you mean 'num_labels'?",
        ),
        (
            {"architecture": "bert", "options": {"hidden_size": "x"}},
            "hidden_size' expected int",
        ),
        ({"architecture": "bert", "options": {"hidden_size": 7}}, "cannot build this BertConfig"),
        (
            {"path": "{folder}", "pretrained": True, "options": {"num_hidden_layers": 3}},
            r"the weights do not fit.*bert.encoder.layer.2.*\(16 in all\)",
        ),
        (
            {"model": "some/model"},
            "could not be downloaded .*backbone.path=FOLDER",
        ),
    ],
)
def test_refused_models(
    arguments: dict[str, Any], message: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        if Path(pretrained_model_name_or_path).is_dir():
            return load(pretrained_model_name_or_path, **kwargs)
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection")

    load = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    given = {
        key: value.format(folder=folder) if key == "path" else value
        for key, value in arguments.items()
    }
    with pytest.raises(ConfigError, match=message):
        build_text_classifier(**{"model": None, "num_classes": 2, **given})


def test_models_without_a_known_form_can_be_dense_only() -> None:
    options = {**tiny("albert"), "embedding_size": 16}
    model = build_text_classifier(None, 2, 40, 0, architecture="albert", options=options)
    add(model, None, layers="none")
    assert model(tokens()).shape == (3, 2)
    with pytest.raises(ConfigError, match=r"'albert' models: its blocks share .*docs/models.md"):
        add(model, TopAnyRouter)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, 20) for name in ("bert", "gpt2", "opt", "gptj", "mpt")),
        *(("roberta", 19), ("mpnet", 18), ("llama", None)),
    ],
)
def test_texts_fit_the_positions(name: str, most: int | None) -> None:
    """The first ones may be for padding (RoBERTa's up to the id 0 of it here, MPNet's up to 1);
    rotary ones have no end."""
    model = classifier(name, {"max_seq_len" if name == "mpt" else "max_position_embeddings": 20})
    model.check_length(most or 30)
    model(tokens((most or 30,), width=most or 30))
    if most is not None:
        with pytest.raises(ConfigError, match=rf"^data.max_length={most + 1}: .* {most} tokens"):
            model.check_length(most + 1)
        with pytest.raises((RuntimeError, IndexError)):
            model(tokens((most + 1,), width=most + 1))


@pytest.mark.parametrize("name", POSITIONS)
def test_the_check_of_a_command_knows_the_positions(name: str) -> None:
    config = AutoConfig.for_model(name)
    known = {*dir(config), *config.attribute_map}
    given = {**dict(zip(PLACES, (20, 30), strict=True)), "embedding_size": 16}
    model = classifier(name, {key: each for key, each in given.items() if key in known})
    assert hub.positions(model.model) == positions_of(name, 20, None)
    if name in AFTER_PADDING:
        padded = build_text_classifier(
            None, 3, 40, 1, architecture=name, options={**tiny(name), PLACES[0]: 20}
        )
        assert hub.positions(padded.model) == positions_of(name, 20, 1) == 18


def test_moe_layers_take_no_chunks_of_texts() -> None:
    model = classifier("bert", {"chunk_size_feed_forward": 4})
    with pytest.raises(ConfigError, match="chunk_size_feed_forward: expected 0 with MoE layers"):
        add(model, TopAnyRouter)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_experts_choose_tokens_in_encoders_alone(name: str) -> None:
    add(classifier(name), ExpertThresholdRouter)
    if name == "bert":
        add(classifier(name), ExpertChoiceRouter)
        return
    with pytest.raises(ConfigError, match=f"moe.router: .*'{name}' models are causal.*Choose moe="):
        add(classifier(name), ExpertChoiceRouter)


def test_expert_dropout_acts_after_the_activation() -> None:
    for name in ("bert", "llama"):
        model = add(classifier(name), TopAnyRouter, expert_dropout=0.2)
        ps = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p == 0.2]
        assert len(ps) == 2 * 4
    model = add(classifier("gpt2"), TopAnyRouter, expert_dropout=0.2)
    first = moe_layers(model)["model.transformer.h.0.mlp.c_fc"].experts.slots[0]
    assert [type(m) for m in first] == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear]


@pytest.mark.parametrize(
    "name", ["bert", "deberta-v2", "gpt2", "gpt_neox", "llama", "modernbert", "mpnet"]
)
def test_lora_trains_adapters_moe_layers_and_the_head(name: str) -> None:
    pytest.importorskip("peft")
    expected = classifier(name)(tokens())
    model = classifier(name, lora={"r": 2, "alpha": 4, "dropout": 0.0})
    adapters = [key for key, _ in model.named_parameters() if "lora_" in key]
    assert len(adapters) == 2 * (2 if name in ("gpt2", "gpt_neox", "modernbert") else 4)
    add(model, partial(TopKRouter, top_k=2), layers=[1], keep_origin=True)
    torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=0)  # B starts at 0
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    heads = ("classifier", "score", "pooler", "head")
    kept = (".1.output.dense.bias", ".1.mlp.c_proj.bias", ".1.mlp.dense_4h_to_h.bias")
    for key, _ in model.named_parameters():
        of_moe = ".experts." in key or ".router." in key or key.endswith(kept)
        head = key.split(".")[1] in heads
        assert (key in trained) == ("lora_" in key or of_moe or head), key


def test_lora_trains_a_pooler_that_was_not_pretrained(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path)
    for path, untrained in ((folder, False), (str(tmp_path), True)):
        model = build_text_classifier(None, 3, path=path, pretrained=True, lora={"r": 2})
        assert model.model.bert.pooler.dense.weight.requires_grad == untrained
        assert model.model.classifier.weight.requires_grad
        assert not model.model.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "lora"), [("electra", {"rank": 8}), ("electra", {"r": 0}), ("fnet", {"r": 2})]
)
def test_refused_adapters(name: str, lora: dict[str, int]) -> None:
    pytest.importorskip("peft")
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"^backbone.lora: expected keys among r, alpha, dropout"):
        build_text_classifier(None, 2, 40, 0, architecture=name, lora=lora, options=options)

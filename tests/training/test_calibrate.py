"""GPTQ of whole models: what calibrates each layer, on tiny models of each family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynmoe.backbones.deploy import compact_layers
from dynmoe.backbones.mixtures import own_router
from dynmoe.backbones.sparse import tune
from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.backbones.text import build_text_classifier
from dynmoe.backbones.vision import build_vit
from dynmoe.config.quantize import Choice, Quantisation
from dynmoe.errors import Diverged
from dynmoe.layers import AverageKeyRouter, ExpertThresholdRouter, TopAnyRouter, TopKRouter
from dynmoe.layers.moe import moe_layers
from dynmoe.layers.quantized import Rounding, gptq, output_error, round_to_nearest
from dynmoe.layers.soft import SoftSlots
from dynmoe.layers.zero_cost_routers import ZeroCostRouter
from dynmoe.training import block_scores
from dynmoe.training import calibrate as module
from dynmoe.training.bits import places_in
from dynmoe.training.block_scores import look, predicted_similarity
from dynmoe.training.calibrate import calibrate, round_all

SIZES: dict[str, dict[str, int]] = {
    "bert": {
        **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        "intermediate_size": 32,
    },
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 32},
}
SIZES["llama"] = {**SIZES["bert"], "num_key_value_heads": 2}
# With all experts: a flipped choice moves the outputs more than 3 bits do.
SIZES["olmoe"] = {**SIZES["llama"], "num_experts": 4, "num_experts_per_tok": 4}
SIZES["qwen2_moe"] = {
    **{**SIZES["olmoe"], "moe_intermediate_size": 32},
    "shared_expert_intermediate_size": 24,
}
TOP_2 = partial(TopKRouter, top_k=2)
NATIVE = {"router": own_router, "init": "keep", "layers": "all"}
Batches = list[tuple[Any, ...]]


def spread(model: nn.Module) -> nn.Module:
    """Weights as large as those of trained models; experts that differ."""
    generator = torch.Generator().manual_seed(0)
    for place in places_in(model):
        shape = place.weight_OI.shape
        place.weight_OI.copy_(torch.randn(shape, generator=generator) / (2 * shape[1] ** 0.5))
    return model.eval()


def text(router: Any = TOP_2, kind: str = "bert", **moe: Any) -> tuple[nn.Module, Batches]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_text_classifier(None, 3, 40, 0, architecture=kind, options=SIZES[kind])
        options = {"num_experts": 4, "max_experts": 4, "init": "copy", "layers": [0, 2], **moe}
        add_moe_layers(model, router=router, **options)
        batches = []
        for length in (9, 12, 7):
            mask = torch.ones(6, length, dtype=torch.long)
            mask[::2, length // 2 :] = 0
            ids = torch.randint(1, 40, (6, length)) * mask
            batches.append(({"input_ids": ids, "attention_mask": mask},))
    return spread(model), batches


def images(router: Any = TopAnyRouter) -> tuple[nn.Module, Batches]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"patch_size": 14, "embed_dim": 16, "depth": 3, "num_heads": 2}
        model = build_vit("vit_tiny_patch16_224", 3, image_size=28, options=options)
        add_moe_layers(
            model, router=router, num_experts=4, max_experts=4, layers=[1, 2], init="copy"
        )
        batches: Batches = [(torch.randn(8, 3, 28, 28),) for _ in range(3)]
    return spread(model), batches


MODELS: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "bert": text,
    "llama": partial(text, kind="llama"),
    "gpt2": partial(text, kind="gpt2"),
    "vit": images,
    "soft": partial(images, router=SoftSlots),
    "shared": partial(text, shared_experts=1),
    "olmoe": partial(text, kind="olmoe", **NATIVE),
    "qwen2_moe": partial(text, kind="qwen2_moe", **NATIVE),  # with a shared expert and its gate
    "moe++": partial(text, router=partial(ZeroCostRouter, top_k=2)),
}


def all_bits(model: nn.Module, bits: int = 3) -> dict[str, int]:
    return {place.name: bits for place in places_in(model)}


def outputs(model: nn.Module, batches: Batches) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(*batch) for batch in batches])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {place.name: place.weight_OI.clone() for place in places_in(model)}


HOW = Quantisation(default=3, group_size=8)


def inputs_of(model: nn.Module, batches: Batches, name: str) -> Tensor:
    """All rows that a layer gets from a whole forward, without padding where that shows."""
    found: list[Tensor] = []
    place = next(each for each in places_in(model) if each.name == name)

    def note(called: nn.Module, given: tuple[Tensor, ...]) -> None:
        rows = given[0]
        if rows.ndim == 3 and isinstance(current[0], dict):
            rows = rows[current[0]["attention_mask"].bool()]
        found.append(rows.reshape(-1, rows.shape[-1]))

    handle = place.module.register_forward_pre_hook(note)
    with torch.no_grad():
        for current in batches:
            model(*current)
    handle.remove()
    return torch.cat(found) if found else torch.zeros(0, place.weight_OI.shape[1])


def order_of(model: nn.Module) -> list[str]:
    """The layers in the order in which they have to be quantised: experts side by side."""

    def rank(name: str) -> tuple[int, ...]:
        words = ("query", "key", "value", "attention.output", "slots", "intermediate", "output")
        number = next(i for i, word in enumerate(words) if word in name)
        return (int(name.split("layer.")[1][0]), number, int(name[-1] == "2"))

    return sorted(all_bits(model), key=rank)


def test_every_layer_is_calibrated_on_the_quantised_ones_before_it() -> None:
    """A naive reference: whole forwards for one layer after the other."""
    model, batches = text()
    naive, _ = text()
    for name in order_of(naive):
        place = next(each for each in places_in(naive) if each.name == name)
        rows_NI = inputs_of(naive, batches, name)
        with torch.no_grad():
            found = gptq(place.weight_OI, rows_NI.t() @ rows_NI, Rounding(3, 8)).weight_OI
            place.weight_OI.copy_(found)
    done = calibrate(model, batches, all_bits(model), HOW)
    assert not done.fallback and set(done.errors) == set(all_bits(model))
    expected, found = state(naive), state(model)
    for name in expected:
        if name not in done.kept_rtn:
            # A weight may lie so near a border that the order of sums decides.
            differs = ((expected[name] - found[name]).abs() > 1e-4).float().mean()
            assert differs < 0.02, name


@pytest.mark.parametrize("kind", MODELS)
def test_less_error_than_rounding_in_every_layer(kind: str) -> None:
    model, batches = MODELS[kind]()
    before = outputs(model, batches)
    bits = all_bits(model)
    done = calibrate(model, batches, bits, HOW)
    assert not done.fallback and set(done.errors) == set(bits)
    kinds = {place.kind for place in places_in(model)}
    assert ("shared" in kinds) == (kind in ("shared", "qwen2_moe")) and "expert" in kinds
    assert all(error <= rtn for error, rtn in done.errors.values())
    assert sum(error < rtn for error, rtn in done.errors.values()) > 0.8 * len(bits)
    rounded, _ = MODELS[kind]()
    round_all(rounded, bits, HOW)
    assert torch.equal(outputs(MODELS[kind]()[0], batches), before)
    changes = [float((outputs(m, batches) - before).square().mean()) for m in (model, rounded)]
    # The logits of the smallest decoder are 18 rows of one token each: they do not tell so well.
    assert 0 < changes[0] < (1.5 if kind == "olmoe" else 1) * changes[1]
    grid_values = {len(w[0, :8].unique()) for w in state(model).values()}
    assert max(grid_values) <= 8


@pytest.mark.parametrize("make", [text, images])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_eight_bits_change_hardly_anything(make: Any, method: str) -> None:
    """With all experts: a token at the edge of two may choose the other."""
    model, batches = make(partial(TopKRouter, top_k=4))
    before, bits = outputs(model, batches), all_bits(model, 8)
    how = Quantisation(default=8)
    if method == "rtn":
        round_all(model, bits, how)
    else:
        calibrate(model, batches, bits, how)
    after = outputs(model, batches)
    assert 0 < (after - before).abs().max() < 1e-2


@pytest.mark.parametrize("router", [TopAnyRouter, partial(ExpertThresholdRouter, target_k=2)])
def test_what_eight_bits_change_is_choices(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the routing of before, outputs hardly move."""
    model, batches = images(router)
    before, chosen = outputs(model, batches), []
    for layer in moe_layers(model).values():
        straight = layer.router.forward

        def kept(*given: Any, straight: Any = straight, **named: Any) -> Any:
            chosen.append(straight(*given, **named))
            return chosen[-1]

        monkeypatch.setattr(layer.router, "forward", kept)
    assert torch.equal(outputs(model, batches), before)
    again = iter(list(chosen))
    for layer in moe_layers(model).values():
        monkeypatch.setattr(layer.router, "forward", lambda *given, **named: next(again))
    round_all(model, all_bits(model, 8), Quantisation(default=8))
    change = outputs(model, batches) - before
    assert 0 < change.norm() < 0.03 * before.norm() and next(again, None) is None


def test_parts_of_a_stage_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = text()
    calibrate(model, batches, all_bits(model), HOW)
    other, _ = text()
    monkeypatch.setattr(module, "HESSIANS", 10**9)  # one layer a pass
    calibrate(other, batches, all_bits(other), HOW)
    found, expected = state(other), state(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_of_16_bits_stay() -> None:
    model, batches = text()
    bits = all_bits(model)
    for name in bits:
        if "layer.1." in name or "attention" in name:
            bits[name] = 16
    before = state(model)
    calibrate(model, batches, bits, HOW)
    for name, weight_OI in state(model).items():
        assert torch.equal(weight_OI, before[name]) == (bits[name] == 16)


def test_padding_does_not_calibrate() -> None:
    model, batches = text()
    calibrate(model, batches, all_bits(model), HOW)
    padded, _ = text()
    longer = []
    for (tokens,) in batches:
        more = {name: nn.functional.pad(each, (0, 5)) for name, each in tokens.items()}
        longer.append((more,))
    calibrate(padded, longer, all_bits(padded), HOW)
    found, expected = state(padded), state(model)
    for name in expected:
        assert ((found[name] - expected[name]).abs() > 1e-4).float().mean() < 0.02, name


def test_an_expert_without_tokens_is_rounded_and_named() -> None:
    """GPTQ would make it zero."""
    model, batches = text(TopAnyRouter, layers=[1])
    (layer,) = moe_layers(model).values()
    with torch.no_grad():
        for expert, threshold in enumerate(layer.router.thresholds):
            threshold.fill_(1e6 if expert == 2 else -1e6)
    bits, before = all_bits(model), state(model)
    done = calibrate(model, batches, bits, HOW)
    assert len(done.fallback) == 2 and all("slots.2." in name for name in done.fallback)
    after = state(model)
    for name in done.fallback:
        expected = round_to_nearest(before[name], Rounding(3, 8)).weight_OI
        assert torch.equal(after[name], expected) and after[name].any()


def test_routers_that_read_experts_choose_as_before() -> None:
    """EMoE's keys are mean rows of the experts' first matrices."""
    model, batches = text(partial(AverageKeyRouter, top_k=2), init="random")
    compact_layers(model)
    layers = moe_layers(model)
    for layer in layers.values():
        layer.experts.fix_keys()
    before = {name: layer.experts.mean_keys([0, 1, 3]) for name, layer in layers.items()}
    calibrate(model, batches, all_bits(model, 2), HOW)
    assert all(torch.equal(layers[n].experts.mean_keys([0, 1, 3]), before[n]) for n in before)
    assert "fixed_keys_SD" in layers[next(iter(before))].experts.state_dict()


def test_observations_of_the_unquantised_model() -> None:
    model, batches = text()
    places = places_in(model)
    wanted = [
        Quantisation(experts=Choice("frequency", 1)),
        Quantisation(blocks=Choice("predictor", 1), linears=Choice("outlier", 0.5)),
    ]
    seen = look(model, places, batches, wanted)
    tokens = sum(int(batch[0]["attention_mask"].sum()) for batch in batches)
    assert list(seen.load) == list(moe_layers(model))
    assert all(sum(load) == 2 * tokens for load in seen.load.values())
    assert set(seen.similarity) == {0, 2} and all(-1 < s < 1 for s in seen.similarity.values())
    assert set(seen.outliers) == {place.name for place in places if place.kind != "attention"}
    assert look(model, places, batches, [Quantisation()]).load == {}


def test_an_adapter_that_adds_nothing_leaves_the_prediction() -> None:
    model, batches = images(TOP_2)
    how = [Quantisation(blocks=Choice("predictor", 1))]
    plain = look(model, places_in(model), batches, how)
    tune(model, None, {"dim": 4, "inner": 2}, pretrained=False)  # linked: blocks hand on a sum
    model.eval()
    assert look(model, places_in(model), batches, how).similarity == plain.similarity


def test_inputs_that_are_not_finite_are_refused() -> None:
    model, batches = images(TOP_2)
    batches[1][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(Diverged, match=r"blocks.0.attn.qkv: .*quant.method=rtn"):
        calibrate(model, batches, all_bits(model), HOW)


def test_the_predictor_learns_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scores, "LR", 1e-3)
    monkeypatch.setattr(block_scores, "EPOCHS", 30)
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(500, 8, generator=generator)
    high, low = (
        predicted_similarity(rows_ND, 0.3 * torch.tanh(rows_ND[:, 0]) + mean) for mean in (0.6, 0.1)
    )
    assert high == pytest.approx(0.6, abs=0.1) and low == pytest.approx(0.1, abs=0.1)


def test_errors_are_those_of_the_outputs() -> None:
    weight_OI, rows_NI = torch.randn(4, 6), torch.randn(20, 6)
    error = output_error(weight_OI, rows_NI.t() @ rows_NI)
    assert error == pytest.approx(float((rows_NI @ weight_OI.t()).square().sum()), rel=1e-4)

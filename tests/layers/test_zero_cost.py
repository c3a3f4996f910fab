"""MoE++: golden values of the authors' layer, and the logits that one layer hands to the next."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from golden_cases import cases
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe.backbones.surgery import add_moe_layers
from dynmoe.layers import MoELayer, ZeroCostRouter, moe_layers
from dynmoe.metrics.efficiency import count

DIM, FFNS = 6, 3


def official(case: Any) -> nn.Sequential:
    """Two layers with equal weights, of which the second gets the first's logits."""
    parameters = {name: torch.tensor(value) for name, value in case["parameters"].items()}
    gates = [weight for name, weight in parameters.items() if ".gate.wg" in name]
    dim, ffns, constants = gates[0].shape[1], case["num_ffn"], case["num_constant"]
    hidden = len(parameters["moe.experts.experts.0.a.weight"])
    mlp = nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )
    layers: list[MoELayer] = []
    for _ in range(2):
        make = partial(
            ZeroCostRouter,
            num_constant=constants,
            two_layer_gate=case["two_layer_gate"],
            input_scale=2.0 if case["input_times_topk"] else 1.0,
            after=layers[0].router if layers else None,  # type: ignore[arg-type]
        )
        layers.append(MoELayer(mlp, dim, make, ffns))
    for layer in layers:
        router: Any = layer.router
        if router.gate_in is not None:
            router.gate_in.data = gates[0]
        router.gate_out.data = gates[-1]
        if router.residual is not None:
            router.residual.data = parameters["moe.gate.gate_map.weight"]
        named = "moe.experts.experts.{}.{}".format
        for e, slot in enumerate(layer.experts.slots):
            for linear, part in ((slot[0], "a.weight"), (slot[2], "b.weight")):
                linear.weight.data = parameters[named(e, part)]
        each = range(ffns, ffns + constants)
        router.mix.data = torch.cat([parameters[named(e, "wg.weight")] for e in each])
        router.constants.data = torch.stack([parameters[named(e, "constant")] for e in each])
    return nn.Sequential(*layers)


@pytest.mark.parametrize("case", cases("moepp"), ids=lambda case: case["name"])
def test_two_layers_are_the_authors(case: Any) -> None:
    first, second = official(case)
    for layer, number in ((first, 1), (second, 2)):
        x_TD = torch.tensor(case[f"x{number}_TD"])
        kept = x_TD.clone()
        logits_TC = torch.tensor(case[f"logits{number}_TE"])
        if number == 2:
            first(torch.tensor(case["x1_TD"]))
        own_TC = layer.router._after(layer.router.logits(x_TD, layer.live))
        torch.testing.assert_close(own_TC, logits_TC, atol=1e-4, rtol=1e-5)
        if number == 2:
            first(torch.tensor(case["x1_TD"]))
        routing = layer.router(x_TD, layer.live)
        weights_TE = torch.tensor(case[f"weights{number}_TE"])
        ffns = case["num_ffn"]
        torch.testing.assert_close(routing.weights_TE, weights_TE[:, :ffns], atol=1e-5, rtol=0)
        assert (routing.mask_TE | (weights_TE[:, :ffns] == 0)).all()
        assert (routing.mask_TE.sum(1) + routing.free_T == 2).all()
        if number == 2:
            first(torch.tensor(case["x1_TD"]))
        out_TD = torch.tensor(case[f"out{number}_TD"])
        torch.testing.assert_close(layer(x_TD), out_TD, atol=1e-5, rtol=1e-5)
        assert torch.equal(x_TD, kept)  # the authors' code writes into the caller's tensor


def chained(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))
    layers: list[Any] = []
    for _ in range(3):
        after = layers[-1].router if layers else None
        make = partial(ZeroCostRouter, after=after, **options)
        layers.append(MoELayer(mlp, DIM, make, FFNS, init="fresh"))
    for p in nn.ModuleList(layers).parameters():
        p.data += 0.3 * torch.randn_like(p)
    return nn.Sequential(*layers)


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(30, DIM, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def in_blocks(model: nn.Sequential, x_TD: Tensor) -> Tensor:
    for layer in model:
        x_TD = x_TD + checkpoint(layer, x_TD, use_reentrant=False)
    return x_TD


def plainly(model: nn.Sequential, x_TD: Tensor) -> Tensor:
    for layer in model:
        x_TD = x_TD + layer(x_TD)
    return x_TD


def test_recomputation_gets_the_logits_of_its_own_forward(x_TD: Tensor) -> None:
    model = chained()
    want = gradients(model, plainly(model, x_TD))
    assert model[1].router.residual is not None and want[0].any()
    for _ in range(2):
        y_TD = in_blocks(model, x_TD)
        with torch.no_grad():
            plainly(model.eval(), x_TD.flip(0))  # other logits, handed on in between
        model.train()
        torch.testing.assert_close(gradients(model, y_TD), want)


def test_two_forwards_before_a_recomputation_are_refused(x_TD: Tensor) -> None:
    model = chained()
    both = in_blocks(model, x_TD) + in_blocks(model, x_TD.flip(0))
    with pytest.raises(ValueError, match=r"one forward before each backward.*no_grad"):
        gradients(model, both)
    model = chained()
    both = plainly(model, x_TD) + plainly(model, x_TD.flip(0))  # without it they are told apart
    gradients(model, both)


def test_reentrant_checkpointing_is_refused(x_TD: Tensor) -> None:
    model, x = chained(), x_TD.requires_grad_()
    y = x
    for layer in model:
        y = y + checkpoint(layer, y, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        y.sum().backward()


def test_a_layer_whose_predecessor_did_not_run_is_refused(x_TD: Tensor) -> None:
    model = chained()
    with pytest.raises(ValueError, match="it did not run"):
        model[1](x_TD)
    model[0](x_TD)
    with pytest.raises(ValueError, match=r"same 30 tokens .* it had 20"):
        model[0](x_TD[:20])
        model[1](x_TD)


def test_logits_cross_layers_with_their_gradient(x_TD: Tensor) -> None:
    model = chained()
    model[0](x_TD)
    routing = model[1].router(x_TD, model[1].live)
    grad = torch.autograd.grad(routing.weights_TE.square().sum(), model[0].router.gate_out)[0]
    assert grad.any()


def test_copies_and_pickles_have_links_of_their_own(x_TD: Tensor) -> None:
    model = chained().eval()
    want_TD = plainly(model, x_TD)
    assert torch.equal(plainly(copy.deepcopy(model), x_TD), want_TD)
    compacted = nn.Sequential(*(layer.compact() for layer in model))
    assert torch.equal(plainly(compacted, x_TD), want_TD)


@pytest.mark.slow
def test_compiled_equals_eager(x_TD: Tensor) -> None:
    model = chained()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x_TD), model(x_TD))
        torch.testing.assert_close(gradients(model, compiled(x_TD)), gradients(model, model(x_TD)))


def test_zero_takes_no_weight_and_constants_mix() -> None:
    """Two columns chosen: zero and one other, which then has weight 1."""
    router = ZeroCostRouter(2, 1, two_layer_gate=False)  # ffn, constant 0 and 1, copy, zero
    router.gate_out.data = torch.tensor([[0.0, 0], [1, 0], [-9, 0], [0, 1], [2, 2]])
    router.constants.data = torch.tensor([[5.0, 7.0], [0, 0]])
    router.mix.data.zero_()  # halves
    routing = router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), (0,))
    assert not routing.mask_TE.any() and routing.unserved_T.all()
    torch.testing.assert_close(routing.extra_TD, torch.tensor([[3.0, 3.5], [0.0, 1.0]]))
    assert routing.free_T.tolist() == [2, 2]


def test_balance_counts_free_experts_less(x_TD: Tensor) -> None:
    router = ZeroCostRouter(DIM, FFNS, free_balance=0.5)
    router.gate_out.data *= 20
    probs_TC = router.logits(x_TD, range(FFNS)).softmax(1)
    picks_TC = torch.zeros_like(probs_TC).scatter_(1, probs_TC.topk(2).indices, 1)
    eta = torch.tensor([1.0] * FFNS + [0.5] * 4)
    want = 7 * (eta * picks_TC.mean(0) * probs_TC.mean(0)).sum()
    torch.testing.assert_close(router(x_TD, range(FFNS)).aux, want)


def test_layers_of_a_model_are_linked(x_TD: Tensor) -> None:
    sizes = {"patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=2, **sizes)
    add_moe_layers(
        vit, router=ZeroCostRouter, num_experts=2, max_experts=2, layers="all", init="copy"
    )
    routers: list[Any] = [layer.router for layer in moe_layers(vit).values()]
    assert [router.residual is not None for router in routers] == [False, True, True]
    vit(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(router.residual.grad.any() for router in routers[1:])
    costs = count(vit, torch.randn(1, 3, 8, 8))["flops"]["layers"]
    first, second, _ = (each["router_fixed"] for each in costs.values())
    assert second - first == 2 * 6 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 8}, "top_k is 8: expected 1 to the number of experts, 7"),
        ({"num_copy": -1}, "num_copy is -1"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroCostRouter(DIM, FFNS, **options)


def test_layers_of_other_sizes_are_refused() -> None:
    first = ZeroCostRouter(DIM, FFNS)
    with pytest.raises(ValueError, match="gate_residual=false"):
        ZeroCostRouter(DIM, FFNS + 1, after=first)
    ZeroCostRouter(DIM, FFNS, after=first)
    with pytest.raises(ValueError, match="already gives"):
        ZeroCostRouter(DIM, FFNS, after=first)

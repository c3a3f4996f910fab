"""GeMoE against its equations, UniF-MoE against a reference of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from golden_cases import cases
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import GeMoERouter, MoELayer, UniFRouter
from dynmoe.layers.experts import naive_forward

DIM, EXPERTS, TOKENS = 6, 5, 24
LIVE = range(EXPERTS)


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(0))


def gemoe(**options: Any) -> GeMoERouter:
    torch.manual_seed(1)
    router = GeMoERouter(DIM, EXPERTS, **options)
    for p in router.parameters():
        p.data *= 40
    return router


@pytest.mark.parametrize("renormalise", [True, False])
def test_predicted_numbers_of_experts(renormalise: bool, x_TD: Tensor) -> None:
    router = gemoe(max_k=4, renormalise=renormalise)
    routing = router(x_TD, LIVE)
    probs_TE = (x_TD @ router.weight.t()).softmax(1)
    soft_T = (x_TD @ router.number_weight.t()).softmax(1) @ torch.tensor([1.0, 2.0, 3.0, 4.0])
    k_T = soft_T.round().long()
    assert routing.mask_TE.sum(1).tolist() == k_T.tolist() and len(set(k_T.tolist())) > 1
    for t, k in enumerate(k_T):
        best, experts = probs_TE[t].topk(int(k))
        want = best / best.sum() if renormalise else best
        torch.testing.assert_close(routing.weights_TE[t, experts], want)


def test_the_predictor_learns_from_the_task(x_TD: Tensor) -> None:
    """One more expert is worth what the last one adds: the gradient of its weight times itself."""
    router = gemoe(renormalise=False)
    values_E = torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5])
    routing = router(x_TD[:1], LIVE)
    (routing.weights_TE @ values_E).sum().backward()
    k = int(routing.mask_TE.sum())
    last = routing.scores_TE[0].argsort(descending=True)[k - 1]
    soft = (x_TD[:1] @ router.number_weight.t()).softmax(1) @ torch.arange(1.0, EXPERTS + 1)
    want = torch.autograd.grad(
        soft.sum() * (routing.scores_TE[0, last] * values_E[last]).detach(), router.number_weight
    )[0]
    assert router.number_weight.grad is not None
    torch.testing.assert_close(router.number_weight.grad, want)


@pytest.mark.parametrize("pairs", ["all", "spread"])
def test_monotone_loss_pair_by_pair(pairs: Any, x_TD: Tensor) -> None:
    router = gemoe(pairs=pairs, balance_weight=0.0, slope=1.2)
    real_T = torch.arange(TOKENS) != 7
    found = router(x_TD, LIVE, real_T).aux
    probs_TE = (x_TD @ router.weight.t()).softmax(1)
    bits_T = -(probs_TE * probs_TE.log2()).sum(1)
    k_T = (x_TD @ router.number_weight.t()).softmax(1) @ torch.arange(1.0, EXPERTS + 1)
    hinges = []
    for i in range(TOKENS):
        for j in range(i):
            apart = math.log2(i - j)
            if (pairs == "all" or apart == int(apart)) and real_T[i] and real_T[j]:
                high, low = (i, j) if bits_T[i] > bits_T[j] else (j, i)
                wanted = 1.2 * (bits_T[high] - bits_T[low])
                hinges.append(torch.relu(wanted - (k_T[high] - k_T[low])))
    torch.testing.assert_close(found, torch.stack(hinges).mean())
    # The entropy is a target, and the tokens are given: the loss trains the predictor alone.
    leaf_TD = x_TD.detach().requires_grad_()
    found = router(leaf_TD, LIVE, real_T).aux
    inputs = [router.weight, leaf_TD, router.number_weight]
    *others, number = torch.autograd.grad(found, inputs, materialize_grads=True)
    assert number.any() and not any(other.any() for other in others)


def test_more_than_all_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="max_k is 6: expected 1 to the number of experts, 5"):
        GeMoERouter(DIM, EXPERTS, max_k=6)


# UniF-MoE.


def reference(case: Any) -> MoELayer:
    """Experts without biases, cut into blocks of neurons."""
    up_KHD, down_KDH = torch.tensor(case["up_KHD"]), torch.tensor(case["down_KDH"])
    copies, hidden, dim = up_KHD.shape
    blocks = case["num_blocks"]
    mlp = nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )
    make = partial(UniFRouter, num_blocks=blocks, smoothing=0.0)
    layer = MoELayer(mlp, dim, make, copies * blocks, init="random")
    layer.router.weight.data = torch.tensor(case["router_KD_row0_shared"])
    size = hidden // blocks
    for number, slot in enumerate(layer.experts.slots):
        copy, block = divmod(number, blocks)
        neurons = slice(block * size, (block + 1) * size)
        slot[0].weight.data = up_KHD[copy, neurons]  # type: ignore[index, union-attr]
        slot[2].weight.data = down_KDH[copy, :, neurons]  # type: ignore[index, union-attr]
    return layer


@pytest.mark.parametrize("case", cases("unifmoe"), ids=lambda case: case["name"])
def test_blocks_are_the_references(case: Any) -> None:
    layer, x_TD = reference(case), torch.tensor(case["x_TD"])
    blocks = case["num_blocks"]
    y_TD = layer(x_TD)
    routing = layer.router(x_TD, layer.live)
    mask_TEN = routing.mask_TE.unflatten(1, (-1, blocks))
    assert mask_TEN[:, 0].int().tolist() == case["shared_block_mask_TB"]
    assert mask_TEN[:, 0].sum(1).tolist() == case["shared_blocks_T"]
    assert mask_TEN[:, 1:].any(2).int().tolist() == case["mask_TK"]
    assert routing.mask_TE.sum(1).tolist() == case["blocks_computed_T"]
    share_TEN = routing.scores_TE.unflatten(1, (-1, blocks))
    for ours, key in (
        (share_TEN[:, 0, 0], "alpha_T"),
        (share_TEN[:, 1:, 0], "probs_TK"),
        (x_TD @ layer.router.keys_ND.t(), "block_scores_TB"),
        (y_TD, "out_TD"),
        (routing.aux, "gram_loss"),
    ):
        torch.testing.assert_close(ours, torch.tensor(case[key]), atol=1e-5, rtol=1e-5)


def test_equal_copies_compute_each_block_for_alpha_or_for_the_residual_mass(x_TD: Tensor) -> None:
    """Blocks are each in the shared FFN or in every chosen residual one, never in both."""
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM, bias=False))
    layer = MoELayer(mlp, DIM, partial(UniFRouter, num_blocks=4), 16, init="random")
    y_TD, routing = layer(x_TD), layer.router(x_TD, layer.live)
    mask_TEN = routing.mask_TE.unflatten(1, (4, 4))
    k_T1 = mask_TEN[:, 1:].any(2).sum(1, keepdim=True)
    assert torch.equal(mask_TEN[:, 1:].sum(1), k_T1 * ~mask_TEN[:, 0])
    assert (mask_TEN[:, 0].sum(1) >= 1).all() and (mask_TEN[:, 0].sum(1) <= 3).all()
    per_block_TN = routing.weights_TE.unflatten(1, (4, 4)).sum(1)
    hidden_TND = torch.stack([part(x_TD) for part in layer.experts.slots[:4]], 1)
    torch.testing.assert_close(y_TD, (per_block_TN[..., None] * hidden_TND).sum(1))
    torch.testing.assert_close(y_TD, naive_forward(layer.experts, x_TD, routing, layer.live))
    gram = layer.router.weight @ layer.router.weight.t()
    torch.testing.assert_close(gram, torch.eye(4), atol=1e-5, rtol=0)  # orthonormal start
    assert F.relu(routing.aux) < 1e-5


@pytest.mark.parametrize(("slots", "blocks"), [(8, 8), (8, 3), (8, 1)])
def test_blocks_that_do_not_fit_are_refused(slots: int, blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks is {blocks}.*moe.num_experts"):
        UniFRouter(DIM, slots, num_blocks=blocks)

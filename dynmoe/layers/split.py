"""Split one trained FFN into experts: each takes an equal share of its hidden neurons.

EMoE (Qiu et al., arXiv 2310.10908). A neuron's row of the first matrix is its key: neurons with
near keys answer the same tokens. The parts add up to the FFN, whatever the shares.

Shape suffixes: D model width, H hidden neurons, E experts, N neurons of an expert.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.errors import ConfigError

ROUNDS = 100
"""At most so many rounds of k-means; trained FFNs need 10 to 40."""


def split_ffn(mlp: nn.Module, parts: int, how: Literal["cluster", "random"]) -> list[nn.Module]:
    """``parts`` FFNs whose outputs sum to that of ``mlp``.

    ``cluster``: neurons grouped by balanced k-means on their keys; ``random``: contiguous slices.
    ``mlp`` has linear layers from D to H (one, or a gate and more), then one from H to D without a
    bias, and nothing else that has parameters.

    Raises:
        ConfigError: H does not divide into ``parts``, or ``mlp`` is of another form.
    """
    *inner, outer = linears(mlp)
    hidden = outer.in_features
    plain = all(linear.out_features == hidden for linear in inner)
    others = len(list(mlp.parameters())) - sum(
        len(list(linear.parameters())) for linear in (*inner, outer)
    )
    if others or not plain or outer.bias is not None:
        raise ConfigError(
            f"moe.init={how}: expected an FFN of linear layers to and from its hidden neurons, "
            f"without output bias, found {type(mlp).__name__}. Set moe.init=copy."
        )
    if hidden % parts:
        raise ConfigError(
            f"moe.init={how}: {hidden} hidden neurons do not divide into {parts} experts. "
            f"Set moe.num_experts to a divisor of {hidden}."
        )
    if how == "cluster":
        groups_EN = balanced_clusters(inner[0].weight.detach().float(), parts)
    else:
        groups_EN = torch.arange(hidden).view(parts, -1)
    return [_part(mlp, neurons_N.to(outer.weight.device)) for neurons_N in groups_EN]


def linears(mlp: nn.Module) -> list[nn.Linear]:
    """The linear layers of an FFN, in their order: the keys first, the output last."""
    return [module for module in mlp.modules() if isinstance(module, nn.Linear)]


def balanced_clusters(keys_HD: Tensor, clusters: int) -> Tensor:
    """Groups of equal size of the rows, by direction: their indices, ascending, [E, N].

    K-means whose assignment is the best one with equal sizes, until it stays the same: seconds, at
    4096 rows up to a minute. Centres start at rows drawn with seed 0, from a generator of its own.
    """
    from scipy.optimize import linear_sum_assignment  # here: the layers need torch alone

    unit_HD = F.normalize(keys_HD.cpu(), dim=1)
    size = len(unit_HD) // clusters
    first_E = torch.randperm(len(unit_HD), generator=torch.Generator().manual_seed(0))[:clusters]
    centres_ED, groups_EN = unit_HD[first_E], None
    for _ in range(ROUNDS):
        # With equal sizes the squared norms of centres add up to a constant: the product decides.
        affinity_HE = unit_HD @ centres_ED.t()
        places_HH = affinity_HE.repeat_interleave(size, 1).numpy()
        _, place_H = linear_sum_assignment(places_HH, maximize=True)
        cluster_H = torch.from_numpy(place_H) // size
        before, groups_EN = groups_EN, cluster_H.argsort(stable=True).view(clusters, size)
        if before is not None and torch.equal(before, groups_EN):
            break
        centres_ED = unit_HD[groups_EN].mean(1)
    assert groups_EN is not None
    return groups_EN


@torch.no_grad()
def _part(mlp: nn.Module, neurons_N: Tensor) -> nn.Module:
    """A copy of ``mlp`` with some of its neurons; the others are never copied."""
    *inner, outer = linears(mlp)
    own: dict[int, object] = {}
    for linear in inner:
        for p in linear.parameters():
            own[id(p)] = nn.Parameter(p[neurons_N])
    own[id(outer.weight)] = nn.Parameter(outer.weight[:, neurons_N])
    part = copy.deepcopy(mlp, own)
    *inner, outer = linears(part)
    for linear in inner:
        linear.out_features = len(neurons_N)
    outer.in_features = len(neurons_N)
    return part

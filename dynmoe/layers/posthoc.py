"""Budgets after training: a trained router's choice with fewer or more experts, nothing trained.

A rule gives every (token, expert) pair a key, and the pairs above a cut are taken. So the mean
number of experts per token falls as the cut rises, and a wanted mean is a quantile of the keys. A
token keeps its best expert whatever the cut, unless it chose experts without an FFN, or its best
has no weight. Weights are those that the router gives such a choice (``Router.weigh``).

Shape suffixes: T tokens, E living experts, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dynmoe.layers.moe import moe_layers
from dynmoe.layers.quantile import BINS, count_distances, distance_to
from dynmoe.layers.routers import Router, Routing, hide_padding

Rule = Literal["threshold", "entropy", "ratio", "quantile", "top_k"]
RULES: tuple[Rule, ...] = get_args(Rule)
LOWERING: tuple[Rule, ...] = ("entropy", "ratio", "top_k")
"""Rules that leave out experts which the router chose, and take no others."""


def rules_of(router: Router) -> tuple[Rule, ...]:
    """Return the rules that fit a router.

    - ``threshold``: one shift of all thresholds, for routers that have some.
    - ``entropy``: a token keeps its best expert alone if the entropy of the weights that all
      experts would have, as a share of the largest one, is not above the cut.
    - ``ratio``: chosen experts stay whose weight is more than this share of the token's largest.
    - ``quantile``: pairs with a score above a cut of their layer, whatever the router chose.
    - ``top_k``: the k best of the chosen experts.

    None without ``Router.weigh``; no ``entropy`` and ``ratio`` where a token's weights are equal.
    """
    if not router.can_weigh:
        return ()
    fits = {
        "threshold": type(router).margins is not Router.margins,
        "entropy": router.graded,
        "ratio": router.graded,
    }
    return tuple(rule for rule in RULES if fits.get(rule, True))


class Keys(NamedTuple):
    """What a rule makes of a routing."""

    key_TE: Tensor
    """-inf on pairs that are never taken."""
    best_TE: Tensor
    """Bool: who serves a token with no key above the cut; at most one a token."""

    def counted(self) -> Tensor:
        """The keys, infinite where a token has an expert whatever the cut: as many pairs are above
        a cut as are taken."""
        first_TE = torch.zeros_like(self.best_TE).scatter_(
            1, self.key_TE.argmax(1, keepdim=True), self.best_TE.any(1, keepdim=True)
        )
        return self.key_TE.masked_fill(first_TE, torch.inf)


def keys(rule: Rule, router: Router, live: Sequence[int], routing: Routing) -> Keys:
    """Return the keys of ``rule``, fp32."""
    scores_TE, own_TE = routing.scores_TE, routing.mask_TE
    # Sizes: a learned gain may be negative.
    dense_TE = router.weigh(scores_TE, torch.ones_like(own_TE)).abs()
    liking_TE = scores_TE
    if rule == "threshold":
        key_TE = router.margins(scores_TE, live)
        assert key_TE is not None
    elif rule == "quantile":
        key_TE = scores_TE.masked_fill(dense_TE == 0, -torch.inf)
    elif rule == "top_k":
        order_TE = scores_TE.masked_fill(~own_TE, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        key_TE = -order_TE.argsort(dim=1).to(scores_TE.dtype)
    else:
        liking_TE = dense_TE
        if rule == "ratio":
            key_TE = dense_TE / (dense_TE * own_TE).amax(1, keepdim=True).clamp(min=1e-30)
        else:
            share_TE = dense_TE / dense_TE.sum(1, keepdim=True).clamp(min=1e-30)
            most = math.log(max(2, own_TE.shape[1]))
            entropy_T1 = torch.special.entr(share_TE).sum(1, keepdim=True) / most
            key_TE = entropy_T1.expand_as(scores_TE)
    if rule in LOWERING:
        key_TE = key_TE.masked_fill(~own_TE, -torch.inf)
    possible_TE = key_TE > -torch.inf
    needs_T1 = possible_TE.any(1, keepdim=True)
    if routing.free_T is not None:
        needs_T1 = needs_T1 & (routing.free_T == 0)[:, None]
    best_T1 = liking_TE.masked_fill(~possible_TE, -torch.inf).argmax(1, keepdim=True)
    return Keys(key_TE, torch.zeros_like(own_TE).scatter_(1, best_T1, needs_T1))


def cut(
    routing: Routing,
    keys: Keys,
    at: float,
    router: Router,
    token_mask_T: Tensor | None = None,
) -> Routing:
    """Return the routing with the pairs whose key is above ``at``.

    A token whose experts stay the same keeps its weights, bit for bit.
    """
    mask_TE = keys.key_TE > at
    mask_TE = mask_TE | (keys.best_TE & ~mask_TE.any(1, keepdim=True))
    mask_TE = hide_padding(mask_TE, token_mask_T)
    weights_TE = router.weigh(routing.scores_TE, mask_TE)
    same_T1 = (mask_TE == routing.mask_TE).all(1, keepdim=True)
    return routing._replace(
        weights_TE=torch.where(same_T1, routing.weights_TE, weights_TE),
        mask_TE=mask_TE,
        dispatch_TE=mask_TE,
        unserved_T=hide_padding(~mask_TE.any(1), token_mask_T),
    )


class Cuts:
    """The cuts of one rule, by layer, and counts of an evaluation's keys by their distance from
    them."""

    def __init__(self, rule: Rule, at: Mapping[str, float]) -> None:
        self.rule = rule
        self.at = dict(at)
        self._counts_B: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._always = 0
        self._possible = 0

    def count(self, name: str, keys: Keys, token_mask_T: Tensor | None) -> None:
        """Add the keys of one call of the layer ``name``; padding does not count."""
        key_TE = keys.counted()
        real_TE = hide_padding(torch.ones_like(keys.best_TE), token_mask_T)
        distance_TE = key_TE - self.at[name]
        counts_B = count_distances(distance_TE.reshape(-1, 1), real_TE.reshape(-1, 1))[0]
        # float64, on the host: Apple's GPUs have none.
        before_B = self._counts_B.get(name, torch.zeros(BINS, dtype=torch.float64))
        self._counts_B[name] = before_B + counts_B.cpu().double()
        self._tokens[name] = self._tokens.get(name, 0) + int(real_TE[:, 0].sum())
        self._always += int((real_TE & (key_TE == torch.inf)).sum())
        self._possible += int((real_TE & (key_TE > -torch.inf)).sum())

    @property
    def reach(self) -> tuple[float, float]:
        """The smallest and the largest mean k that cuts lead to, on the counted tokens."""
        tokens = max(1, sum(self._tokens.values()))
        return self._always / tokens, self._possible / tokens

    def moved_to(self, target_k: float) -> Cuts:
        """Return the cuts at which mean k would be ``target_k`` on the counted tokens: one for all
        layers, or one for each if the rule is ``quantile``."""
        names = list(self._counts_B)
        groups = [[name] for name in names] if self.rule == "quantile" else [names]
        moved: dict[str, float] = {}
        for group in groups:
            counts_B = torch.stack([self._counts_B[name] for name in group]).sum(0)
            wanted = target_k * counts_B.new_tensor([sum(self._tokens[name] for name in group)])
            distance = distance_to(wanted, counts_B[None]).item()
            moved |= {name: self.at[name] + distance for name in group}
        return Cuts(self.rule, moved)


@contextmanager
def changed_routing(
    model: nn.Module,
    applied: Cuts | None,
    watched: Sequence[Cuts] = (),
    counts: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Let the MoE layers of an evaluation route by the cuts of ``applied``, within the block.

    ``applied`` and ``watched`` count the keys that their rules give to the router's own choices,
    on batches where ``counts`` says so.
    Layers are told by their names (``moe_layers``).
    """

    def hook(name: str) -> Any:
        def changed(router: Router, given: tuple[Any, ...], routing: Routing) -> Routing:
            _, live, token_mask_T = given
            for each in watched if counts() else ():
                each.count(name, keys(each.rule, router, live, routing), token_mask_T)
            if applied is None:
                return routing
            found = keys(applied.rule, router, live, routing)
            if counts():
                applied.count(name, found, token_mask_T)
            return cut(routing, found, applied.at[name], router, token_mask_T)

        return changed

    with ExitStack() as stack:
        for name, layer in moe_layers(model).items():
            stack.callback(layer.router.register_forward_hook(hook(name)).remove)
        yield

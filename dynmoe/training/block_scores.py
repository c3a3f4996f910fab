"""Observations of the unquantised model on calibration data, for the policies that ask for them.

Shape suffixes: N tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.config.quantize import Quantisation
from dynmoe.layers.moe import record_routing
from dynmoe.layers.quantized import outlier_score
from dynmoe.training.bits import Place, Seen, mixture_blocks
from dynmoe.training.calibrate import Inputs, Replay, hooked

TOKENS = 4096
"""A predictor is fitted to about so many tokens of the calibration data."""
HIDDEN, EPOCHS, PATIENCE, HELD_OUT, BATCH = 1024, 100, 5, 0.1, 128
LR, WEIGHT_DECAY = 1e-4, 1e-2


def look(
    backbone: nn.Module,
    places: Sequence[Place],
    batches: Sequence[Inputs],
    wanted: Sequence[Quantisation],
) -> Seen:
    """Return what the policies of the ``wanted`` quantisations ask for. The model is in evaluation
    mode, and not quantised yet."""
    rules = {(policy, each.rule) for how in wanted for policy, each in _choices(how)}
    seen = Seen()
    if ("linears", "outlier") in rules:
        ffns = (place for place in places if place.kind != "attention")
        seen.outliers = {place.name: outlier_score(place.weight_OI) for place in ffns}
    predicted = mixture_blocks(places) if ("blocks", "predictor") in rules else []
    if predicted or {("experts", "frequency"), ("experts", "rare")} & rules:
        _run(backbone, batches, predicted, seen)
    return seen


def _choices(how: Quantisation) -> list[tuple[str, Any]]:
    given = {"experts": how.experts, "blocks": how.blocks, "linears": how.linears}
    return [(policy, choice) for policy, choice in given.items() if choice is not None]


def _run(
    backbone: nn.Module, batches: Sequence[Inputs], predicted: Collection[int], seen: Seen
) -> None:
    """Count the tokens of experts, and fit the predictors of the blocks ``predicted``."""
    replay = Replay(backbone, batches)
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in predicted}
    share = TOKENS // len(batches) + 1

    def keep(number: int) -> Any:
        def add(block: nn.Module, given: Any, named: Any, output: Any) -> None:
            before, after = (
                replay.padding.of(each)
                for each in (
                    _tokens(given[0] if given else named["hidden_states"]),
                    _tokens(output),
                )
            )
            # Tokens from all over the batch.
            every = max(1, len(before) // share)
            before_ND = before[::every].float()
            cosine_N = F.cosine_similarity(before_ND, after[::every].float())
            pairs[number].append((before_ND.cpu(), cosine_N.cpu()))

        return add

    handles = [
        replay.blocks[number].register_forward_hook(keep(number), with_kwargs=True)
        for number in predicted
    ]
    with hooked(handles), record_routing(backbone) as tape:
        replay.run(range(len(batches)))
    seen.load = {
        name: torch.stack([call.stats.load_E for call in calls]).sum(0).tolist()
        for name, calls in tape.items()
    }
    for number in predicted:
        rows, cosines = zip(*pairs[number], strict=True)
        seen.similarity[number] = predicted_similarity(torch.cat(rows), torch.cat(cosines))


def _tokens(stream: Any) -> Tensor:
    """The tokens of what enters or leaves a block; some blocks hand more on beside them."""
    tokens: Tensor = stream if isinstance(stream, Tensor) else stream[0]
    return tokens


@torch.enable_grad()
def predicted_similarity(rows_ND: Tensor, cosine_N: Tensor) -> float:
    """Fit QuantMoE-Bench's predictor of a block to tokens; return its mean over them.

    It tells the cosine of a token before and after the block from the token before it: D to 1024,
    ReLU, to 1, tanh, no biases; squared error, AdamW, the weights of the best epoch on held-out
    tokens. Initial weights and order are always the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = nn.Sequential(
            nn.Linear(rows_ND.shape[1], HIDDEN, bias=False),
            nn.ReLU(),
            nn.Linear(HIDDEN, 1, bias=False),
            nn.Tanh(),
        )
        optimizer = torch.optim.AdamW(predictor.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        order_N = torch.randperm(len(rows_ND))
        held_out = max(1, round(HELD_OUT * len(rows_ND)))
        tested_N, trained_N = order_N[:held_out], order_N[held_out:]
        least, waited = float("inf"), 0
        best = {name: p.clone() for name, p in predictor.state_dict().items()}
        for _ in range(EPOCHS):
            for part_N in trained_N[torch.randperm(len(trained_N))].split(BATCH):
                loss = F.mse_loss(predictor(rows_ND[part_N])[:, 0], cosine_N[part_N])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                error = float(F.mse_loss(predictor(rows_ND[tested_N])[:, 0], cosine_N[tested_N]))
            if error < least:
                least, waited = error, 0
                best = {name: p.clone() for name, p in predictor.state_dict().items()}
            elif (waited := waited + 1) == PATIENCE:
                break
    predictor.load_state_dict(best)
    with torch.no_grad():
        return float(predictor(rows_ND).mean())

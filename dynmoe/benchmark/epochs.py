"""Training epochs on texts, of several loops that are measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from dynmoe.benchmark.rows import EpochRow
from dynmoe.benchmark.timing import Sample, Speed, interleave
from dynmoe.data.protocol import IntArray


class Work(NamedTuple):
    """What an epoch consists of."""

    steps: int
    samples: int
    tokens: int
    positions: int
    """Tokens and padding."""

    @classmethod
    def of(cls, batches: Iterable[IntArray]) -> Work:
        """``batches``: the tokens of each text of each batch, which is padded to the longest."""
        sizes = [(1, len(b), int(b.sum()), len(b) * int(b.max())) for b in batches]
        return cls(*(sum(column) for column in zip(*sizes, strict=True)))


def measure_epochs(
    loops: Mapping[str, Callable[[], object]],
    work: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    advance: Callable[[int, int], None],
) -> list[EpochRow]:
    """A row for each of the ``loops``, whose calls are epochs; the first is the reference.

    Speeds are compared by token: the first steps of an epoch are of other texts in each loop.
    """
    reference = next(iter(loops))
    samples = interleave(loops, rounds, device, reference, advance, warm_ups=1)
    per_token = {
        name: [Sample(each.seconds / work[name].tokens, each.contaminated) for each in found]
        for name, found in samples.items()
    }
    rows = []
    for name, own in work.items():
        speed = Speed.of(per_token[name], per_token[reference], 1)
        seconds, low, high = (
            ms / 1e3 * own.tokens for ms in (speed.median_ms, *speed.quartiles_ms)
        )
        rows.append(
            EpochRow(
                case=name,
                steps=own.steps,
                samples=own.samples,
                tokens=own.tokens,
                padded=1 - own.tokens / own.positions,
                seconds=seconds,
                seconds_quartiles=(low, high),
                samples_per_s=own.samples / seconds,
                tokens_per_s=speed.per_s,
                ratio=speed.ratio,
                ratio_quartiles=speed.ratio_quartiles,
                rounds=len(samples[name]),
                contaminated=speed.contaminated,
            )
        )
    return rows

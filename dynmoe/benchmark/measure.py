"""One shape and one k: build the cases, time them in turns, count their memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from dynmoe.benchmark.cases import Case, Precision, build_cases
from dynmoe.benchmark.memory import peak_and_kept
from dynmoe.benchmark.plan import Shape
from dynmoe.benchmark.rows import LayerRow
from dynmoe.benchmark.timing import Sample, Speed, interleave, paired


def measure(
    shape: Shape,
    k: float,
    names: Sequence[str],
    rounds: int,
    precision: Precision,
    device: torch.device,
    advance: Callable[[int, int], None],
) -> list[LayerRow]:
    """A row for ``limit`` and for each named case that exists at this k.

    ``advance`` is told the samples that are done, of how many.
    """
    cases = build_cases(shape, k, names, precision, device)
    samples = interleave(cases, rounds, device, advance=advance)
    kept = {name: _kept_and_peak(case, device) for name, case in cases.items()}
    rows = []
    for name, case in cases.items():
        flops = 12 * case.pairs * shape.dim * shape.hidden
        speed = Speed.of(samples[name], samples["limit"], flops)
        rows.append(
            LayerRow(
                *shape,
                k=k,
                real_k=case.pairs / shape.tokens,
                case=name,
                median_ms=speed.median_ms,
                quartiles_ms=speed.quartiles_ms,
                ratio=speed.ratio,
                ratio_quartiles=speed.ratio_quartiles,
                gflops=speed.per_s / 1e9,
                kept_bytes=kept[name][0],
                kept_ratio=kept[name][0] / kept["limit"][0],
                peak_bytes=kept[name][1],
                rounds=len(samples[name]),
                slow=len(samples[name]) < rounds,
                contaminated=speed.contaminated,
                router_share=_router_share(samples) if name == "layer" else None,
            )
        )
    return rows


def _router_share(samples: Mapping[str, Sequence[Sample]]) -> float | None:
    if "experts" not in samples:
        return None
    return 1 - paired(samples["experts"], samples["layer"]).median


def _kept_and_peak(case: Case, device: torch.device) -> tuple[int, int]:
    """Bytes for the backward pass, input rows included and output rows not; and the peak.

    On the first draw, whose k is the one asked for. The input rows count because they differ:
    [P, D] for the limit, [T, D] for a layer. The output does not: whoever comes next in a model
    keeps it.
    """
    first = case.draws[0]
    memory = peak_and_kept(partial(case.forward, first), partial(case.backward, first), device)
    return memory.kept + first.x_TD.nbytes - memory.output, memory.peak

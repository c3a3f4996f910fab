"""Interleaved timing on a machine that is not quiet: what is compared is measured in turns."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

from dynmoe.runtime import release_memory

MIN_SAMPLE = 0.1
"""Seconds. /proc/stat counts in steps of 10 ms: a shorter sample says nothing about others."""
OTHERS_SHARE = 0.1
"""A sample is contaminated when other processes had more than this of its wall time x threads."""
SLOW = 5.0
"""A case slower than this many times the reference is sampled ``SLOW_ROUNDS`` times only."""
SLOW_ROUNDS = 3


class Sample(NamedTuple):
    """One timed batch of calls."""

    seconds: float
    """Per call."""
    contaminated: bool


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        return cls(*np.percentile(values, [25, 50, 75]).tolist())


def interleave(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    reference: str = "limit",
    advance: Callable[[int, int], None] = lambda done, total: None,
    whole: int = 1,
    warm_ups: int = 2,
) -> dict[str, list[Sample]]:
    """Time the cases round-robin, in a new (seeded) order each round.

    What a case returns, its gradients, is freed outside the timing. ``advance`` is told the samples
    that are done, of how many. A sample is of a multiple of ``whole`` calls: what a case works on
    may come around in so many.

    Returns:
        Of each case one sample per round; those of a slow case are from the first rounds.
    """
    warm = {}
    for name, case in cases.items():
        for _ in range(warm_ups):  # the first call creates kernels and fills the allocator
            warm[name] = _seconds(case, whole, device) / whole
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    slow = {name for name in cases if warm[name] > SLOW * warm[reference]}
    turns = [
        [name for name in cases if turn < SLOW_ROUNDS or name not in slow] for turn in range(rounds)
    ]
    order = random.Random(0)
    done, total = 0, sum(map(len, turns))
    for turn in turns:
        for name in order.sample(turn, len(turn)):
            calls = whole * max(1, math.ceil(MIN_SAMPLE / (whole * warm[name])))
            samples[name].append(_sample(cases[name], calls, device))
            if name in slow:  # and large: with what it frees, the tuned heap grew to 24 GiB
                release_memory()
            done += 1
            advance(done, total)
    return samples


def clean(samples: Sequence[Sample]) -> list[float]:
    """Seconds of the clean samples; of all of them where fewer than half are clean."""
    kept = [s.seconds for s in samples if not s.contaminated]
    return kept if 2 * len(kept) >= len(samples) else [s.seconds for s in samples]


def paired(over: Sequence[Sample], under: Sequence[Sample]) -> Quartiles:
    """Quartiles of ``over / under`` within rounds: the machine's drift is in both, and cancels."""
    return Quartiles.of(
        clean(
            [
                Sample(a.seconds / b.seconds, a.contaminated or b.contaminated)
                for a, b in zip(over, under, strict=False)
            ]
        )
    )


class Speed(NamedTuple):
    """One case beside the reference. Pairs are quartiles."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    per_s: float
    """Of what a call does ``size`` of."""
    per_s_quartiles: tuple[float, float]
    ratio: float
    """The reference's time over this one's, the median over rounds."""
    ratio_quartiles: tuple[float, float]
    contaminated: int

    @classmethod
    def of(cls, samples: Sequence[Sample], reference: Sequence[Sample], size: float) -> Speed:
        seconds, ratio = Quartiles.of(clean(samples)), paired(reference, samples)
        return cls(
            1e3 * seconds.median,
            (1e3 * seconds.low, 1e3 * seconds.high),
            size / seconds.median,
            (size / seconds.high, size / seconds.low),
            ratio.median,
            (ratio.low, ratio.high),
            sum(sample.contaminated for sample in samples),
        )


def _sample(case: Callable[[], object], calls: int, device: torch.device) -> Sample:
    if device.type == "cuda":
        return Sample(_seconds(case, calls, device) / calls, False)
    others, start = _others(), time.perf_counter()
    seconds = _seconds(case, calls, device)
    wall = time.perf_counter() - start
    share = (_others() - others) / (wall * torch.get_num_threads())
    return Sample(seconds / calls, share > OTHERS_SHARE)


def _seconds(case: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _seconds_on_cuda(case, calls, device)
    seconds = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        gradients = case()
        seconds += time.perf_counter() - start
        del gradients
    return seconds


def _seconds_on_cuda(case: Callable[[], object], calls: int, device: torch.device) -> float:
    events = []
    for _ in range(calls):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        case()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(end) for start, end in events) / 1000


def _others() -> float:
    """CPU seconds that all other processes have used so far; where there is no /proc/stat, 0."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    # user nice system idle iowait irq softirq steal; guests are in user (proc_stat(5)).
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


# Bytes a forward pass leaves for its backward pass, and the peak of both: exact and repeatable.

Outputs = tuple[Tensor, ...]


class Memory(NamedTuple):
    """Bytes beyond what was there before the forward pass: inputs, weights, incoming gradient."""

    kept: int
    """Held between forward and backward; the outputs are part of it."""
    output: int
    """The first output alone."""
    peak: int
    """The most held at any time of forward and backward; gradients are part of it."""


def peak_and_kept(
    forward: Callable[[], Outputs], backward: Callable[[Outputs], object], device: torch.device
) -> Memory:
    """Run one forward and one backward pass and count every allocation in them.

    On a CPU these are the allocator's events in ``torch.profiler``, so the size of the process,
    what malloc keeps, and other processes do not matter. On CUDA it is the caching allocator's
    count, which rounds each tensor up to 512 bytes.
    """
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    with measure(device) as first:
        outputs = forward()
    output = outputs[0].nbytes
    with measure(device) as second:
        gradients = backward(outputs)
    del gradients
    return Memory(first.kept, output, max(first.peak, first.kept + second.peak))


class _Span:
    """Change and highest point of the allocated bytes in a block of code."""

    kept = 0
    peak = 0


@contextmanager
def _on_cuda(device: torch.device) -> Iterator[_Span]:
    span = _Span()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield span
    torch.cuda.synchronize(device)
    span.kept = torch.cuda.memory_allocated(device) - before
    span.peak = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _on_cpu(device: torch.device) -> Iterator[_Span]:
    span = _Span()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield span
    assert record.profiler is not None and record.profiler.kineto_results is not None
    changes = sorted(_changes(record.profiler.kineto_results.experimental_event_tree()))
    held = list(accumulate((size for _, size in changes), initial=0))
    span.kept, span.peak = held[-1], max(held)


def _changes(events: list[_ProfilerEvent]) -> Iterator[tuple[int, int]]:
    """(time in ns, bytes) of every allocation (> 0) and release (< 0) in a tree of events."""
    for event in events:
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation):
            yield event.start_time_ns, fields.alloc_size
        yield from _changes(event.children)

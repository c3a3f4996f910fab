"""Interleaved timing on a machine that is not quiet, and bytes of forward and backward passes."""

from __future__ import annotations

import argparse
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

from dynmoe.benchmark.results import Advance, Facts, Row
from dynmoe.errors import ConfigError
from dynmoe.runtime import machine, release_memory

MIN_SAMPLE = 0.1
"""Seconds. /proc/stat counts in steps of 10 ms: too coarse for the others' share of less."""
OTHERS_SHARE = 0.1
"""A sample is contaminated when other processes used more than this share of its wall time x
threads."""
SLOW = 5.0
"""A case slower than this many times the reference is sampled ``SLOW_ROUNDS`` times only."""
SLOW_ROUNDS = 3


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device to measure; set the number of threads.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine_facts(device: torch.device, dtype: str) -> Facts:
    """Return processor and PyTorch as they are now; ``dtype``: of the computation, in words."""
    on_cuda = device.type == "cuda"
    return {
        **machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "dtype": dtype,
    }


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
    advance: Advance = lambda done, total: None,
    whole: int = 1,
    warm_ups: int = 2,
) -> dict[str, list[Sample]]:
    """Time the cases round-robin, in a new (seeded) order each round.

    The result of a case, its gradients, is freed outside the timing. A sample consists of a
    multiple of ``whole`` calls, after which the case has seen all of its batches.

    Returns:
        One sample per round of each case; of a slow case, only those of the first rounds.
    """
    warm = {}
    for name, case in cases.items():
        for _ in range(warm_ups):  # the first call creates kernels and fills the allocator
            warm[name] = sample(case, whole, device).seconds
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    slow = {name for name in cases if warm[name] > SLOW * warm[reference]}
    schedule = [
        [name for name in cases if i < SLOW_ROUNDS or name not in slow] for i in range(rounds)
    ]
    order = random.Random(0)
    done, total = 0, sum(map(len, schedule))
    for names in schedule:
        for name in order.sample(names, len(names)):
            calls = whole * max(1, math.ceil(MIN_SAMPLE / (whole * warm[name])))
            samples[name].append(sample(cases[name], calls, device))
            if name in slow:  # and large: the tuned heap once grew to 24 GiB by what it frees
                release_memory()
            done += 1
            advance(done, total)
    return samples


def clean(samples: Sequence[Sample]) -> list[float]:
    """Return the seconds of the clean samples, or of all where fewer than half are clean."""
    kept = [s.seconds for s in samples if not s.contaminated]
    return kept if 2 * len(kept) >= len(samples) else [s.seconds for s in samples]


def paired(over: Sequence[Sample], under: Sequence[Sample]) -> Quartiles:
    """Return quartiles of ``over / under`` within rounds: the machine's drift cancels."""
    return Quartiles.of(
        clean(
            [
                Sample(a.seconds / b.seconds, a.contaminated or b.contaminated)
                for a, b in zip(over, under, strict=False)
            ]
        )
    )


def speed(
    samples: Sequence[Sample],
    reference: Sequence[Sample],
    size: float,
    rate: str,
    reference_size: float | None = None,
) -> Row:
    """Return the fields that every timed row has.

    ``size`` is the work of a call, in the unit of ``rate``; that of the reference is equal unless
    given.

    Returns:
        ``median_ms`` and ``quartiles_ms`` of a call, ``<rate>`` and ``<rate>_quartiles``,
        ``ratio`` and ``ratio_quartiles`` (speed over that of the reference in the same round),
        ``rounds``, and ``contaminated``, the number of disturbed samples.
    """
    times, ratio = Quartiles.of(clean(samples)), paired(reference, samples)
    scale = 1.0 if reference_size is None else size / reference_size
    return {
        "median_ms": 1e3 * times.median,
        "quartiles_ms": (1e3 * times.low, 1e3 * times.high),
        rate: size / times.median,
        f"{rate}_quartiles": (size / times.high, size / times.low),
        "ratio": scale * ratio.median,
        "ratio_quartiles": (scale * ratio.low, scale * ratio.high),
        "rounds": len(samples),
        "contaminated": sum(sample.contaminated for sample in samples),
    }


def sample(case: Callable[[], object], calls: int, device: torch.device) -> Sample:
    """Time so many calls. A case with a ``sample`` of its own is timed where it is."""
    if hasattr(case, "sample"):
        timed: Sample = case.sample(calls)
        return timed
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
    """Return the CPU seconds that all other processes have used; 0 without a /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    # user nice system idle iowait irq softirq steal; guests are in user (proc_stat(5)).
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


# Bytes that a forward pass keeps for its backward pass, and the peak of both. Counts of the
# allocator are exact and repeatable.

Outputs = tuple[Tensor, ...]


class PassMemory(NamedTuple):
    """Bytes beyond those that were there before: inputs, weights, incoming gradient."""

    kept: int
    """Held between forward and backward; the outputs are part of it."""
    output: int
    """The first output alone."""
    peak: int
    """The most held at any time of forward and backward; gradients are part of it."""


def peak_and_kept(
    forward: Callable[[], Outputs], backward: Callable[[Outputs], object], device: torch.device
) -> PassMemory:
    """Run one forward and one backward pass and count every allocation in them.

    On a CPU these are the allocator's events in ``torch.profiler``, so neither the size of the
    process, nor memory that malloc keeps, nor other processes matter. On CUDA it is the caching
    allocator's count, which rounds each tensor up to 512 bytes.
    """
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    with measure(device) as first:
        outputs = forward()
    output = outputs[0].nbytes
    with measure(device) as second:
        gradients = backward(outputs)
    del gradients
    return PassMemory(first.kept, output, max(first.peak, first.kept + second.peak))


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
    """Yield (time in ns, bytes) of every allocation (> 0) and release (< 0) in a tree of events."""
    for event in events:
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation):
            yield event.start_time_ns, fields.alloc_size
        yield from _changes(event.children)

"""Bytes a forward pass leaves for its backward pass, and the peak of both: exact and repeatable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

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

"""Counts of calls in a sample, and numbers made of samples. No time is asserted."""

from __future__ import annotations

import pytest
import torch

from dynmoe.benchmark import timing
from dynmoe.benchmark.timing import Sample, clean, interleave, paired


def test_slow_cases_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"limit": 1.0, "as fast": 5.0, "slow": 5.1}
    monkeypatch.setattr(timing, "_seconds", lambda case, calls, device: case() * calls)
    told: list[tuple[int, int]] = []
    samples = interleave(
        {name: lambda s=s: s for name, s in seconds.items()},  # type: ignore[misc]
        rounds=6,
        device=torch.device("cpu"),
        advance=lambda done, total: told.append((done, total)),
    )
    assert {name: len(found) for name, found in samples.items()} == {
        "limit": 6,
        "as fast": 6,
        "slow": timing.SLOW_ROUNDS,
    }
    assert samples["as fast"][0].seconds == 5.0
    assert told == [(i, 15) for i in range(1, 16)]


def test_short_calls_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    monkeypatch.setattr(
        timing, "_seconds", lambda case, calls, device: batches.append(calls) or 0.03 * calls
    )
    (sample,) = interleave({"limit": object}, 1, torch.device("cpu"))["limit"]
    assert batches == [1, 1, 4]
    assert sample.seconds == pytest.approx(0.03)


def test_samples_are_of_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    monkeypatch.setattr(
        timing, "_seconds", lambda case, calls, device: batches.append(calls) or 0.03 * calls
    )
    (sample,) = interleave({"limit": object}, 1, torch.device("cpu"), whole=3, warm_ups=1)["limit"]
    assert batches == [3, 6]
    assert sample.seconds == pytest.approx(0.03)


@pytest.mark.parametrize(("others", "contaminated"), [(0.19, False), (0.21, True)])
def test_contaminated_by_other_processes(
    monkeypatch: pytest.MonkeyPatch, others: float, contaminated: bool
) -> None:
    """Two threads, one second of wall time: 10 % are 0.2 s of CPU time."""
    used, now = iter([7.0, 7.0 + others]), iter([1.0, 2.0])
    monkeypatch.setattr(timing, "_others", lambda: next(used))
    monkeypatch.setattr(timing, "_seconds", lambda case, calls, device: 1.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.sample(object, 1, torch.device("cpu")).contaminated is contaminated


def test_contaminated_samples_count_only_where_most_are() -> None:
    assert clean([Sample(1, False), Sample(9, True)]) == [1]
    assert clean([Sample(1, False), Sample(9, True), Sample(8, True)]) == [1, 9, 8]


def test_ratios_are_of_the_same_round() -> None:
    limit = [Sample(1, False), Sample(2, False), Sample(4, False), Sample(100, True)]
    case = [Sample(2, False), Sample(4, False), Sample(8, False), Sample(1, False)]
    assert paired(limit, case) == (0.5, 0.5, 0.5)

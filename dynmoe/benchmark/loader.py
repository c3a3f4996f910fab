"""How fast the training loader of a data module gives images, with nobody waiting for a model."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dynmoe.benchmark.rows import DataRow
from dynmoe.data.images.batches import Batch
from dynmoe.data.images.module import DomainData

WARM_UP = 3
"""Batches: workers start, transforms are set up."""


def measure_loader(data: DomainData, seconds: float) -> DataRow:
    """Iterate the training loader for so many ``seconds`` after a warm-up.

    ``data`` has been set up, with ``steps`` and ``eval_every`` of ``ENDLESS``.
    """
    data.repeat_evaluation_of(0)  # go on after step 0, behind which there is an evaluation
    batches: Iterator[Batch] = iter(data.train_dataloader())
    for _ in range(WARM_UP):
        next(batches)
    images, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += len(next(batches).label)
    used = _cpu_seconds()
    return DataRow(
        workers=data.num_workers,
        images=images,
        seconds=passed,
        images_per_s=images / passed,
        ms_per_image=1e3 * passed / images,
        cpu_ms_per_image=None if cpu is None or used is None else 1e3 * (used - cpu) / images,
    )


def _cpu_seconds() -> float | None:
    """CPU time of this process and, by /proc/<pid>/stat, its living children, the workers.

    resource.getrusage counts children only after they ended, and then their warm-up too.
    """
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if not stat.exists():
            return None
        # utime and stime are fields 14 and 15 (proc_pid_stat(5)); field 2 may contain spaces.
        fields = stat.read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total

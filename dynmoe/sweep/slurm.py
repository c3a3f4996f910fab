"""Jobs of a sweep in the queue of Slurm: which are there, how they end, and how to cancel them.

Slurm's own queue is asked, so that a launcher that was killed, or another one, finds every job: a
batch is known by a token in the name of its jobs, and a file that is there before the batch is
submitted says which run each element of its array is. `squeue` is enough; accounting (`sacct`) is
not needed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dynmoe.errors import UserError

LONGEST = 1000
"""Jobs of an array: Slurm's default of MaxArraySize is 1001."""

# States of a job that has ended (squeue's manual, JOB STATE CODES). In all others it is in the
# queue, or comes back to it.
ENDED = {
    "BOOT_FAIL": "the node did not start",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "its process ended without a result",
    "DEADLINE": "it could not end before its deadline",
    "FAILED": "its process was killed or could not start",
    "NODE_FAIL": "its node failed, and Slurm did not requeue it",
    "OUT_OF_MEMORY": "it needs more memory: hydra.launcher.mem_gb=N",
    "PREEMPTED": "another job took its place, and Slurm did not requeue it",
    "REVOKED": "another cluster took it",
    "TIMEOUT": "its time was over: hydra.launcher.timeout_min=N, or task.save_every=STEPS",
}


def states() -> dict[str, tuple[str, str]]:
    """The state and the name of every job of this user, by its id; those that ended a while ago
    are gone. Elements of an array are jobs: `12_3`.

    Raises:
        UserError: squeue is not there, or Slurm does not answer.
    """
    command = ["squeue", "-h", "-r", "-t", "all", "-u", str(os.geteuid()), "-o", "%i %T %j"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise UserError(f"Slurm cannot be asked for its jobs: {said}") from None
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def in_queue(state: str | None) -> bool:
    return state is not None and state not in ENDED


class Batches:
    """The batches of a sweep's folder: for each a file with the names of its runs, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self, runs: Sequence[str]) -> str:
        """Note the runs of a batch that is about to be submitted; the token of its jobs' names."""
        token = secrets.token_hex(4)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{token}.tmp"
        unfinished.write_text(json.dumps(list(runs)))
        unfinished.replace(self._file(token))
        return token

    def waiting(self, found: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """The ids of the jobs that are in the queue, by the names of their runs."""
        ids: dict[str, str] = {}
        runs: dict[str, list[str]] = {}
        for number, (state, name) in found.items():
            token = name.rpartition("-")[2]
            if not in_queue(state) or not re.fullmatch("[0-9a-f]{8}", token):
                continue
            if token not in runs:
                file = self._file(token)
                runs[token] = json.loads(file.read_text()) if file.exists() else []
            index = int(number.partition("_")[2] or 0)
            if index < len(runs[token]):
                ids[runs[token][index]] = number
        return ids

    def _file(self, token: str) -> Path:
        return self.folder / f"batch-{token}.json"


def short(ids: Iterable[str]) -> list[str]:
    """Ids as scancel takes them, elements of an array together: `12_[0,3]`."""
    arrays: dict[str, list[str]] = defaultdict(list)
    for number in ids:
        job, _, index = number.partition("_")
        arrays[job] += [index] if index else []
    return [
        f"{job}_[{','.join(sorted(each, key=int))}]" if each else job
        for job, each in arrays.items()
    ]

"""Processes that train together: their number and this one's, known before PyTorch is loaded.

Either Lightning starts them, once the first one trains, or Slurm's `srun` starts all at once. A
batch script is one process, whatever number of tasks its job has.
"""

from __future__ import annotations

import glob
import os
import time
from contextlib import suppress
from pathlib import Path

from dynmoe.errors import UserError

TRAIN, LEAVE, WAIT = "train", "leave", "wait"
PATIENCE = 600.0  # seconds: the first process may have to load a model of a stage before


def tasks() -> int | None:
    """Processes that Slurm has started for this command; None where Lightning starts its own.

    That is outside of Slurm, under torchrun, and in a shell that a user works in.
    """
    if "SLURM_NTASKS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    in_step = "SLURM_STEP_NUM_TASKS" in os.environ
    count = _number("SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS")
    started = count if _in_step() else 1
    in_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return None if in_shell and started == 1 else started


def rank() -> int:
    """Which one of the processes this is: 0 writes records.

    Where Lightning starts processes on several nodes (`trainer.num_nodes`), only 0 is sure: how
    many a node has is not known here.

    Raises:
        UserError: a variable that is no number.
    """
    if (tasks() or 1) > 1:
        return _number("SLURM_PROCID")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun counts over all nodes
        return _number("RANK")
    # Lightning finds the first node by this address; NODE_RANK alone may be of something else.
    node = _number("NODE_RANK", "0") if "MASTER_ADDR" in os.environ else 0
    return node + _number("LOCAL_RANK", "0")


def _number(name: str, default: str | None = None) -> int:
    """A variable that a launcher of processes sets.

    Raises:
        UserError: it is missing or no number.
    """
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal():
        found = "none" if text is None else f"'{text}'"
        like = "every variable that begins with SLURM_" if name.startswith("SLURM_") else "it"
        raise UserError(
            f"{name}: expected a whole number, found {found}. srun or torchrun sets it; without "
            f"them unset {like}"
        )
    return int(text)


def slurm_job() -> str:
    """The id of the job of Slurm that this is part of, the same after a requeue; else empty."""
    return os.environ.get("SLURM_JOB_ID", "")


def is_requeued() -> bool:
    """Whether Slurm has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _in_step() -> bool:
    # A batch script has a rank as well, 0.
    return "SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"


def _file(run: Path) -> Path:
    """The file of the word about a run, one for each start: two jobs of one run are two."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    start = ".".join(os.environ.get(name, "0") for name in names)
    return run.with_name(f"{run.name}.{start}.start")


def tell_others(run: Path, word: str) -> None:
    """The first process says whether the others train with it, `TRAIN` or `LEAVE`, or, as often as
    it likes, that it is waiting itself, `WAIT`.

    Files lie beside `run`, a path; those that nobody waits for any more are removed.
    """
    if (tasks() or 1) > 1:
        file = _file(run)
        # At once: a reader sees a whole line or none.
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_text(f"{word}\n")
        now = temporary.stat().st_mtime  # by the clock of the file system
        temporary.replace(file)
        for other in run.parent.glob(f"{glob.escape(run.name)}.*.start"):
            with suppress(OSError):  # another process may be removing it
                if now - other.stat().st_mtime > 2 * PATIENCE:
                    other.unlink()


def all_have_heard(run: Path) -> None:
    """Remove the word of this start: all processes have trained."""
    if (tasks() or 1) > 1:
        _file(run).unlink(missing_ok=True)


def told_to_train(run: Path, patience: float = PATIENCE) -> bool:
    """Wait for the word of the first process, which alone looks at the folder of the run.

    Processes that Lightning starts need no word.

    Raises:
        UserError: there was none for `patience` seconds.
    """
    if (tasks() or 1) == 1:
        return True
    file, deadline, heard = _file(run), time.monotonic() + patience, 0
    while time.monotonic() < deadline:
        with suppress(OSError):
            word, written = file.read_text().strip(), file.stat().st_mtime_ns
            if word != WAIT:
                return word == TRAIN
            if written != heard:
                heard, deadline = written, time.monotonic() + patience
        time.sleep(0.2)
    raise UserError(
        f"{file}: task {rank()} of srun heard nothing from task 0 within {patience:.0f} s. Look at "
        "the output of task 0; paths.outputs has to be a folder that all nodes see"
    )

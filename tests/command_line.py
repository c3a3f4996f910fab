"""The command in this process: what it prints, and the status it ends with."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from dynmoe import cli


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(job: Callable[[DictConfig], float | None], root: Path, *arguments: str) -> Done:
    """Run dynmoe-run with `job` in the folder `root`; starting Python takes most of a second."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(sys, "argv", ["dynmoe-run", *arguments])
        patch.setenv("COLUMNS", "200")
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli.run(job, prog="dynmoe-run")
            except SystemExit as end:
                status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())

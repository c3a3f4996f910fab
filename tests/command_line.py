"""Commands in this process: their output, and the status they end with."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from dynmoe import cli

Run = Callable[..., None]
Refused = Callable[..., str]


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


def fixtures(name: str, main: Callable[[], None]) -> tuple[object, object]:
    """Return the fixtures ``run`` and ``refused`` of a command; the second gives the message."""

    @pytest.fixture
    def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
        def command(*arguments: str) -> None:
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            main()

        yield command

    @pytest.fixture
    def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Refused:
        def command(*arguments: str) -> str:
            with pytest.raises(SystemExit) as stopped:
                run(*arguments)
            assert stopped.value.code == 2
            return capsys.readouterr().err

        return command

    return run, refused

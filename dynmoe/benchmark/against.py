"""Another build of dynmoe, measured side by side: its samples come from a process of its own."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from dynmoe.benchmark import other_build
from dynmoe.benchmark.results import Column, Row
from dynmoe.benchmark.timing import Sample, paired
from dynmoe.errors import ConfigError

COLUMNS = (
    Column("x other\nbuild", "against_ratio", ".2f"),
    Column("quartiles", "against_quartiles", ".2f"),
)


class Build:
    """A checkout or an installed copy of dynmoe in a process that makes the cases of a command.

    Raises:
        ConfigError: no dynmoe is there, or it cannot make these cases.
    """

    def __init__(self, folder: Path, module: str, args: Namespace) -> None:
        self.folder = folder.absolute()
        if not (folder / "dynmoe" / "__init__.py").is_file():
            raise ConfigError(
                f"--against {folder}: expected a folder that holds dynmoe/, such as a checkout"
            )
        self._pipe, other = Pipe()
        command = [sys.executable, other_build.__file__, str(self.folder), str(other.fileno())]
        # Without this terminal's Ctrl-C: it ends with the pipe.
        self._process = subprocess.Popen(command, pass_fds=[other.fileno()], start_new_session=True)
        other.close()
        self.version: str = self._answer()
        if getattr(args, "runs", None):  # theirs was put there, and is read there again
            args = Namespace(**{**vars(args), "precision": None})
        self._pipe.send((module, args))

    def next_cases(self) -> dict[str, Elsewhere]:
        """Make the next cases of the command; those before are gone."""
        self._pipe.send(None)
        return {other(name): Elsewhere(self, name) for name in self._answer()}

    def sample(self, name: str, calls: int) -> Sample:
        self._pipe.send((name, calls))
        sample: Sample = self._answer()
        return sample

    def close(self) -> None:
        """Let the process end, and its memory be free."""
        self._pipe.close()
        self._process.wait()

    def note(self) -> str:
        return f"The other build is dynmoe {self.version} in {self.folder}."

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = RuntimeError("its process ended")
        if isinstance(answer, Exception):
            raise ConfigError(
                f"--against {self.folder}: this benchmark does not run with it: {answer}; expected"
                " a build that has what the cases need"
            )
        return answer


@dataclass
class Elsewhere:
    """A case in the other process."""

    build: Build
    name: str

    def __call__(self) -> None:
        self.sample(1)

    def sample(self, calls: int) -> Sample:
        return self.build.sample(self.name, calls)


def other(name: str) -> str:
    """Return the name of the other build's case in the samples."""
    return f"{name} (other build)"


def ratios(samples: Mapping[str, Sequence[Sample]], name: str) -> Row:
    """Return ``against_ratio`` and ``against_quartiles``: speed over that of the other build in the
    same round. Empty without one."""
    if other(name) not in samples:
        return {}
    ratio = paired(samples[other(name)], samples[name])
    return {"against_ratio": ratio.median, "against_quartiles": (ratio.low, ratio.high)}

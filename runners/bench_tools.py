"""What the commands of ``dynmoe-bench`` share: file of results, device, progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from dynmoe.benchmark.results import Conditions

PRECISIONS = {"32-true": "fp32", "bf16-mixed": "amp"}
"""Lightning's words and ours."""


class File:
    """The --json file of one run, written again after each part: an interrupted run leaves some.

    Raises:
        ConfigError: it cannot be written there.
    """

    def __init__(self, given: Path | None, command: str) -> None:
        now = datetime.now()
        self.path = given or Path(f"outputs/bench/{command}-{now:%Y%m%d-%H%M%S}.json")
        self._date = f"{now:%Y-%m-%d %H:%M:%S}"
        if self.path.is_dir():
            raise ConfigError(f"--json {self.path}: expected a file to write, this is a folder")

    def make_folder(self) -> None:
        is_new = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise ConfigError(f"--json {self.path}: cannot be written ({error})") from None
        if is_new:  # an empty file would pass for a damaged one
            self.path.unlink()

    def write(self, conditions: Conditions, rows: Sequence[object]) -> None:
        from dynmoe.benchmark import results

        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        results.write(self.path, command, self._date, conditions, rows)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device to measure; sets the number of threads."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def make_console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width, and the tables are wider than rich's 80
    return console


def progress_on(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, console=console, transient=True)


def new_bar(progress: Progress, text: str) -> Callable[[int, int], None]:
    """A bar, the only one; it is told what is done, of how much."""
    for task in progress.task_ids:
        progress.remove_task(task)
    bar = progress.add_task(text, total=None)
    return lambda done, total: progress.update(bar, completed=done, total=total)

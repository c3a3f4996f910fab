"""Rows of results: their tables, the --json file, and the comparison with an earlier file.

A row is one measured case as a flat mapping, which is also how the file holds it. Its fields are
what identifies the case (``case`` or ``setting``, ``mode``, ``shape``, ``k``, ...), those of
``timing.speed``, and measures that the function which makes it documents. Pairs are quartiles.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from dynmoe.errors import ConfigError

Facts = dict[str, Any]
Row = dict[str, Any]
BUSY = 0.25
"""A machine with more runnable processes per core than this was busy before the measurement."""
Advance = Callable[[int, int], None]
"""Called with the number of samples that are done, and of all."""


@dataclass(frozen=True)
class Conditions:
    """Facts that a time depends on besides the code."""

    machine: Facts
    settings: Facts
    """The runtime settings that hold, as ``dynmoe.runtime.apply`` returns them."""
    workload: Facts
    """Facts that all rows have in common."""

    def __str__(self) -> str:
        return ", ".join(
            f"{key} {value}" for facts in vars(self).values() for key, value in facts.items()
        )


class Output:
    """Console and --json file of one command.

    The file is written again after each part: an interrupted command leaves the finished ones.

    Raises:
        ConfigError: the file is a folder.
    """

    def __init__(self, file: Path | None, command: str) -> None:
        now = datetime.now()
        self.file = file or Path(f"outputs/bench/{command}-{now:%Y%m%d-%H%M%S}.json")
        if self.file.is_dir():
            raise ConfigError(f"--json {self.file}: expected a file to write, this is a folder")
        self.rows: list[Row] = []
        self._load = _load_average()
        self._date = f"{now:%Y-%m-%d %H:%M:%S}"
        self._conditions = Conditions({}, {}, {})
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = 120  # a file has no width; the tables are wider than rich's 80

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], Advance]]:
        """Make the file's folder, then show a progress bar: call the result for each new part.

        Raises:
            ConfigError: the file cannot be written.
        """
        is_new = not self.file.exists()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
        except OSError as error:
            raise ConfigError(f"--json {self.file}: cannot be written ({error})") from None
        if is_new:  # an empty file would pass for a damaged one
            self.file.unlink()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=self._console, transient=True) as progress:

            def new_bar(text: str) -> Advance:
                for task in progress.task_ids:
                    progress.remove_task(task)
                bar = progress.add_task(text, total=None)
                return lambda done, total: progress.update(bar, completed=done, total=total)

            yield new_bar

    def add(self, rows: Sequence[Row], conditions: Conditions) -> None:
        """Write one object: ``command``, ``date``, ``load_average``, ``machine``, ``settings``,
        ``workload``, ``rows``."""
        self.rows += rows
        self._conditions = conditions
        content = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": self._date,
            "load_average": {"before": self._load, "after": _load_average()},
            **dataclasses.asdict(conditions),
            "rows": self.rows,
        }
        self.file.write_text(json.dumps(content, indent=1) + "\n")

    def show(self, *parts: Table | str) -> None:
        """Print the conditions, then the parts, then where the file is."""
        load = load_note(self._load, _load_average(), os.cpu_count() or 1)
        for part in (str(self._conditions), load, *parts, f"Written to {self.file}"):
            self._console.print(part)


def _load_average() -> float:
    """Mean number of runnable processes in the last minute; NaN where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def load_note(before: float, after: float, cores: int) -> str:
    """The load beside the cores, and a warning where others computed: after it, the benchmark's own
    threads count too."""
    text = f"load average of a minute {before:.1f} before, {after:.1f} after, on {cores} cores"
    if before <= BUSY * cores:
        return text
    return (
        f"{text}\nWARNING: the machine was busy before the measurement. Times are longer than "
        "on an idle one; ratios are of interleaved samples, but threads that wait for a core slow "
        "some cases more than others. Measure again when nothing else runs."
    )


# Tables.

MIB = 2**20


class Column(NamedTuple):
    """A field of the rows. ``form`` is a format specification, three digits if empty."""

    title: str
    """May name fields of the first row in braces."""
    field: str
    """``mean_k.answer`` is the value of ``answer`` in the mapping ``mean_k``."""
    form: str = ""
    unit: float = 1

    def of(self, row: Row) -> str:
        value: Any = row
        for name in self.field.split("."):
            value = None if value is None else value.get(name)
        pair = isinstance(value, (tuple, list))
        return "–".join(map(self._shown, value)) if pair else self._shown(value)

    def _shown(self, value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        value /= self.unit
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
        return format(value, self.form or f".{digits}f")


RATIO = Column("of {reference}", "ratio", ".2f"), Column("quartiles", "ratio_quartiles", ".2f")
PEAK = Column("peak\nMiB", "peak_bytes", unit=MIB)
ROUNDS = Column("rounds", "rounds", ".0f"), Column("disturbed", "contaminated", ".0f")
LEFT = ("case", "setting", "shape", "mode", "note")


def tables(
    rows: Sequence[Row], by: Sequence[str], title: str, columns: Sequence[Column]
) -> Iterator[Table]:
    """Yield a table of each group of consecutive rows with equal fields ``by``.

    ``title`` names fields of the first row in braces. Columns without a value are left out.
    """
    for _, members in groupby(rows, key=lambda row: [row.get(field) for field in by]):
        group = list(members)
        table = Table(
            title=title.format(**group[0]),
            title_justify="left",
            box=box.SIMPLE,
            padding=(0, 1, 0, 0),
        )
        texts = []
        for column in columns:
            cells = [column.of(row) for row in group]
            if set(cells) != {"-"}:
                left = column.field in LEFT
                table.add_column(
                    column.title.format(**group[0]),
                    justify="left" if left else "right",
                    no_wrap=column.field in ("case", "setting"),
                )
                texts.append(cells)
        for line in zip(*texts, strict=True):
            table.add_row(*line)
        yield table


# The comparison with an earlier file.


class Compared(NamedTuple):
    """The field of a row that is compared."""

    field: str
    quartiles: str
    """The field with its quartiles: a change is noise where they overlap."""
    form: str


class BaselineRules(NamedTuple):
    """Rules of comparing the rows of a command with those of a baseline."""

    key: Sequence[str]
    """Fields that are equal in rows of the same measurement."""
    labels: Sequence[str]
    """Fields that are shown."""
    compared: Callable[[Row], Compared]


class Baseline:
    """A --json file of an earlier measurement by the same command.

    Raises:
        ConfigError: there is no file, or something else in it.
    """

    def __init__(self, path: Path, rules: BaselineRules) -> None:
        if not path.is_file():
            raise ConfigError(f"--baseline {path}: there is no such file; --json writes one")
        self._rules = rules
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            facts = [dict(content[field.name]) for field in dataclasses.fields(Conditions)]
            self._values = {self._key(row): self._value(row) for row in content["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--baseline {path}: expected a file that this version and command of dynmoe-bench"
                f" wrote ({type(error).__name__}: {error}); measure the baseline again"
            ) from None
        self.conditions = Conditions(*facts)

    def require(self, conditions: Conditions, *parts: str) -> None:
        """Refuse a baseline that was measured under other conditions.

        Raises:
            ConfigError: naming every fact of the ``parts`` that differs.
        """
        found = [
            text
            for part in parts
            for text in differences(getattr(self.conditions, part), getattr(conditions, part))
        ]
        if found:
            raise ConfigError(
                f"--baseline: measured under other conditions: {', '.join(found)}; expected equal"
                " ones. Measure the baseline again here, or give the same options"
            )

    def table(self, rows: Sequence[Row]) -> Table | str:
        """Compare the rows that both files have."""
        changes = []
        for row in rows:
            if (key := self._key(row)) in self._values:
                form = self._rules.compared(row).form.format
                (old, (old_low, old_high)) = self._values[key]
                (new, (low, high)) = self._value(row)
                changes.append(
                    {label: row[label] for label in self._rules.labels}
                    | {"old": form(old), "new": form(new), "change": f"{new / old - 1:+.1%}"}
                    | {"note": noise((old_low, old_high), (low, high))}
                )
        if not changes:
            return "The baseline has none of these measurements."
        columns = [Column(field, field, "g" if field == "k" else "") for field in changes[0]]
        (table,) = tables(changes, (), "Against the baseline", columns)
        return table

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[field] for field in self._rules.key)

    def _value(self, row: Row) -> tuple[float, tuple[float, float]]:
        compared = self._rules.compared(row)
        low, high = row[compared.quartiles]
        return row[compared.field], (low, high)


def noise(old: tuple[float, float], new: tuple[float, float]) -> str:
    """Whether quartiles overlap; of a single round they are one number, which says nothing."""
    if min(old[1] - old[0], new[1] - new[0]) == 0:
        return "no spread to judge by"
    return "within noise" if old[0] <= new[1] and new[0] <= old[1] else ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return ``key (old value, now new value)`` of every fact that differs."""
    return [
        f"{key} ({old.get(key)}, now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]

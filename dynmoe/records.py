"""The files of one run folder: a run writes them, and every report reads them.

`results.jsonl` has a line for each evaluation:

- `step` (0-based, of the last optimizer step), `epoch`, `step_time` and `eval_time` in seconds,
  `mem_gb`; `loss` and `aux_loss`, means over the training steps since the line before.
- `scores`: `{set: {measure: value}}`. Sets are the splits `<environment>/in` and
  `<environment>/out`, or evaluation sets (`dev`, `heldout`, `test`, `pope`). Measures are shares of
  1 (`accuracy`, `f1`, `score`, `kind_colour`), points (`perception_points`), or the mean `loss`:
  cross-entropy, of regression the squared error, of questions the negative log-likelihood of the
  tokens of their reference answers.
- `selects` and `reported`, each `{"sets": [...], "measure": ...}`: the run's rule judges the line
  by the mean of that measure over these sets, and reports the other mean (`dynmoe.selection`).
- `cut_answers`, of questions answered in words: by set the number of answers that were cut off at
  their limit of tokens (`data.max_new_tokens`).
- `stopped_early`: true on the last line of a run that patience ended before its planned steps.
- `args` and `hparams`, and of images `env0_in_acc`, `env0_out_acc`, ...: DomainBed's names, so that
  DomainBed's own scripts read the file. Keys are sorted as in domainbed/scripts/train.py. Their
  reader cuts off the last character of each line (domainbed/lib/reporting.py); therefore every line
  ends with a newline.
- `nonfinite_step`: the first optimizer step whose loss was not finite, in this line and later ones.

`run.json` has the facts of the run: configuration, data, costs, machine, and the rule, `selection`,
with the `selects` and `reported` of every line; `nonfinite_step` if a loss was not finite.
`tokenizer.json` has the vocabulary that was learnt from the data, where no tokenizer is named.

Numbers that are not finite are null in all files, as JSON has no others; `read` gives NaN for
measures and losses.

`routing.jsonl` has a line for each evaluation, MoE layer and `source`: `train`, or the name of an
environment or evaluation set (`dynmoe.metrics.routing`). `events.jsonl` has the changes of experts,
`examples.jsonl` single answered questions.

`mixing.jsonl` has a line for each probe of a run that mixes data (`dynmoe.training.mixing`): by
source, in the order of `sources`, `delta` (how unlike the others it uses the experts, or how far
its loss is above the reference), `loss`, the picks of each expert slot in the compared layers
(`load`), and the sampling `weights` from the second step after it on; `seconds` of the probe.
`run.json` has the first weights under `mixing`.

`budget.jsonl` has a line for each evaluation of `dynmoe-eval mode=budget`: `rule` (`own`: the run
as it is), the `target_k` that was asked for, the `cuts` and the recorded mean k of `layers`,
`mean_k` over all, `scores`, and the means of the reported `measure` and of the loss over the
reported sets, `score` and `loss`. `checkpoint` and `step` say which weights. A further evaluation
adds its lines.

`quantize.jsonl` has a line for each evaluation of `dynmoe-eval mode=quantize` in the same way, with
the same scores: `method` (`fp32`: the run as it is; `rtn`, `gptq`, `torchao int8`), the `options`,
the `bits` of every linear layer and their `average_bits`, without and with grids, the layers
rounded to nearest for want of calibration data (`fallback`) or because that was better
(`kept_rtn`), and the mean `output_error` of layers; of exports the `bytes` of the file and
`samples_per_s`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from dynmoe import process
from dynmoe.errors import UserError

# A folder beside the run folders.
LOCKS = ".locks"

# Names in the folder of a run before it writes: Hydra's (conf/hydra/job_logging), and the log.
UNUSED = {".hydra", "run.log"}

Kind = Literal["results", "routing", "events", "examples", "budget", "quantize", "mixing"]
TRAINED: tuple[Kind, ...] = ("results", "routing", "events", "examples", "mixing")
"""Kinds that the training writes; evaluations of a finished run add to the others."""

VOCABULARY = "tokenizer.json"
"""The vocabulary that a run has learnt, without which its weights mean nothing."""

State = Literal["done", "running", "failed", "stopped", "missing"]
Record = dict[str, Any]

# Numbers of a line that are null where they are not finite, beside its scores; empty: all.
NULL: dict[str, tuple[str, ...]] = {
    "results": (),
    "budget": ("score", "loss"),
    "quantize": ("score", "loss"),
}


class RecordError(UserError):
    """A run folder that cannot be read: a missing file, or a damaged line."""


class Held(UserError):
    """Another process is working in this run folder."""


class RunFolder:
    """One run on disk. It is created by the first write; reading it changes nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, kind: Kind, *records: Mapping[str, Any]) -> None:
        """Add one line per record, in one write that is on disk when the call returns.

        Every record has a `step`. A resumed run calls `truncate_after` first, which also removes a
        line that was cut short; others call `mend`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._file(kind).open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(map(_line, records)))
            file.flush()
            os.fsync(file.fileno())

    def mend(self, kind: Kind) -> None:
        """Remove a last line that was cut short, so that lines can be added."""
        if _is_torn(self._file(kind)):
            self.replace(kind, *self.read(kind))

    def replace(self, kind: Kind, *records: Mapping[str, Any]) -> None:
        """Write these records in the place of all of their kind."""
        replace_file(self._file(kind), "".join(map(_line, records)))

    def read(self, kind: Kind) -> list[Record]:
        """All records of one kind, in the order written; none when the file is not there.

        A last line without a newline was cut short by a kill and is ignored; `torn` names its
        file. Any other line that is not a JSON object with a `step` raises RecordError, and so does
        a file that has changed since the run finished.
        """
        whole_lines = self.lines(kind)
        found = _records(self._file(kind), whole_lines)
        if (null := NULL.get(kind)) is None:
            return found
        return [
            _with_nan(record, null) if b"null" in line else record
            for record, line in zip(found, whole_lines, strict=True)
        ]

    def lines(self, kind: Kind) -> list[bytes]:
        """The whole lines of one kind, not parsed.

        Raises:
            RecordError: the file has changed since the run finished.
        """
        file = self._file(kind)
        content = _content(file)
        self._check_unchanged(file, content)
        return content.split(b"\n")[:-1]  # bytes: a cut may fall inside a character

    @property
    def torn(self) -> list[Path]:
        """The files whose last line was cut short, and is ignored."""
        there = set(os.listdir(self.path)) if self.path.is_dir() else set()
        files = [self._file(kind) for kind in get_args(Kind)]
        return [file for file in files if file.name in there and _is_torn(file)]

    def truncate_after(self, step: int) -> None:
        """Drop every record later than `step`, the step of the checkpoint the run resumes from.

        Raises RecordError, with every file as it was, where one of them is damaged.
        """
        kinds = [kind for kind in get_args(Kind) if self._file(kind).exists()]
        records = {kind: self.read(kind) for kind in kinds}
        for kind, each in records.items():
            self.replace(kind, *(record for record in each if record["step"] <= step))

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """Write `run.json`: the facts that are known before the first step."""
        text = json.dumps(_finite(facts), indent=2, allow_nan=False)
        replace_file(self.path / "run.json", text + "\n")

    def check_there(self) -> None:
        """Raise RecordError if the folder of a run that is going on was removed: the lines after
        that would be those of a run without a beginning."""
        if not (self.path / "run.json").exists():
            raise RecordError(
                f"{self.path}: was removed while the run was writing to it. The same command "
                "begins again"
            )

    def add_facts(self, **facts: Any) -> None:
        """Add what became known later to `run.json`."""
        self.write_run({**self.read_run(), **facts})

    def read_run(self) -> Record:
        """The facts in `run.json`. Raises RecordError when there is none, or damage."""
        file = self.path / "run.json"
        if not file.exists():
            raise RecordError(
                f"{self.path}: expected a run folder, found no run.json in it; "
                "give a folder outputs/<name>/<run> that dynmoe-run wrote"
            )
        content = _content(file)
        self._check_unchanged(file, content)
        try:
            facts = json.loads(content)
        except ValueError as error:  # no JSON, or no UTF-8
            raise RecordError(
                f"{file}: expected JSON, found damage ({error}); run again with overwrite=true"
            ) from None
        if not isinstance(facts, dict):
            raise RecordError(
                f"{file}: expected a JSON object, found {str(facts)[:60]!r}; "
                "run again with overwrite=true"
            )
        return facts

    def say(self, line: str) -> None:
        """Print a line and note it; beside other jobs it begins with the name of the run."""
        name = f"{self.path.name}: " if process.is_worker() else ""
        print(f"{name}{line}", flush=True)
        self.note(line)

    def note(self, line: str) -> None:
        """Add a line, with date and time, to `run.log`, which Hydra writes to as well.

        A line that cannot be written is no reason to end the run.
        """
        log = self.path / "run.log"
        with suppress(OSError), log.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def mark_done(self) -> None:
        """Mark the run as complete, with a digest of each file that stays as it is. Call it after
        everything else is written."""
        files = self._finished_files()
        digests = {file.name: _digest(content) for file in files if (content := _content(file))}
        replace_file(self.path / "done", json.dumps(digests, indent=1) + "\n")

    def _finished_files(self) -> list[Path]:
        others = ("run.json", "config.yaml", VOCABULARY)
        return [*map(self._file, TRAINED), *(self.path / name for name in others)]

    def check_finished(self) -> None:
        """Raises RecordError if any file has changed since the run finished."""
        for file in self._finished_files():
            self.check_unchanged(file.name)

    def check_unchanged(self, name: str) -> None:
        """Raises RecordError if the file has changed since the run finished."""
        self._check_unchanged(self.path / name, _content(self.path / name))

    def _check_unchanged(self, file: Path, content: bytes) -> None:
        try:
            expected = json.loads(_content(self.path / "done") or b"{}").get(file.name)
        except (ValueError, AttributeError):  # a mark of an earlier version, or by hand
            return
        if expected is not None and _digest(content) != expected:
            raise RecordError(
                f"{file}: is not as it was when the run finished. Put it back, or run again with "
                f"overwrite=true; to take it as it is: echo > {self.path / 'done'}"
            )

    def mark_failed(self, error: str, traceback: str = "") -> None:
        """Record why a job of a sweep ended early; its files stay."""
        replace_file(self.path / "failed.txt", f"{error.strip()}\n\n{traceback}".rstrip() + "\n")

    def forget_failure(self) -> None:
        (self.path / "failed.txt").unlink(missing_ok=True)

    def remove_unused(self) -> None:
        """Remove the folder if the run wrote nothing: it holds only Hydra's files and the log."""
        # A folder that cannot be removed is no reason to hide a refusal.
        with suppress(OSError):
            if {entry.name for entry in self.path.iterdir()} <= UNUSED:
                shutil.rmtree(self.path / ".hydra", ignore_errors=True)
                (self.path / "run.log").unlink(missing_ok=True)
                self.path.rmdir()

    @property
    def is_done(self) -> bool:
        return (self.path / "done").exists()

    @property
    def failure(self) -> str:
        """The first line of the run's error; empty if it did not fail."""
        file = self.path / "failed.txt"
        return _content(file).decode(errors="replace").split("\n", 1)[0]

    @property
    def state(self) -> State:
        """State of the run. `stopped`: killed or interrupted; the same command resumes it."""
        if self.is_done:
            return "done"
        if self._is_held():
            return "running"
        if self.failure:
            return "failed"
        return "stopped" if (self.path / "run.json").exists() else "missing"

    @contextmanager
    def hold(self, wait: float = 1.0) -> Iterator[None]:
        """Keep every other process out; the lock goes with the process, however it ends.

        The lock file lies beside the run folders and is never removed: otherwise two processes
        could get in, one by the old file and one by a new one. It waits `wait` seconds, so that a
        process that only reads `state` is not taken for one that works here.

        Raises:
            Held: another process holds the folder.
        """
        locks = self.path.parent / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(locks / self.path.name, timeout=wait):
                yield
        except Timeout:
            raise Held(
                f"{self.path}: another process is running this configuration. Wait for it, or "
                "stop it."
            ) from None

    def _is_held(self) -> bool:
        if not (self.path.parent / LOCKS / self.path.name).exists():
            return False
        try:
            with self.hold(wait=0):
                return False
        except Held:
            return True
        except OSError:  # another user's files, which we can only read
            return False

    def _file(self, kind: Kind) -> Path:
        return self.path / f"{kind}.jsonl"


class Seal:
    """Digests of what the training has recorded up to a step, kept up while it records: a
    checkpoint holds them, and a run goes on from it with the same records alone."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._read: dict[str, tuple[int, Any]] = {}

    def at(self, step: int) -> dict[str, str]:
        """The digest of each kind; steps never go back from one line to the next."""
        for kind in TRAINED:
            file = self.folder.path / f"{kind}.jsonl"
            offset, digest = self._read.get(kind, (0, hashlib.blake2b(digest_size=16)))
            with suppress(FileNotFoundError), file.open("rb") as lines:
                lines.seek(offset)
                for line in lines:
                    if _step(line) > step:
                        break
                    digest.update(line)
                    offset += len(line)
            if offset:
                self._read[kind] = offset, digest
        return {kind: digest.hexdigest() for kind, (_, digest) in self._read.items()}


def _step(line: bytes) -> float:
    """The step of a line; of one that is damaged or not whole it is behind all others."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def stretches(results: Iterable[Record]) -> Iterator[tuple[int, Record]]:
    """Each result with the number of optimizer steps since the one before it."""
    before = -1
    for record in results:
        yield record["step"] - before, record
        before = record["step"]


def _content(file: Path) -> bytes:
    """The bytes of a file; none where it is not there."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:  # a folder of its name, a disk that fails
        raise RecordError(f"{file}: cannot be read: {error.strerror}") from None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """A copy in which numbers that are not finite are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _with_nan(record: Record, keys: Sequence[str]) -> Record:
    """A record whose measures and losses are NaN where they are null."""
    found = {
        key: math.nan if value is None and (key in keys or not keys) else value
        for key, value in record.items()
    }
    if isinstance(scores := found.get("scores"), dict):
        found["scores"] = {
            name: {key: math.nan if value is None else value for key, value in measures.items()}
            for name, measures in scores.items()
        }
    return found


def _is_torn(file: Path) -> bool:
    """Whether the file does not end with a newline; reads only its last byte."""
    try:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:  # not there, or empty
        return False


def _records(file: Path, lines: Sequence[bytes]) -> list[Record]:
    """All lines in one call of the parser, which keeps one copy of each key; where that finds
    damage, line by line."""
    with suppress(ValueError):  # no JSON, or no UTF-8
        found = json.loads(b"[[" + b"],[".join(lines) + b"]]") if lines else []
        if all(len(each) == 1 and _is_record(each[0]) for each in found):
            return [each[0] for each in found]
    return [_record(file, number, line) for number, line in enumerate(lines, start=1)]


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("step"), int)


def _record(file: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        record = None
    if not _is_record(record):
        raise RecordError(
            f"{file}, line {number}: expected a JSON object with a step, "
            f"found {line[:60].decode(errors='replace')!r}; "
            "run again with overwrite=true"
        )
    return record


def replace_file(file: Path, text: str) -> None:
    """Write a whole file so that a kill leaves the old one or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)

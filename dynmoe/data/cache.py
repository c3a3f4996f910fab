"""Files of the cache: made once, kept with a checksum, mapped into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from dynmoe.errors import ConfigError
from dynmoe.passes import shown

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")


def kept_or_made(file: Path, read: Callable[[Path], T], make: Callable[[Path], T]) -> T:
    """Return what `read` finds in `file`, a file of the cache, or else what `make` writes there.

    A checksum beside the file tells whether it is as it was made: not all damage shows in reading.
    `read` raises OSError or ValueError where there is no file or a damaged one. Processes that ask
    for the same file wait for the first.

    Raises:
        ConfigError: the folder of `file` cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            checksum = Path(f"{file}.blake2b")
            try:
                if checksum.read_text() != _digest(file):
                    raise ValueError(f"{file}: another checksum")
                return read(file)
            except (OSError, ValueError):
                made = make(file)
                checksum.write_text(_digest(file))
                return made
    except OSError as error:
        raise ConfigError(
            f"paths.cache: cannot write to {file.parent}: {error.strerror or error}. "
            "Choose another folder: paths.cache=FOLDER, or keep none: data.cache=null"
        ) from error


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def opened(file: Path) -> pyarrow.Table:
    """Map a table into memory.

    Raises:
        OSError: there is no such file.
        ValueError: a damaged one (pyarrow.ArrowInvalid).
    """
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def written(file: Path | None, write: Callable[[Any], None]) -> pyarrow.Table:
    """Let `write` fill a stream, and return the table in it: of a `file`, or else in memory.

    Another process may have mapped the file that was there before: it keeps that one.
    """
    import pyarrow

    if file is None:
        buffer = pyarrow.BufferOutputStream()
        write(buffer)
        return pyarrow.ipc.open_file(buffer.getvalue()).read_all()
    part = file.with_suffix(".part")
    try:
        with part.open("wb") as sink:
            write(sink)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return opened(file)


def chunks(items: Iterable[T], size: int, what: str) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; a long pass says how many are done (`passes.shown`)."""
    stream = iter(items)
    yield from shown(iter(lambda: list(islice(stream, size)), []), what, size=len)

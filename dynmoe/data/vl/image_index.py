"""The images that conversations name, kept in the cache: a later start reads no conversation.

Reading LLaVA's 665,000 conversations takes a minute and more; their image keys are mapped into
memory, and the counts and warnings of the reading lie beside them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.data.cache import kept_or_made, opened, written
from dynmoe.data.vl.conversations import Conversation, text_digest
from dynmoe.passes import shown

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

READER = 1
"""Part of the names of files: another number wherever readers take other entries than before."""

BLOCK = 10_000  # keys that are Python objects at once


class ImageKeys(Sequence[str]):
    """Keys of images, each once, in the column of a table that may be mapped into memory."""

    def __init__(self, column: pyarrow.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        key: str = self._column[index].as_py()
        return key

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self._column.slice(start, BLOCK).to_pylist()


@dataclass(frozen=True)
class Reading:
    """What a pass over conversations has found."""

    keys: Sequence[str]
    """Of all images, each once, in their order."""
    left_out: Counter[str]
    """Counts of what the files hold and the conversations do not, by what it is."""


def reading_of(
    read: Callable[[Counter[str]], Iterable[Conversation]], digest: str, cache: Path | None
) -> Reading:
    """Go through the conversations that `read` gives, which counts what it leaves out.

    With a folder `cache` it is done once for all conversations of one `digest`; later calls give
    the warnings again. Without it keys are in memory.

    Raises:
        DataError: of `read`.
        ConfigError: `cache` cannot be written.
    """

    def write(sink: Any) -> None:
        import pyarrow

        left_out: Counter[str] = Counter()
        with _Said() as said:
            every = shown(read(left_out), "conversations read")
            keys = dict.fromkeys(key for each in every for key in each.images)
        facts = json.dumps({"left_out": left_out, "said": said.texts})
        table = pyarrow.table({"key": pyarrow.array(keys, pyarrow.string())})
        table = table.replace_schema_metadata({"reading": facts})
        with pyarrow.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)

    if cache is None:
        return _of(written(None, write))
    file = cache / f"images-of-{text_digest(f'{READER} {digest}')}.arrow"
    made = False

    def make(file: Path) -> pyarrow.Table:
        nonlocal made
        made = True
        return written(file, write)

    table = kept_or_made(file, opened, make)
    for text in [] if made else _facts(table)["said"]:
        log.warning("%s", text)
    return _of(table)


def _facts(table: pyarrow.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.schema.metadata[b"reading"])
    return found


def _of(table: pyarrow.Table) -> Reading:
    return Reading(ImageKeys(table["key"]), Counter(_facts(table)["left_out"]))


class _Said(logging.Handler):
    """Notes the warnings of readers inside."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> _Said:
        logging.getLogger("dynmoe.data.vl").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("dynmoe.data.vl").removeHandler(self)

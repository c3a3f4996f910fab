"""The token ids of all conversations of a source, made once and kept in a folder of the cache."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dynmoe.data.protocol import IntArray
from dynmoe.data.vl.chat import IGNORE, IMAGE, TEMPLATES, Encoded, IdArray, checked, encode_all
from dynmoe.data.vl.conversations import Conversation, ConversationSource
from dynmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 500  # conversations in memory at once
LONG_PASS = 20_000  # conversations after which progress is shown
TOKENS, IMAGES, INDEX = "tokens.int32", "images.jsonl", "index.npz"
LAYOUT = 1  # of these files: a change of it leaves older ones aside

Index = dict[str, IntArray]
EncodeAll = Callable[[list[Conversation]], list[Encoded | None]]


class TokenStore:
    """Conversations as token ids and labels, and the images they show: flat arrays with offsets.

    An image is kept as one `IMAGE`; `row` gives it all its positions.
    """

    lengths: IntArray
    """[C] tokens of each conversation."""
    answer_tokens: IntArray
    """[C] labels other than `IGNORE`, at least 1."""
    num_images: IntArray
    """[C]"""
    left_out: int
    """Conversations of the source whose images, or any answer, did not fit in the length."""

    def __init__(self, index: Index, tokens: IdArray, images: npt.NDArray[np.uint8]) -> None:
        self.lengths = index["lengths"]
        self.answer_tokens = index["answer_tokens"]
        self.num_images = index["num_images"]
        self.left_out = int(index["left_out"])
        self._index = index
        self._tokens = tokens.reshape(-1, 2)
        self._images = images

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> Encoded:
        """Ids and labels of conversation `index`."""
        start, stop = self._index["token_offsets"][index : index + 2]
        pairs = np.asarray(self._tokens[start:stop])
        repeats = np.where(pairs[:, 0] == IMAGE, self._index["image_tokens"], 1)
        return Encoded(*np.repeat(pairs.T, repeats, axis=1))

    def images(self, index: int) -> list[str]:
        """Keys of the images of conversation `index`, in the order of their places."""
        start, stop = self._index["image_offsets"][index : index + 2]
        keys: list[str] = json.loads(self._images[start:stop].tobytes())
        return keys

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files again; pickled arrays would be copies of them."""
        if isinstance(self._tokens, np.memmap):
            return _opened, (Path(str(self._tokens.filename)).parent,)
        return TokenStore, (self._index, self._tokens, self._images)


def tokenized(
    source: ConversationSource,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_tokens: int,
    max_length: int,
    cache: Path | None,
) -> TokenStore:
    """The conversations of `source` as `chat.encode` writes them.

    `cache` is a folder: the one made in it is named after the source, the tokenizer and the other
    arguments, and written while the source is read, so that memory does not grow with the source.
    Processes that ask for the same one wait for the first; a damaged one is made anew. Without
    `cache` all is kept in memory.

    Raises:
        ConfigError: `template` and `tokenizer` do not fit together, or `cache` cannot be written.
        DataError: no conversation fits in `max_length`.
    """
    checked(tokenizer, template)
    encode: EncodeAll = partial(
        encode_all,
        tokenizer=tokenizer,
        template=template,
        image_tokens=image_tokens,
        max_length=max_length,
    )
    if cache is None:
        tokens, images = io.BytesIO(), io.BytesIO()
        index = _write(source, encode, image_tokens, tokens, images)
        return TokenStore(
            index,
            np.frombuffer(tokens.getbuffer(), np.int32),
            np.frombuffer(images.getbuffer(), np.uint8),
        )
    settings = [repr(TEMPLATES[template]), image_tokens, max_length]
    folder = cache / f"conversations-{_fingerprint(source, tokenizer, settings)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return _kept(folder) or _made(folder, source, encode, image_tokens)
    except OSError as error:
        raise ConfigError(
            f"paths.cache: cannot write to {cache}: {error.strerror or error}. "
            "Choose another folder: paths.cache=FOLDER, or keep none: data.cache=null"
        ) from error


def _kept(folder: Path) -> TokenStore | None:
    """The folder's store, or None if there is none or it is damaged."""
    try:
        return _opened(folder)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _opened(folder: Path) -> TokenStore:
    with np.load(folder / INDEX) as file:
        index = dict(file)
    tokens = np.memmap(folder / TOKENS, np.int32, "r")
    images = np.memmap(folder / IMAGES, np.uint8, "r")
    ends = 2 * index["token_offsets"][-1], index["image_offsets"][-1]
    if (len(tokens), len(images)) != ends:
        raise ValueError(f"{folder}: files of other sizes than {ends}")
    return TokenStore(index, tokens, images)


def _made(
    folder: Path, source: ConversationSource, encode: EncodeAll, image_tokens: int
) -> TokenStore:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        with (part / TOKENS).open("wb") as tokens, (part / IMAGES).open("wb") as images:
            index = _write(source, encode, image_tokens, tokens, images)
        np.savez(part / INDEX, **index)  # type: ignore[arg-type]
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return _opened(folder)


def _write(
    source: ConversationSource,
    encode: EncodeAll,
    image_tokens: int,
    tokens: IO[bytes],
    images: IO[bytes],
) -> Index:
    columns = array("q")  # a list of numbers would take five times the memory
    left_out = 0
    for chunk in _chunks(source):
        for conversation, encoded in zip(chunk, encode(chunk), strict=True):
            if encoded is None:
                left_out += 1
                continue
            ids, labels = encoded
            image = np.flatnonzero(ids == IMAGE)
            keep = np.ones(len(ids), dtype=bool)
            keep[image] = np.arange(len(image)) % image_tokens == 0
            pairs = np.stack(encoded, axis=1)[keep]
            keys = json.dumps(conversation.images).encode() + b"\n"
            tokens.write(pairs.tobytes())
            images.write(keys)
            answered = int(np.count_nonzero(labels != IGNORE))
            columns.extend([len(ids), answered, len(conversation.images), len(pairs), len(keys)])
    if not columns:
        raise DataError(
            f"data {source.name}: none of its {left_out} conversations fits. An image alone is "
            f"{image_tokens} tokens: raise data.max_length."
        )
    table = np.frombuffer(columns, dtype=np.int64).reshape(-1, 5)
    lengths, answer_tokens, num_images, stored, written = np.ascontiguousarray(table.T)
    return {
        "lengths": lengths,
        "answer_tokens": answer_tokens,
        "num_images": num_images,
        "token_offsets": np.append(0, stored.cumsum()),
        "image_offsets": np.append(0, written.cumsum()),
        "image_tokens": np.array(image_tokens),
        "left_out": np.array(left_out),
    }


def _chunks(source: ConversationSource) -> Iterator[list[Conversation]]:
    """The source in pieces, in a long pass with a display of how far it is."""
    text = TextColumn(f"{source.name}: {{task.completed:,}} conversations tokenized")
    display = Progress(SpinnerColumn(), text, TimeElapsedColumn())
    task = display.add_task("", total=None)
    stream, done = iter(source), 0
    try:
        while chunk := list(islice(stream, CHUNK)):
            yield chunk
            done += len(chunk)
            display.update(task, completed=done)
            if done >= LONG_PASS:
                display.start()
    finally:
        if display.live.is_started:
            display.stop()


def _fingerprint(
    source: ConversationSource, tokenizer: PreTrainedTokenizerBase, settings: list[Any]
) -> str:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for changed_by_use in ("truncation", "padding"):
        state.pop(changed_by_use)
    marks = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    content = json.dumps([LAYOUT, source.digest, state, marks, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]

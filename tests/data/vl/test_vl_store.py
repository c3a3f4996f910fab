"""Proves that a store gives back what was encoded, and when its files are made anew."""

from __future__ import annotations

import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pytest
from chat_tokenizers import whole_words

from dynmoe import passes
from dynmoe.data.vl import store as vl_store
from dynmoe.data.vl.chat import encode_all
from dynmoe.data.vl.conversations import Conversation, Message
from dynmoe.data.vl.store import TokenStore, tokenized
from dynmoe.errors import ConfigError, DataError

ANSWERS = ["red", "top left", "it is it is it is it is it is it", "left"]
IMAGES = [("a.png",), (), ("ü\n.png", "b.png"), ("c.png", "d.png")]
TOKENIZER = whole_words("what color red is it top left", ends=("</s>",))


def conversation(answer: str, images: tuple[str, ...]) -> Conversation:
    asked = "<image>" * len(images) + "what is it"
    return Conversation("", (Message("user", asked), Message("assistant", answer)), images)


@dataclass
class Source:
    """Conversations in memory."""

    conversations: list[Conversation]
    digest: str = "0" * 16
    name: str = "toys"

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)

    def load_image(self, key: str) -> PIL.Image.Image:
        raise AssertionError("no pixels are needed")


SOURCE = Source([conversation(*pair) for pair in zip(ANSWERS, IMAGES, strict=True)])


def make(cache: Path | None, source: Source = SOURCE, **changes: object) -> TokenStore:
    given = {"template": "simple", "image_tokens": 3, "max_length": 16, **changes}
    return tokenized(source, given.pop("tokenizer", TOKENIZER), cache=cache, **given)  # type: ignore[arg-type]


def contents(store: TokenStore) -> list[object]:
    rows = [[each.tolist() for each in store.row(index)] for index in range(len(store))]
    columns = [store.lengths, store.answer_tokens, store.num_images]
    keys = [store.images(index) for index in range(len(store))]
    return [rows, [each.tolist() for each in columns], keys, store.left_out]


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vl_store, "encode_all", lambda *_, **__: pytest.fail("made anew"))


@pytest.mark.parametrize("kept", [True, False])
def test_control_tokens_in_texts_are_counted(tmp_path: Path, kept: bool) -> None:
    said = [conversation(answer, ()) for answer in ("red", "red </s>", "red [EOS]")]
    assert make(tmp_path if kept else None, Source(said)).controls == 2


def test_a_source_without_conversations() -> None:
    with pytest.raises(DataError, match="data toys: no conversations to train on"):
        make(None, Source([]))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 500])
def test_rows_are_what_is_encoded(
    tmp_path: Path, kept: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[BOS] images what is it [ANSWER] answer [EOS]; the third is cut, none is left out."""
    monkeypatch.setattr(vl_store, "CHUNK", chunk)
    store = make(tmp_path if kept else None)
    assert store.lengths.tolist() == [10, 8, 16, 13]
    assert store.answer_tokens.tolist() == [2, 3, 5, 2]
    assert store.num_images.tolist() == [1, 0, 2, 2]
    assert (store.left_out, len(store)) == (0, 4)
    encoded = encode_all(SOURCE.conversations, TOKENIZER, "simple", 3, 16)
    for index, (each, (ids, labels)) in enumerate(zip(SOURCE, encoded, strict=True)):
        row = store.row(index)
        assert row.ids.dtype == row.labels.dtype == np.int32
        assert row.ids.tolist() == ids.tolist() and row.labels.tolist() == labels.tolist()
        assert store.images(index) == list(each.images)


def test_in_memory_as_on_disk_as_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = contents(make(tmp_path))
    assert contents(make(None)) == written
    TOKENIZER(["a", "b c"], padding=True, truncation=True, max_length=2)  # changes its state
    forbid_encoding(monkeypatch)
    assert contents(make(tmp_path)) == written


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    store = make(None, max_length=10)
    assert store.left_out == 2
    assert [store.images(index) for index in range(2)] == [["a.png"], []]
    message = r"data toys: none of its 4 conversations fits\. An image alone is 3 tokens: raise"
    with pytest.raises(DataError, match=message):
        make(None, max_length=3)


def test_image_positions_are_not_kept(tmp_path: Path) -> None:
    """5 images of many positions: 5 tokens in the file."""
    sizes = []
    for image_tokens in (100, 1000):
        store = make(tmp_path / str(image_tokens), image_tokens=image_tokens, max_length=10_000)
        assert store.lengths.sum() > 5 * image_tokens
        (file,) = (tmp_path / str(image_tokens)).glob("*.arrow")
        sizes.append(file.stat().st_size)
    assert sizes[0] == sizes[1] < 4 * 5 * 1000


def test_each_of_source_tokenizer_and_setting_has_its_own_file(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, Source(SOURCE.conversations, digest="1" * 16))
    make(tmp_path, tokenizer=whole_words("what"))
    make(tmp_path, template="v1", max_length=100)
    make(tmp_path, max_length=15)
    make(tmp_path, image_tokens=2)
    assert len(list(tmp_path.glob("*.arrow"))) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: None,
        lambda content: b"",
        lambda content: b"garbage" * 99,
        lambda content: content[: -len(content) // 2],
        lambda content: content[:-1],
    ],
    ids=["missing", "empty", "garbage", "cut", "last byte"],
)
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = contents(make(tmp_path))
    (file,) = tmp_path.glob("*.arrow")
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    assert contents(make(tmp_path)) == written
    forbid_encoding(monkeypatch)
    assert contents(make(tmp_path)) == written


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(Source):
        def __iter__(self) -> Iterator[Conversation]:
            yield from self.conversations
            raise DataError("line 5: no conversation")

    with pytest.raises(DataError, match="line 5"):
        make(tmp_path, Failing(SOURCE.conversations))
    assert [each.suffix for each in tmp_path.iterdir()] == [".lock"]


def test_memory_holds_two_chunks_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vl_store, "CHUNK", 10)
    alive: weakref.WeakSet[Conversation] = weakref.WeakSet()
    most = []

    class Stream(Source):
        def __iter__(self) -> Iterator[Conversation]:
            for number in range(200):
                each = conversation("red", (f"{number}.png",))
                alive.add(each)
                most.append(sum(1 for _ in alive))
                yield each

    held = pyarrow.total_allocated_bytes()
    store = make(tmp_path, Stream([]))
    assert pyarrow.total_allocated_bytes() - held < 10_000  # the file is mapped
    assert len(store) == 200 and store.images(199) == ["199.png"]
    assert len(most) == 200 and max(most) <= 21  # a chunk, the next one, and the one just made


def test_a_long_pass_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(passes, "_seconds", 0.0)
    monkeypatch.setattr(vl_store, "CHUNK", 2)
    make(None)
    assert re.match("2 conversations of .* tokenized", caplog.messages[0])


@pytest.mark.parametrize("kept", [True, False])
def test_another_process_gets_the_same(tmp_path: Path, kept: bool) -> None:
    store = make(tmp_path if kept else None)
    content = pickle.dumps(store)
    assert contents(pickle.loads(content)) == contents(store)
    assert (b"_opened" in content) == kept


def _contents(cache: str) -> list[object]:
    return contents(make(Path(cache)))


@pytest.mark.slow
def test_two_processes_share_a_file(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        one, other = pool.map(_contents, [str(tmp_path)] * 2)
    assert one == other == _contents(str(tmp_path))
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_refusals_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"paths.cache: cannot write to \S+: Not a directory\."):
        make(tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"data.template=phi: answers end with"):
        make(tmp_path / "other", template="phi")
    assert not (tmp_path / "other").exists()

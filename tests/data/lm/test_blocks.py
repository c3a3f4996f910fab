"""Documents as blocks: no token is lost or doubled, on any number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from tiny_lm import config, documents, write_corpus

from dynmoe.data.lm.blocks import (
    END,
    IGNORE,
    Blocks,
    Stream,
    TokenBatch,
    byte_pair_tokenizer,
    encoded,
    end_of,
)
from dynmoe.data.lm.module import CorpusData
from dynmoe.data.text.batches import Key
from dynmoe.data.text.tokens import id_lists
from dynmoe.training.build import build_data

TEXTS = [*documents(20), "naïve — 東京 🙂 \t end", f"it says {END} and goes on", "x"]
TOKENIZER = byte_pair_tokenizer(TEXTS, 300)


def test_a_corpus_of_more_tokens_than_32_bits_count(tmp_path: Path) -> None:
    """Mapped from a sparse file: neither the file nor the memory has its 8 GB."""
    count, length = 2**31 + 1000, 4096
    file = tmp_path / "ids"
    with file.open("wb") as content:
        content.truncate(4 * count)
        content.seek(4 * (count - 2))
        content.write(np.array([7, 8], dtype=np.int32).tobytes())
    before = pyarrow.total_allocated_bytes()
    ids = pyarrow.Array.from_buffers(
        pyarrow.int32(), count, [None, pyarrow.memory_map(str(file)).read_buffer()]
    )
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array([0, count], pyarrow.int64()), ids)
    assert column.type == id_lists([[1]]).type
    stream = Stream(pyarrow.table({"ids": column}))
    assert pyarrow.total_allocated_bytes() - before < 10_000
    last = count // length
    assert len(stream) == count and stream.counts(length)[last] == count % length
    read, predicted = stream.block(last, length, 0)
    assert predicted.tolist()[-3:] == [0, 7, 8] and read.tolist()[-2:] == [0, 7]


def test_nothing_is_unknown_to_the_tokenizer() -> None:
    stream = encoded(TEXTS, TOKENIZER, "", None)
    pieces = np.split(stream.ids, np.flatnonzero(stream.ids == end_of(TOKENIZER)) + 1)[:-1]
    assert [TOKENIZER.decode(ids[:-1]) for ids in pieces] == TEXTS
    assert len(TOKENIZER) == 300 and end_of(TOKENIZER) == 0


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = byte_pair_tokenizer(TEXTS, 300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


@pytest.mark.parametrize("length", [1, 7, 16, 10_000])
def test_blocks_predict_every_token_once(length: int) -> None:
    stream = encoded(TEXTS, TOKENIZER, "", None)
    found = [stream.block(row, length, 0) for row in range(len(stream.counts(length)))]
    read, predicted = (np.concatenate(parts) for parts in zip(*found, strict=True))
    assert predicted.tolist() == stream.ids.tolist()
    assert read.tolist() == [0, *stream.ids[:-1].tolist()]
    assert [len(one) for one, _ in found] == stream.counts(length).tolist()


def test_padding_is_at_the_end_alone() -> None:
    stream = encoded(TEXTS, TOKENIZER, "", None)
    rows = len(stream.counts(16))
    blocks = Blocks({"train": stream}, 16, 0)
    last, whole = (
        blocks.__getitems__([Key("train", row) for row in chosen])
        for chosen in ((0, rows - 1), (0, 1))
    )
    short = int(stream.counts(16)[-1])
    assert last.tokens["attention_mask"].sum(1).tolist() == [16, short]
    assert (last.label[1, short:] == IGNORE).all() and (last.label[1, :short] != IGNORE).all()
    assert "attention_mask" not in whole.tokens
    assert (whole.tokens["input_ids"][:, 1:] == whole.label[:, :-1]).all()


def test_the_cache_gives_the_same_stream(tmp_path: Path) -> None:
    first = encoded(TEXTS, TOKENIZER, "digest", tmp_path)
    (file,) = tmp_path.glob("stream-*.arrow")
    made = file.stat().st_mtime_ns
    again = encoded(TEXTS, TOKENIZER, "digest", tmp_path)
    assert again.ids.tolist() == first.ids.tolist() and file.stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes()[:-40])
    assert encoded(TEXTS, TOKENIZER, "digest", tmp_path).ids.tolist() == first.ids.tolist()
    encoded(TEXTS[:-1], TOKENIZER, "other", tmp_path)
    assert len(list(tmp_path.glob("stream-*.arrow"))) == 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    write_corpus(path)
    return path


def module(root: Path, rank: int = 0, ranks: int = 1, **plan: Any) -> CorpusData:
    data: Any = build_data(config(root, "data.cache=null"), **plan)
    data.setup()
    data.__class__ = type("OnRank", (CorpusData,), {"_rank": rank, "_world_size": ranks})
    return data


def predicted(batches: list[TokenBatch]) -> Counter[tuple[int, int, int]]:
    """Set, block and token of every prediction."""
    return Counter(
        (batch.source, row, place)  # type: ignore[misc]
        for batch in batches
        for row, labels in zip(batch.row.tolist(), batch.label, strict=True)
        for place in range(int((labels != IGNORE).sum()))
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_of_one(root: Path, ranks: int) -> None:
    alone = list(module(root).train_dataloader())
    parts = [list(module(root, rank, ranks).train_dataloader()) for rank in range(ranks)]
    for step, whole in enumerate(alone):
        own = [part[step] for part in parts]
        used = [batch for batch in own if batch.weight]
        assert sorted(row for batch in used for row in batch.row.tolist()) == sorted(
            whole.row.tolist()
        )
        # The mean over ranks is the mean over the tokens of the step.
        counts = [int((batch.label != IGNORE).sum()) for batch in own]
        total = int((whole.label != IGNORE).sum())
        for batch, count in zip(own, counts, strict=True):
            assert batch.weight in (0, pytest.approx(count * ranks / total))
    evaluated = [
        predicted(list(module(root, rank, ranks).val_dataloader())) for rank in range(ranks)
    ]
    assert sum(evaluated, Counter()) == predicted(list(module(root).val_dataloader()))
    assert set(sum(evaluated, Counter()).values()) == {1}


def test_an_epoch_trains_every_token_once_and_follows_the_seed(root: Path) -> None:
    data = module(root, steps=-1, epochs=1, eval_every=1000)
    batches = list(data.train_dataloader())
    assert len(batches) == data.steps == data.steps_per_epoch
    found = predicted(batches)
    assert set(found.values()) == {1} and found.total() == data.facts["tokens"]["train"]
    again = list(module(root, steps=-1, epochs=1, eval_every=1000).train_dataloader())
    assert all(torch.equal(a.label, b.label) for a, b in zip(batches, again, strict=True))
    other = list(module(root, steps=-1, epochs=1, eval_every=1000, seed=1).train_dataloader())
    assert any(a.row.tolist() != b.row.tolist() for a, b in zip(batches, other, strict=True))


def test_sizes(root: Path) -> None:
    data = module(root)
    facts = data.facts
    assert data.env_names == ["validation", "test"] and data.test_envs == [1]
    for name, documents_ in data.sets.items():
        assert facts["bytes"][name] == len("".join(documents_).encode())
        assert facts["documents"][name] == len(documents_)
        assert data.sizes[name] == -(-facts["tokens"][name] // 16)
    data.print_check()

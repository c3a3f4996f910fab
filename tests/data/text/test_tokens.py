"""Proves what tokens are kept, when they are made anew, and the order of a made vocabulary."""

from __future__ import annotations

import io
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dynmoe.data.lm.blocks import BYTE_PAIRS, byte_pair_tokenizer
from dynmoe.data.text import tokens
from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.tokens import (
    WORDS,
    Special,
    encode,
    fingerprint,
    load_tokenizer,
    vocabulary_size,
    word_tokenizer,
)
from dynmoe.data.text.vocabulary import VocabularyData, kept_tokenizer
from dynmoe.data.vl.chat import CONVERSATIONS, conversation_tokenizer
from dynmoe.errors import ConfigError, DataError

FIRST = ["the cat sat on the mat", "a dog", "the end of the long story of the cat", ""]
SECOND = ["the mat", "a long dog of a dog", "end", "cat"]


def texts(second: list[str] | None = SECOND) -> TextSet:
    return TextSet(FIRST, second, np.zeros(4, dtype=np.int64), np.arange(4))


def tokenizer(size: int = 50):
    return word_tokenizer([*FIRST, *SECOND], size)


def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_tokenized", lambda *_: pytest.fail("made anew"))


def test_most_frequent_words_come_first_and_equals_by_alphabet() -> None:
    made = word_tokenizer(["b B a c", "c a d e"], 8)
    assert made.convert_ids_to_tokens(range(len(made))) == [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        *("a", "b", "c", "d"),
    ]
    assert made.pad_token_id == 0


def test_sentences_are_framed_as_in_bert() -> None:
    made = tokenizer()
    pair = made("The cat", "unseen dog")
    assert made.convert_ids_to_tokens(pair["input_ids"]) == [
        *("[CLS]", "the", "cat", "[SEP]"),
        *("[UNK]", "dog", "[SEP]"),
    ]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert made("cat")["token_type_ids"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("made", "special"),
    [
        (tokenizer(), WORDS),
        (conversation_tokenizer([*FIRST, *SECOND], 50), CONVERSATIONS),
        (byte_pair_tokenizer([*FIRST, *SECOND], 270), BYTE_PAIRS),
    ],
)
def test_a_learnt_tokenizer_comes_back_from_its_file(
    made: PreTrainedTokenizerFast, special: Special, tmp_path: Path
) -> None:
    made(["the cat", "a dog of"], padding=True, truncation=True, max_length=2)  # changes its state
    data = SimpleNamespace(learns=True, tokenizer=made)
    VocabularyData.keep(data, tmp_path)  # type: ignore[arg-type]
    found = kept_tokenizer(tmp_path / "tokenizer.json", special)
    assert fingerprint(found, []) == fingerprint(made, [])
    assert found.special_tokens_map == made.special_tokens_map
    assert found.model_input_names == made.model_input_names
    assert found.model_max_length == made.model_max_length
    for each in FIRST:
        assert found(each) == made(each)
        assert found.decode(found(each)["input_ids"]) == made.decode(made(each)["input_ids"])
    assert len(found("the end of the long story")["input_ids"]) > 2


@pytest.mark.parametrize("second", [None, SECOND])
@pytest.mark.parametrize("kept", [True, False])
def test_rows_are_what_the_tokenizer_gives(
    tmp_path: Path, second: list[str] | None, kept: bool
) -> None:
    made = tokenizer()
    encoded = encode(texts(second), made, 8, tmp_path if kept else None)
    columns = (FIRST,) if second is None else (FIRST, second)
    wanted = [
        dict(made(*pair, truncation=True, max_length=8)) for pair in zip(*columns, strict=True)
    ]
    assert encoded.rows([2, 0, 0]) == [wanted[2], wanted[0], wanted[0]]
    assert encoded.lengths.tolist() == [len(row["input_ids"]) for row in wanted]
    assert len(encoded) == 4
    assert encoded.lengths.max() == 8


def test_control_tokens_in_a_text_are_text() -> None:
    made = tokenizer()
    said = TextSet(["The [SEP] cat [PAD]"], ["[CLS]"], np.zeros(1, dtype=np.int64), np.arange(1))
    (row,) = encode(said, made, 32, None).rows([0])
    words = made.convert_ids_to_tokens(row["input_ids"])
    assert words.count("[SEP]") == 2 and words.count("[CLS]") == 1 and "[PAD]" not in words
    assert sum(row["token_type_ids"]) == 1 + len(made.tokenize("[CLS]", split_special_tokens=True))


def test_a_kept_file_is_read_again_after_the_tokenizer_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokenizer()
    rows = encode(texts(), made, 8, tmp_path).rows([0, 1, 2, 3])
    made(FIRST, padding=True, truncation=True, max_length=3)
    forbid_tokenizing(monkeypatch)
    assert encode(texts(), made, 8, tmp_path).rows([0, 1, 2, 3]) == rows


def test_each_of_texts_tokenizer_and_length_has_its_own_file(tmp_path: Path) -> None:
    encode(texts(), tokenizer(), 8, tmp_path)
    encode(texts(None), tokenizer(), 8, tmp_path)
    encode(texts(), tokenizer(10), 8, tmp_path)
    encode(texts(), tokenizer(), 9, tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"garbage" * 99,
        lambda content: content[: -len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
        lambda content: content.replace(bytes([5, 0, 0, 0]), bytes([6, 0, 0, 0])),  # a token's id
    ],
    ids=["empty", "garbage", "cut", "one bit", "half zeroed", "another token"],
)
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encode(texts(), tokenizer(), 8, tmp_path).rows([0, 1, 2, 3])
    (file,) = tmp_path.glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert file.read_bytes() != content
    assert encode(texts(), tokenizer(), 8, tmp_path).rows([0, 1, 2, 3]) == rows
    forbid_tokenizing(monkeypatch)
    encode(texts(), tokenizer(), 8, tmp_path)


def _lengths(cache: str) -> list[int]:
    return encode(texts(), tokenizer(), 8, Path(cache)).lengths.tolist()


@pytest.mark.slow
def test_two_processes_share_a_file(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        one, other = pool.map(_lengths, [str(tmp_path)] * 2)
    assert one == other == _lengths(str(tmp_path))
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"paths.cache: cannot write to \S+: Not a directory."):
        encode(texts(), tokenizer(), 8, tmp_path / "file" / "cache")


def test_deberta_v3_has_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(FIRST + SECOND),
        model_writer=model,
        vocab_size=24,
        minloglevel=2,
    )
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    made = load_tokenizer(str(tmp_path), None)
    row = encode(texts(None), made, 128, None).rows([0])[0]["input_ids"]
    assert made.decode(row, skip_special_tokens=True) == FIRST[0]


def test_a_tokenizer_without_a_token_for_padding_is_refused(tmp_path: Path) -> None:
    made = tokenizer()
    made.pad_token = None
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=f"backbone.path={tmp_path}: .*no token for padding"):
        load_tokenizer(str(tmp_path), None)


def test_ids_with_gaps_need_embeddings_up_to_the_largest() -> None:
    made = tokenizer()
    assert vocabulary_size(made) == len(made)
    model = WordLevel({"[PAD]": 0, "[UNK]": 1, "cat": 9}, "[UNK]")
    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))) == 10


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"backbone.path: Slow has no tokenizer.json"):
        encode(texts(), Slow(), 8, None)  # type: ignore[arg-type]

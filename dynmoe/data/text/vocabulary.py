"""The tokenizer of a run: one that is named, or learnt from its data and kept in its folder."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dynmoe.data.base import TaskData
from dynmoe.data.text.tokens import Special, load_tokenizer
from dynmoe.errors import DataError
from dynmoe.records import VOCABULARY, RunFolder, replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class VocabularyData(TaskData):
    """Texts as tokens. Without a tokenizer's path and name, a vocabulary is learnt from the data.

    The weights of a run mean nothing with another vocabulary: `keep` leaves it with the run, and
    after `restore` it is taken from there, whatever the data are now.
    """

    special: ClassVar[Special]
    """Of the vocabulary that is learnt."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: str | None
    tokenizer_name: str | None
    _kept: Path | None = None

    @property
    def learns(self) -> bool:
        """Whether the vocabulary is learnt from the data."""
        return self.tokenizer_path is None and self.tokenizer_name is None

    @abstractmethod
    def learnt(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """A tokenizer of the words or pieces of `texts`."""

    def restore(self, folder: Path) -> None:
        """Raises RecordError if the vocabulary of a finished run has changed."""
        RunFolder(folder).check_unchanged(VOCABULARY)
        self._kept = file if (file := folder / VOCABULARY).exists() else None

    def keep(self, folder: Path) -> None:
        if self.learns:
            state = json.loads(self.tokenizer.backend_tokenizer.to_str())
            # Left there by the last call, and not the vocabulary's.
            state |= {"truncation": None, "padding": None}
            replace_file(
                folder / VOCABULARY, json.dumps(state, indent=1, ensure_ascii=False) + "\n"
            )

    def made_tokenizer(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerBase:
        """The tokenizer that is named, else that of the run, else one learnt from the texts.

        Raises:
            ConfigError: no such tokenizer.
            DataError: that of the run is damaged.
        """
        if not self.learns:
            return load_tokenizer(self.tokenizer_path, self.tokenizer_name)
        if self._kept is not None:
            return kept_tokenizer(self._kept, self.special)
        return self.learnt(texts())

    def read_tokenizer(self) -> None:
        """Make the tokenizer; data are read only if it is to be learnt from them.

        Raises:
            ConfigError, DataError: as `setup`.
        """
        if self.learns and self._kept is None:
            self.setup("validate")
        else:
            self.tokenizer = self.made_tokenizer(list)


def kept_tokenizer(file: Path, special: Special) -> PreTrainedTokenizerFast:
    """A tokenizer that was learnt, from its file.

    Raises:
        DataError: the file is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return special.wrapped(Tokenizer.from_file(str(file)))
    except Exception as error:  # tokenizers raises nothing more special
        raise DataError(
            f"{file}: not the tokenizer that a run has learnt ({error}). Put it back, or train the "
            "run again with overwrite=true"
        ) from None

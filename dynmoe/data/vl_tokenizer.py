"""The tokenizer of conversations: a language model's, or one of whole words of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from dynmoe.data.conversations import IMAGE_PLACEHOLDER
from dynmoe.data.text.tokens import load_tokenizer
from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def tokenizer_of(
    data: str, path: str | None, name: str | None, words: Callable[[], Iterable[str]] | None
) -> PreTrainedTokenizerBase:
    """The one of a local folder or of the hub; where none is named, one of the texts `words()`.

    Raises:
        ConfigError: no such tokenizer, or none is named and `data` has no vocabulary.
    """
    if path is not None or name is not None:
        return load_tokenizer(path, name)
    if words is None:
        raise ConfigError(
            f"backbone: {data} has no vocabulary of its own. Give a language model with a "
            "tokenizer: backbone.model=NAME or backbone.path=FOLDER"
        )
    return conversation_tokenizer(words(), size=8192)


def conversation_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """For small models from scratch: lower-case words between white space, the most frequent
    first, equals by the alphabet.

    `size` counts the special tokens [PAD] (0), [UNK], [BOS], [EOS] and [ANSWER] too. They make the
    template `simple`: `[BOS] question [ANSWER] answer [EOS] question [ANSWER] answer [EOS]`.
    Ids are decoded to words with a space between them. An image's placeholder is no word.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[ANSWER]"]
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, special_tokens=special, show_progress=False
    )
    words.train_from_iterator((text.replace(IMAGE_PLACEHOLDER, " ") for text in texts), trainer)
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", words.token_to_id("[BOS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        additional_special_tokens=["[ANSWER]"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )

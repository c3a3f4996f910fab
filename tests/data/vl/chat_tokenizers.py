"""Tokenizers made in memory whose tokens can be written down by hand."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynmoe.data.vl.chat import (
    IGNORE,
    IMAGE,
    EncodedConversation,
    IdArray,
    conversation_tokenizer,
    encode_all,
    encode_prompts,
)
from dynmoe.data.vl.conversations import Conversation

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def whole_words(*texts: str, ends: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The package's own, which knows the words of `texts` and `SYSTEM`, and further `ends`."""
    made = conversation_tokenizer([SYSTEM, "user: assistant:", *texts], 1000)
    made.add_special_tokens({"additional_special_tokens": list(ends)})
    return made


def byte_level(
    words: str = "", specials: tuple[str, ...] = (), bos: str | None = None, trim: bool = True
) -> PreTrainedTokenizerFast:
    """BPE whose tokens are bytes, and beginnings of `words` with a space before them (Ġ).

    With `bos` that token stands before a text; `trim` leaves a token's space out of its offsets.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        (f"Ġ{word[:size]}", letter)  # " r", " re", " red"
        for word in words.split()
        for size, letter in enumerate(word)
    ]
    merges = list(dict.fromkeys(merges))
    vocabulary = {token: place for place, token in enumerate([*alphabet, *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*specials, *([bos] if bos else [])])
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
            )
        )
    made.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=specials[0] if specials else None,
        clean_up_tokenization_spaces=False,
    )


def sentence_piece(words: str) -> PreTrainedTokenizerFast:
    """As Llama's: letters, and `words` with a space before them (▁), one before every text too."""
    pieces = ["<unk>", "▁", *sorted(set(words) - {" "}), *(f"▁{word}" for word in words.split())]
    scores = [(piece, -1.0 if piece[0] == "▁" else -9.0) for piece in dict.fromkeys(pieces)]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def written(encoded: EncodedConversation, tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokens, those with a label marked by a star, an image's position as <image>."""
    result = []
    for token, label in zip(encoded.ids.tolist(), encoded.labels.tolist(), strict=True):
        assert label in (token, IGNORE)
        name = "<image>" if token == IMAGE else tokenizer.convert_ids_to_tokens(token)
        result.append(name + "*" * (label != IGNORE))
    return " ".join(result)


def encode(conversation: Conversation, *arguments: Any) -> EncodedConversation | None:
    """`encode_all` of one conversation."""
    return encode_all([conversation], *arguments)[0]


def encode_prompt(question: str, num_images: int, *arguments: Any) -> IdArray:
    """`encode_prompts` of one question."""
    return encode_prompts([(question, num_images)], *arguments)[0]

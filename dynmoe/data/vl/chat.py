"""Conversations as token ids, with labels on the tokens that the model has to generate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dynmoe.data.text.tokens import Special, word_level_tokenizer
from dynmoe.data.vl.conversations import IMAGE_PLACEHOLDER, Conversation, Message
from dynmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE = -200
"""Id at the positions of an image's patches (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORE = -100
"""Label of a position without loss."""

CHUNK = 1000  # texts tokenized at once: offsets of all would fill the memory

IdArray = npt.NDArray[np.int32]


class EncodedConversation(NamedTuple):
    """A conversation: `labels` are the ids at the tokens of answers and of their ends, else
    `IGNORE`."""

    ids: IdArray
    """[N] int32; an image is a run of `IMAGE`."""
    labels: IdArray
    """[N] int32."""


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_tokens: int,
    max_length: int,
) -> list[EncodedConversation | None]:
    """At most `max_length` tokens of each conversation, an image being `image_tokens` of them.

    None where an image is cut off, or every answer. The text is cut at its images, and each piece
    tokenized as a whole. A token belongs to an answer if it begins there, and an answer begins
    right after the assistant's tag: labels are what has to be generated after the prompt. What is
    said has no control tokens: see `without_controls`.

    Raises:
        ConfigError: `template` and `tokenizer` do not fit together.
    """
    form = checked(tokenizer, template)
    spans = [
        form.render([without_controls(message, tokenizer) for message in each.messages], tokenizer)
        for each in conversations
    ]
    return [_cut(encoded, max_length) for encoded in _encoded(spans, tokenizer, form, image_tokens)]


def encode_prompts(
    questions: Sequence[tuple[str, int]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_tokens: int,
) -> list[IdArray]:
    """Ids [N] of each question and its number of images, up to where the assistant begins to speak.

    They are not cut. A question without placeholders has its images before it, one a line, as
    LLaVA asks.

    Raises:
        ConfigError: `template` and `tokenizer` do not fit together.
        DataError: other placeholders than images.
    """
    form = checked(tokenizer, template)
    texts = [_with_placeholders(text, num_images) for text, num_images in questions]
    spans = [
        form.render([without_controls(Message("user", text), tokenizer)], tokenizer)
        for text in texts
    ]
    return [each.ids for each in _encoded(spans, tokenizer, form, image_tokens)]


def encode_answers(
    answered: Sequence[tuple[str, int, str]], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[list[int]]:
    """Token ids of the right answers of questions (text, number of images, answer), each with what
    ends it: the labels that a conversation of the question and this answer has."""
    form = checked(tokenizer, template)
    said = [
        [Message("user", _with_placeholders(text, images)), Message("assistant", answer)]
        for text, images, answer in answered
    ]
    spans = [
        form.render([without_controls(message, tokenizer) for message in each], tokenizer)
        for each in said
    ]
    encoded = _encoded(spans, tokenizer, form, image_tokens=1)
    return [each.labels[each.labels != IGNORE].tolist() for each in encoded]


def without_controls(message: Message, tokenizer: PreTrainedTokenizerBase) -> Message:
    """The message with a space in each control token, "</s>" becoming "< /s>".

    The tokenizer would take it for the end of an answer, a role or padding, and a model would learn
    to go on behind it. Placeholders of images stay in a user's text.
    """
    pattern = _controls(tokenizer)
    if not pattern.search(message.text):
        return message
    pieces = message.text.split(IMAGE_PLACEHOLDER) if message.role == "user" else [message.text]
    return Message(message.role, IMAGE_PLACEHOLDER.join(_spaced(each, pattern) for each in pieces))


def has_controls(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `without_controls` changes what is said."""
    return any(without_controls(each, tokenizer) != each for each in conversation.messages)


def _spaced(text: str, pattern: re.Pattern[str]) -> str:
    while pattern.search(text):  # a space may make another one of what stands around it
        text = pattern.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)
    return text


@lru_cache(maxsize=8)
def _controls(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches a special token; of a single character none, which is no control token."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    texts = sorted((token for token in tokens if len(token.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # which never matches


def end_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The token that ends an answer, where generation stops; None for `plain`, which has none.

    Raises:
        ConfigError: `template` and `tokenizer` do not fit together.
    """
    end = checked(tokenizer, template).end(tokenizer)
    return None if end is None else tokenizer.encode(end, add_special_tokens=False)[-1]


@lru_cache(maxsize=8)
def checked(tokenizer: PreTrainedTokenizerBase, name: str) -> Template:
    """The template of that name.

    Raises:
        ConfigError: there is none, it ends answers with what is not one token of the tokenizer, or
            a prompt would not be tokenized as it was in training.
    """
    owner = tokenizer.name_or_path or type(tokenizer).__name__
    if name not in TEMPLATES:
        raise ConfigError(f"data.template={name}: expected one of {', '.join(TEMPLATES)}.")
    if not tokenizer.is_fast:
        raise ConfigError(
            f"backbone.path: {owner} has no tokenizer.json. Save one there with transformers' "
            "save_pretrained, or take a backbone with a fast tokenizer."
        )
    form = TEMPLATES[name]
    end = form.end(tokenizer)
    if end is not None and tokenizer.tokenize(f"a{end}")[-1] != end:
        raise ConfigError(
            f"data.template={name}: answers end with {end or 'an eos token'}, which is not one "
            f"token of {owner}. Take the template this model was trained with, data.template="
            "tokenizer if it has its own, or add the token to the tokenizer."
        )
    probe = [Message("user", f"{IMAGE_PLACEHOLDER}\na"), Message("assistant", "b")]
    spans = [form.render(probe[:1], tokenizer), form.render(probe, tokenizer)]
    prompt, whole = _encoded(spans, tokenizer, form, 1)
    answer = whole.labels[whole.labels != IGNORE]
    asked = len(prompt.ids)
    if whole.ids[:asked].tolist() != prompt.ids.tolist() or (
        whole.ids[asked:][: len(answer)].tolist() != answer.tolist()
    ):
        raise ConfigError(
            f"data.template={name}: {owner} joins the end of a prompt with the beginning of its "
            "answer into one token, so that a model cannot be asked as it was trained. "
            "Take another template."
        )
    return form


def _with_placeholders(question: str, num_images: int) -> str:
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, num_images):
        raise DataError(
            f"question {question!r}: expected {num_images} {IMAGE_PLACEHOLDER}, one for each "
            f"image, or none; found {placeholders}."
        )
    return question if placeholders else f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def _encoded(
    spans: Sequence[list[Span]],
    tokenizer: PreTrainedTokenizerBase,
    form: Template,
    image_tokens: int,
) -> list[EncodedConversation]:
    if not 0 < len(spans) <= CHUNK:  # a tokenizer refuses an empty list
        chunks = (spans[start : start + CHUNK] for start in range(0, len(spans), CHUNK))
        return [one for each in chunks for one in _encoded(each, tokenizer, form, image_tokens)]
    pieces = [_pieces(each) for each in spans]
    tokenized = tokenizer(
        ["".join(text for text, _ in piece) for each in pieces for piece in each],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    rows = iter(zip(tokenized["input_ids"], tokenized["offset_mapping"], strict=True))
    first = _unlabelled(_bos(tokenizer) if form.adds_bos else [])
    image = _unlabelled([IMAGE] * image_tokens)
    result = []
    for each in pieces:
        parts = [first]
        for place, piece in enumerate(each):
            parts += [image] * (place > 0) + [_labelled(piece, *next(rows))]
        ids, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        labels[:1] = IGNORE  # no token precedes it that it could be generated from
        result.append(EncodedConversation(ids, labels))
    return result


def _pieces(spans: list[Span]) -> list[list[Span]]:
    """The spans between images, whose placeholders are dropped."""
    pieces: list[list[Span]] = [[]]
    for span in spans:
        first, *others = [span.text] if span.is_answer else span.text.split(IMAGE_PLACEHOLDER)
        pieces[-1].append(Span(first, span.is_answer))
        pieces += [[Span(text, False)] for text in others]
    return pieces


def _labelled(
    piece: list[Span], ids: list[int], offsets: list[tuple[int, int]]
) -> EncodedConversation:
    """`offsets` are the first and last character of each token in the text of the piece."""
    ends = np.cumsum([len(text) for text, _ in piece])
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    at = np.minimum(np.searchsorted(ends, starts, side="right"), len(piece) - 1)
    answers = np.array([is_answer for _, is_answer in piece])[at]
    row = np.array(ids, dtype=np.int32)
    return EncodedConversation(row, np.where(answers, row, np.int32(IGNORE)))


def _unlabelled(ids: list[int]) -> EncodedConversation:
    row = np.array(ids, dtype=np.int32)
    return EncodedConversation(row, np.full_like(row, IGNORE))


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer itself puts before a text, if it does."""
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []


def _cut(encoded: EncodedConversation, max_length: int) -> EncodedConversation | None:
    ids, labels = encoded.ids[:max_length], encoded.labels[:max_length]
    whole_images = not (encoded.ids[max_length:] == IMAGE).any()
    return EncodedConversation(ids, labels) if whole_images and (labels != IGNORE).any() else None


# Templates: the text of a conversation, and the parts of it that the model has to generate.
#
# Sources: MoE-LLaVA's moellava/conversation.py (v1, phi, qwen, stablelm, plain) and train/train.py
# (which tokens are learnt); LLaVA's train/train.py (plain).

_OTHERS = "Take another: data.template=simple, v1, phi, qwen or stablelm."

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


class Span(NamedTuple):
    """A stretch of the text of a conversation."""

    text: str
    is_answer: bool
    """Whether the model has to generate it: an answer with the token that ends it."""


class Template(Protocol):
    """Turns conversations into text; two templates differ in their `repr`."""

    def render(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """The whole text. If the last message is the user's it stops where the assistant begins."""

    def end(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """The token that ends an answer; None if nothing does, empty if the tokenizer lacks it."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's token for the beginning is put before the text."""


@dataclass(frozen=True)
class Turns:
    """Tags before what each side says.

    {system}{user}question{assistant} answer{end}{user}question{assistant} answer{end}
    """

    user: str
    assistant: str
    system: str = ""
    stop: str | None = None
    """The token after an answer; None: the tokenizer's eos."""
    adds_bos = True

    def render(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        spans = [Span(self.system, False)]
        for role, text in messages:
            if role == "user":
                spans.append(Span(f"{self.user}{text}{self.assistant}", False))
            else:
                spans.append(Span(f" {text}{self.end(tokenizer)}", True))
        return spans

    def end(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return self.stop or tokenizer.eos_token or ""


@dataclass(frozen=True)
class Plain:
    """Images and their captions, each with a line feed; none of the user's words (LLaVA's plain).

    No token ends a caption: the line feed may be a part of its last one.
    """

    adds_bos = True

    def render(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        return [
            Span(IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER), False)
            if role == "user"
            else Span(f"{text}\n", True)
            for role, text in messages
        ]

    def end(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return None


@dataclass(frozen=True)
class Own:
    """The tokenizer's chat template; the special token it puts after an answer ends it."""

    adds_bos = False  # templates write it themselves

    def render(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        whole = _rendered(messages, tokenizer)
        if not all(message.text.strip() in whole for message in messages):
            raise _refused(tokenizer, "leaves out some of what is said")
        spans = []
        place = 0
        for turn, message in enumerate(messages):
            if message.role == "user":
                continue
            prompt = _rendered(messages[:turn], tokenizer)
            answered = _rendered(messages[: turn + 1], tokenizer)
            ended = _ended(tokenizer).match(answered, len(prompt))
            if not ended:
                raise _refused(tokenizer, "puts no special token after an answer")
            start, stop = ended.span(1)
            if not (answered.startswith(prompt) and whole.startswith(answered[:stop])):
                raise _refused(tokenizer, "writes a turn in another way when others follow it")
            spans += [Span(whole[place:start], False), Span(whole[start:stop], True)]
            place = stop
        return [*spans, Span(whole[place:], False)]

    def end(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        spans = self.render([Message("user", "a"), Message("assistant", "b")], tokenizer)
        (answer,) = (span.text for span in spans if span.is_answer)
        return tokenizer.tokenize(answer)[-1]


# The names are those of `turns.TEMPLATE_NAMES`.
TEMPLATES: dict[str, Template] = {
    "plain": Plain(),
    "simple": Turns(user="", assistant=" [ANSWER]"),
    "v1": Turns("USER: ", " ASSISTANT:", SYSTEM, "</s>"),
    "phi": Turns("USER: ", " ASSISTANT:", SYSTEM, "<|endoftext|>"),
    "qwen": Turns("USER: ", " ASSISTANT:", SYSTEM, "<|endoftext|>"),
    "stablelm": Turns("USER: ", " ASSISTANT:", SYSTEM, "<|endoftext|>"),
    "tokenizer": Own(),
}


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text by the tokenizer's template, up to the assistant's turn if the user spoke last."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise _refused(tokenizer, "is missing")
    turns = [{"role": message.role, "content": message.text} for message in messages]
    asked = messages[-1].role == "user"
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
    except TemplateError as error:
        raise _refused(tokenizer, f"fails ({error})") from error
    return str(text)


@lru_cache(maxsize=8)
def _ended(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Match an answer, whose last special token ends the first group, and white space after it."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
    special = "|".join(map(re.escape, tokens)) or "(?!)"  # which never matches
    return re.compile(rf"(.*(?:{special}))\s*\Z", re.DOTALL)


def _refused(tokenizer: PreTrainedTokenizerBase, what: str) -> ConfigError:
    return ConfigError(
        f"data.template=tokenizer: the chat template of "
        f"{tokenizer.name_or_path or type(tokenizer).__name__} {what}. {_OTHERS}"
    )


CONVERSATIONS = Special(
    {"pad": "[PAD]", "unk": "[UNK]", "bos": "[BOS]", "eos": "[EOS]", "answer": "[ANSWER]"},
    {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False},
)


def conversation_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for small models from scratch, of lower-case words between white space.

    Frequent words come first, ties by the alphabet. `size` counts the special tokens [PAD] (0),
    [UNK], [BOS], [EOS] and [ANSWER] too. They make the template `simple`:
    `[BOS] question [ANSWER] answer [EOS] question [ANSWER] answer [EOS]`.
    Ids are decoded to words with a space between them. An image's placeholder is not a word.
    """
    from tokenizers import normalizers, pre_tokenizers

    return word_level_tokenizer(
        (text.replace(IMAGE_PLACEHOLDER, " ") for text in texts),
        size,
        CONVERSATIONS,
        normalizers.Lowercase(),
        pre_tokenizers.WhitespaceSplit(),
        ("[BOS] $A", None),
    )

"""How a conversation is written down for a language model, and which of it is the model's to say.

Sources: MoE-LLaVA's moellava/conversation.py (v1, phi, qwen, stablelm, plain) and train/train.py
(what of it is learnt); LLaVA's train/train.py (plain).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dynmoe.data.conversations import IMAGE_PLACEHOLDER, Message
from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHERS = "Take another: data.template=simple, v1, phi, qwen or stablelm."

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


class Span(NamedTuple):
    """A stretch of the text of a conversation."""

    text: str
    is_answer: bool
    """Whether the model has to say it: an answer with what ends it."""


class Template(Protocol):
    """Writes conversations down; `repr` tells two of them apart."""

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
    """The token behind an answer, None: the tokenizer's eos."""
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
    """The tokenizer's chat template; the special token it puts behind an answer ends it."""

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
                raise _refused(tokenizer, "puts no special token behind an answer")
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
    """By the tokenizer's template, up to where the assistant begins if the user spoke last."""
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
    """Matches an answer, its first group up to its last special token, and white space behind."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
    special = "|".join(map(re.escape, tokens)) or "(?!)"  # which never matches
    return re.compile(rf"(.*(?:{special}))\s*\Z", re.DOTALL)


def _refused(tokenizer: PreTrainedTokenizerBase, what: str) -> ConfigError:
    return ConfigError(
        f"data.template=tokenizer: the chat template of "
        f"{tokenizer.name_or_path or type(tokenizer).__name__} {what}. {_OTHERS}"
    )

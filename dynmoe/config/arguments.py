"""The words of a command line, before their meaning: options, key=value, and spaces gone astray."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence

OPEN, CLOSE = "[{(", "]})"


def read_arguments(
    parser: ArgumentParser, words: Sequence[str]
) -> tuple[Namespace, list[str], list[str]]:
    """Parse `words`: the result, the words in an order that `parser` can read, and problems.

    Options may stand between overrides. Words that are no override are mended where it is clear how
    they were meant, so that the values in them are checked as well.
    """
    options: list[str] = []
    others: list[str] = []
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        action = _action(parser, word)
        if action is not None:
            options.append(word)
            may_stand_alone = action.nargs == "?" and bool(rest) and _is_key(rest[0])
            if action.nargs != 0 and "=" not in word and rest and not may_stand_alone:
                options.append(rest.pop(0))
        elif word.startswith("-") and word != "--":
            meant = re.sub("^-+", "", word)
            if "=" not in meant and rest and not _is_key(rest[0]) and rest[0] != "=":
                value = rest.pop(0)
                word, meant = f"{word} {value}", f"{meant}={value}"
            fix = f"A key is set without dashes: {meant}" if "=" in meant else "--help has them all"
            found.append(f"{word}: no such option. {fix}")
            others += [meant] if "=" in meant else []
        else:
            others.append(word)
    overrides, astray = joined(others)
    return parser.parse_args([*options, *overrides]), [*options, *overrides], [*found, *astray]


def _action(parser: ArgumentParser, word: str) -> Action | None:
    """The option that a word names, in full or, as argparse allows, by its beginning."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return None
    known = {text: each for each in parser._actions for text in each.option_strings}
    if name in known:
        return known[name]
    near = {id(each): each for text, each in known.items() if text.startswith(name)}
    return next(iter(near.values())) if name.startswith("--") and len(near) == 1 else None


def _is_key(word: str) -> bool:
    return "=" in word or word.startswith(("-", "~"))


def joined(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without the spaces that split `key = value` or `key=[1, 2]`, and a message for each
    place that has them."""
    whole: list[str] = []
    found: list[str] = []
    rest = list(words)
    while rest:
        parts = [rest.pop(0)]
        while rest and _goes_on(parts, rest[0]):
            parts.append(rest.pop(0))
        is_list = len(parts) > 1 and any(each in parts[0] for each in OPEN)
        text = (" " if is_list else "").join(parts)
        if is_list:
            found.append(f"{text}: the shell splits it at its spaces. Quote it: '{text}'")
        elif len(parts) > 1:
            found.append(f"{' '.join(parts)}: no spaces around the '='. Write {text}")
        whole.append(text)
    return whole, found


def _goes_on(parts: Sequence[str], following: str) -> bool:
    """Whether the next word belongs to the one that `parts` have begun."""
    text = "".join(parts)
    opened = sum(text.count(each) for each in OPEN) - sum(text.count(each) for each in CLOSE)
    if opened > 0 and "=" in text:
        return "=" not in following
    if following.startswith("=") and "=" not in text:
        return True
    return text.endswith("=") and not _is_key(following)

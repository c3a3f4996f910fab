"""What stands below every table: the conditions that its numbers hold under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynmoe.comparison.run import Repetition, Run
from dynmoe.selection import RULES


def conditions(runs: Sequence[Run]) -> str:
    """Protocol, selection, repetitions, weights, data and versions of a table's runs.

    Where runs differ in one of them, all values are named.
    """
    if not runs:
        return "No finished run."
    facts = [run.facts for run in runs]
    repetitions = sorted({run.repetition for run in runs})
    versions = sorted({(name, text) for fact in facts for name, text in _versions(fact)})
    parts = [
        f"Protocol {every(fact['protocol'] for fact in facts)}",
        f"selection by {every(RULES[fact['selection']] for fact in facts)}",
        f"{counted(len(repetitions), 'repetition')} ({seeds(repetitions)})",
        f"{every(map(_steps, facts))} steps",
        f"backbone {every(fact['backbone'] for fact in facts)}",
        f"weights {every(fact['weights'] for fact in facts)}",
        f"data {_data(facts)}",
        f"versions {', '.join(f'{name} {text}' for name, text in versions) or 'unknown'}",
    ]
    at_the_end = sorted({run.setting for run in runs if not run.outcome.is_selected})
    if at_the_end:
        parts.append(f"the last step, as one run cannot decide: {', '.join(at_the_end)}")
    return f"{'; '.join(parts)}."


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def in_words(value: object) -> str:
    """A fact as text: `cpu Example CPU, cores 2`; `unknown` where it was not recorded."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def every(values: Iterable[object]) -> str:
    """All values that differ: `8 / 16`."""
    return " / ".join(dict.fromkeys(map(in_words, values)))


def seeds(repetitions: Iterable[Repetition]) -> str:
    """`seeds 0, 1, 2`, or `seed/trial seed 0/0, 1/1` where trial seeds vary too."""
    pairs = sorted(repetitions)
    if len({trial for _, trial in pairs}) > 1:
        return f"seed/trial seed {', '.join(f'{seed}/{trial}' for seed, trial in pairs)}"
    return f"seed{'s' * (len(pairs) != 1)} {', '.join(str(seed) for seed, _ in pairs)}"


def _steps(fact: dict[str, Any]) -> str:
    patience = fact.get("patience")
    return str(fact["steps"]) if patience is None else f"at most {fact['steps']}"


def _versions(fact: dict[str, object]) -> list[tuple[str, str]]:
    found = fact.get("versions")
    return [(str(k), str(v)) for k, v in found.items()] if isinstance(found, dict) else []


def _data(facts: Sequence[dict[str, object]]) -> str:
    """The hashes; splits, and the deal of digits into environments, differ between repetitions."""
    hashes = sorted({str(fact.get("data_hash", "unknown")) for fact in facts})
    more = f" and {len(hashes) - 3} more" if len(hashes) > 3 else ""
    return f"{' / '.join(hashes[:3])}{more}"

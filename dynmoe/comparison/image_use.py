"""Whether models answer from the images: the same questions about the images of others."""

from __future__ import annotations

from collections.abc import Sequence

from dynmoe.comparison.conditions import conditions
from dynmoe.comparison.paired import LEVEL, p_text, p_words, points_text, verdict
from dynmoe.comparison.run import Run, by_setting
from dynmoe.report.question_sets import SHUFFLED
from dynmoe.report.tables import Strong, Table, format_mean, format_number
from dynmoe.report.words import capital


def image_use_table(runs: Sequence[Run]) -> Table | None:
    """Every setting with the right images, with others, and how far one comes without; None
    without a set of exchanged images."""
    if not _has_exchanged(runs):
        return None
    name, words = runs[0].environment, runs[0].words
    rows: list[tuple[str, ...]] = []
    for setting, members in by_setting(runs).items():
        own, exchanged = (_scores(members, each) for each in (name, SHUFFLED))
        lost = _differences(own, exchanged)
        cells = (points_text(lost), p_text(lost))
        if verdict(lost) in ("beats", "is below"):
            cells = (Strong(cells[0]), Strong(cells[1]))
        rows.append((setting, format_mean(own), format_mean(exchanged), *cells, str(len(members))))
    baseline = runs[0].facts["baseline"] or {}
    answers = {
        "most frequent answer to the same question": f"{name}_score",
        "most frequent answer of all": "majority",
    }
    rows += [
        (f"no image: {what}", format_number(100 * baseline[key], ".1f"), "", "", "", "")
        for what, key in answers.items()
        if key in baseline
    ]
    return Table(
        f"{capital(words.measure)} with the right images and with others, {words.scale}",
        ("setting", name, SHUFFLED, f"{name} minus {SHUFFLED}, points", "p", "n"),
        tuple(rows),
        note=f"{SHUFFLED}: the questions and right answers of {name}, each about the image of "
        "another question; what a model loses there it had from the images. Differences are "
        f"paired by repetition; p is of a t test, two-sided; bold: p < {LEVEL}.",
        conditions=conditions(runs),
    )


def image_use_sentences(runs: Sequence[Run]) -> list[str]:
    """What the table allows to say of each setting, by rule."""
    if not _has_exchanged(runs):
        return []
    found = []
    for setting, members in by_setting(runs).items():
        lost = _differences(_scores(members, runs[0].environment), _scores(members, SHUFFLED))
        points = f"{points_text(lost)} points, {p_words(lost)}, n = {len(lost)}"
        said = {
            "beats": "is better with the right images than with others: it uses them",
            "cannot be told from": "cannot be told to use the images",
            "is below": "is worse with the right images than with others",
            "unknown": "was tried once, which proves nothing of its use of images",
        }[verdict(lost)]
        if verdict(lost) == "unknown":
            points = f"{points_text(lost)} points"
        found.append(f"{setting} {said} ({points}).")
    return found


def _has_exchanged(runs: Sequence[Run]) -> bool:
    return all(SHUFFLED in run.facts["env_names"] for run in runs)


def _scores(runs: Sequence[Run], name: str) -> list[float]:
    return [run.reported[f"{name}_score"] for run in runs]


def _differences(own: Sequence[float], others: Sequence[float]) -> list[float]:
    # Rounded: equal scores may differ by 1e-17 in their means, and that is no finding.
    return [round(a - b, 12) for a, b in zip(own, others, strict=True)]

"""The report of a collection of runs: what it says, in which order.

The claim comes first, then its cost, then pictures of what happened, then what it all rests on:
how the runs were made, and which are missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dynmoe.report import document
from dynmoe.report.claim import Claim, examine
from dynmoe.report.claim_figures import (
    draw_accuracy_by_parameters,
    draw_accuracy_by_time,
    draw_claim,
    draw_curves,
)
from dynmoe.report.claim_tables import (
    accuracy_table,
    claim_table,
    extent,
    headline,
    lacking,
    overview_table,
    sentences,
    title_of,
)
from dynmoe.report.cost_tables import (
    cost_table,
    generation_table,
    search_sentence,
    search_table,
    timing_table,
    unmeasured,
    values_table,
)
from dynmoe.report.costs import Timings, read_timings, search_cost
from dynmoe.report.document import Block, Document, Items, Picture, Section, Sheet
from dynmoe.report.part_figures import draw_k_by_part, draw_load_by_part
from dynmoe.report.provenance import every_run, how_it_was_made, what_is_missing
from dynmoe.report.routing_figures import (
    draw_experts,
    draw_k,
    draw_k_by_position,
    draw_load_by_class,
    draw_load_by_environment,
    draw_overlap,
)
from dynmoe.report.run import Problem, Run
from dynmoe.report.runs import Collection
from dynmoe.report.set_tables import (
    image_use_sentences,
    image_use_table,
    kind_tables,
    parts_table,
    published_table,
    sets_table,
    task_tables,
)
from dynmoe.report.tables import Strong, Table
from dynmoe.report.words import capital
from dynmoe.selection import RULES

LONGEST = 48
"""Letters of a name within a file's name."""


def write(collection: Collection, out: Path) -> list[Path]:
    """Write `report.html`, `report.md`, `tables/` and `figures/` into the folder `out`.

    Raises:
        RecordError: a damaged `timing.json` or `generation.json`.
    """
    return document.write(build(collection), out)


def build(collection: Collection) -> Document:
    """The report as a document; with several problems each has a section of its own."""
    problems = collection.problems
    claims = {problem: examine(collection, problem) for problem in problems}
    timings = read_timings(collection)
    several = len(problems) > 1
    names = {problem: _slug(_title_of(problem, problems)) for problem in problems}
    prefixes = {problem: f"{names[problem]}-" if several else "" for problem in problems}
    rest = [
        how_it_was_made(collection, timings.values()),
        what_is_missing(collection),
        Section(
            "every-run",
            "Every run",
            [
                Sheet(f"{prefix}runs", every_run(collection, problem))
                for problem, prefix in prefixes.items()
            ],
        ),
    ]
    parts = {
        problem: _sections(collection, problem, claims[problem], timings[problem], prefix)
        for problem, prefix in prefixes.items()
    }
    lead: list[Block] = [Strong(headline(claim)) for found in claims.values() for claim in found]
    lead.append(extent(collection))
    lead += [Sheet(name, table) for name, table in task_tables(collection).items()]
    if several:
        lead.append(Sheet("overview", overview_table(claims)))
        found = [
            Section(name, _title_of(problem, problems), sections=parts[problem])
            for problem, name in names.items()
        ]
    else:
        (found,) = parts.values()
    return Document(title_of(collection), lead, [*found, *(part for part in rest if part.blocks)])


def _title_of(problem: Problem, problems: Sequence[Problem]) -> str:
    """The data set, with as much more as tells it from the other problems."""
    if sum(other.dataset == problem.dataset for other in problems) == 1:
        return problem.dataset
    return f"{problem.dataset}, protocol {problem.protocol}, {RULES[problem.selection]}"


def _sections(
    collection: Collection,
    problem: Problem,
    claims: Sequence[Claim],
    timings: Timings,
    prefix: str,
) -> list[Section]:
    """All there is to say of one problem; names begin with `prefix`."""
    runs = collection.of(problem)
    noun = capital(runs[0].words.noun)
    shown = _exemplary(runs)
    examples = [next(run for run in runs if run.setting == setting) for setting in shown]
    parts: list[tuple[str, str, Iterable[Block | None]]] = [
        ("claim", "The claim", _claim(collection, problem, claims)),
        ("images", "Whether the images are used", _image_use(runs)),
        ("kinds", "By kind of question", _kinds(runs)),
        ("cost", "What it costs", _cost(collection, problem, claims, timings)),
        (
            "accuracy-by-cost",
            f"{noun} against cost",
            [
                draw_accuracy_by_parameters(runs),
                draw_accuracy_by_time(runs, timings)
                or f"{noun} against time is left out: {timings.refused or 'not measured'}.",
            ],
        ),
        (
            "experts",
            "Experts and k",
            [
                draw_experts(runs),
                draw_k_by_part(runs) or draw_k(runs),
                _sheet("parts", parts_table(runs)),
                draw_k_by_position(runs),
            ],
        ),
        (
            "load",
            "Which experts serve what",
            [
                draw_load_by_part(examples),
                draw_load_by_environment(examples),
                draw_load_by_class(examples),
                draw_overlap([run for name in shown for run in runs if run.setting == name]),
            ],
        ),
        ("curves", "Training", [draw_curves(runs)]),
    ]
    sections = []
    for name, title, blocks in parts:
        found = [_named(block, prefix) for block in blocks if block is not None]
        if found:
            sections.append(Section(prefix + name, title, found))
    return sections


def _claim(
    collection: Collection, problem: Problem, claims: Sequence[Claim]
) -> Iterator[Block | None]:
    for claim in claims:
        tag = "" if len(claims) == 1 else f"_{_slug(claim.setting)}"
        first, *others = sentences(claim)
        if len(collection.problems) > 1 or len(claims) > 1:  # else it stands above already
            yield Strong(first)
        yield Items(others)
        picture = draw_claim(claim)
        yield picture and replace(picture, name=picture.name + tag)
        yield Sheet(f"claim{tag}", claim_table(collection, claim))
    missing = lacking(collection, problem)
    if missing:
        yield Items(missing)
    yield Sheet("accuracy", accuracy_table(collection, problem))
    yield _sheet("published", published_table(collection.of(problem)))
    further = {"sets": sets_table, "values": values_table}
    for name, make in further.items():
        yield _sheet(name, make(collection, problem))


def _image_use(runs: Sequence[Run]) -> Iterator[Block | None]:
    table = image_use_table(runs)
    if table is not None:
        yield Items(image_use_sentences(runs))
        yield Sheet("images", table)


def _kinds(runs: Sequence[Run]) -> Iterator[Block | None]:
    tables = kind_tables(runs)
    for name, table in tables.items():
        yield Sheet("kinds" if len(tables) == 1 else f"kinds_{_slug(name)}", table)


def _sheet(name: str, table: Table | None) -> Sheet | None:
    return None if table is None else Sheet(name, table)


def _cost(
    collection: Collection, problem: Problem, claims: Sequence[Claim], timings: Timings
) -> Iterator[Block | None]:
    costs = [search_cost(collection, problem, claim.setting, timings.step_ms) for claim in claims]
    yield from map(search_sentence, costs)
    yield Sheet("size", cost_table(collection, problem))
    yield unmeasured(collection, timings) or Sheet(
        "time", timing_table(collection, problem, timings)
    )
    yield _sheet("generation", generation_table(collection, problem))
    for cost in costs:
        tag = "" if len(costs) == 1 else f"_{_slug(cost.setting)}"
        yield Sheet(f"search{tag}", search_table(collection, cost))


def _exemplary(runs: Sequence[Run]) -> list[str]:
    """Settings whose load is shown: the adaptive ones, and for contrast one of the grid.

    The most accurate one whose tokens choose among experts, if there is one.
    """
    adaptive = [run.setting for run in runs if run.kind == "adaptive"]
    accuracies: dict[str, list[float]] = {}
    chooses = {}
    for run in runs:
        if run.kind == "fixed":
            accuracies.setdefault(run.setting, []).append(run.outcome.accuracy)
            config = run.config
            chooses[run.setting] = config.get("moe.top_k", 0) < config["moe.num_experts"]
    contrast = sorted(
        accuracies,
        key=lambda name: (chooses[name], sum(accuracies[name]) / len(accuracies[name])),
    )
    return [*dict.fromkeys(adaptive), *contrast[-1:]]


def _named(block: Block, prefix: str) -> Block:
    """A block whose files have names that begin with `prefix`."""
    return replace(block, name=prefix + block.name) if isinstance(block, Sheet | Picture) else block


def _slug(text: str) -> str:
    """A part of file names: a setting's name may be longer than a file's may be."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(slug) <= LONGEST:
        return slug
    return f"{slug[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

"""The report of a collection of runs: its sentences, tables and figures, in their order.

The claim comes first, then its cost, then figures of what happened, then what all of it rests on:
how the runs were made, and which are missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dynmoe.report import (
    claim_figures,
    claim_tables,
    cost_tables,
    document,
    provenance,
    routing_figures,
    set_tables,
)
from dynmoe.report.claim import Claim, examine
from dynmoe.report.costs import Timings, read_timings, search_cost
from dynmoe.report.document import Block, Document, Items, Picture, Section, Sheet
from dynmoe.report.run import Problem, Run, by_setting
from dynmoe.report.runs import Collection
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
    """Return the report as a document; each of several problems has its own section."""
    problems = collection.problems
    several = len(problems) > 1
    titles = {problem: _title_of(problem, problems) for problem in problems}
    prefixes = {problem: f"{_slug(titles[problem])}-" if several else "" for problem in problems}
    claims = {problem: examine(collection, problem) for problem in problems}
    timings = read_timings(collection)
    parts = {
        problem: _sections(collection, problem, claims[problem], timings[problem], prefix)
        for problem, prefix in prefixes.items()
    }
    found = [Section(_slug(titles[each]), titles[each], sections=parts[each]) for each in problems]
    runs = [
        Sheet(f"{prefix}runs", provenance.every_run(collection, problem))
        for problem, prefix in prefixes.items()
    ]
    rest = [
        provenance.how_it_was_made(collection, timings.values()),
        provenance.what_is_missing(collection),
        Section("every-run", "Every run", runs),
    ]
    return Document(
        claim_tables.title_of(collection),
        [
            *(Strong(claim_tables.headline(claim)) for each in claims.values() for claim in each),
            claim_tables.extent(collection),
            *(Sheet(name, table) for name, table in set_tables.task_tables(collection).items()),
            *([Sheet("overview", claim_tables.overview_table(claims))] if several else []),
        ],
        [*(found if several else parts[problems[0]]), *(part for part in rest if part.blocks)],
    )


def _sections(
    collection: Collection,
    problem: Problem,
    claims: Sequence[Claim],
    timings: Timings,
    prefix: str,
) -> list[Section]:
    """Return the sections on one problem; the names of their files begin with `prefix`."""
    runs = collection.of(problem)
    noun, members = capital(runs[0].words.noun), by_setting(runs)
    shown = [members[setting] for setting in _exemplary(runs)]
    examples = [of_setting[0] for of_setting in shown]
    parts: list[tuple[str, str, Iterable[Block | None]]] = [
        ("claim", "The claim", _claim(collection, problem, claims)),
        ("images", "Whether the images are used", _image_use(runs)),
        ("kinds", "By kind of question", _kinds(runs)),
        ("cost", "What it costs", _cost(collection, problem, claims, timings)),
        (
            "accuracy-by-cost",
            f"{noun} against cost",
            [
                claim_figures.draw_accuracy_by_parameters(runs),
                claim_figures.draw_accuracy_by_time(runs, timings)
                or f"{noun} against time is left out: {timings.refused or 'not measured'}.",
            ],
        ),
        (
            "experts",
            "Experts and k",
            [
                routing_figures.draw_experts(runs),
                routing_figures.draw_k_by_part(runs) or routing_figures.draw_k(runs),
                _sheet("parts", set_tables.parts_table(runs)),
                routing_figures.draw_k_by_position(runs),
            ],
        ),
        (
            "load",
            "Which experts serve what",
            [
                routing_figures.draw_load_by_part(examples),
                routing_figures.draw_load_by_environment(examples),
                routing_figures.draw_load_by_class(examples),
                routing_figures.draw_overlap([run for each in shown for run in each]),
            ],
        ),
        ("curves", "Training", [claim_figures.draw_curves(runs)]),
    ]
    sections = []
    for name, title, blocks in parts:
        found = [
            replace(block, name=prefix + block.name)
            if isinstance(block, Sheet | Picture)
            else block
            for block in blocks
            if block is not None
        ]
        if found:
            sections.append(Section(prefix + name, title, found))
    return sections


def _claim(
    collection: Collection, problem: Problem, claims: Sequence[Claim]
) -> Iterator[Block | None]:
    for claim in claims:
        tag = _tag(claim.setting, claims)
        first, *others = claim_tables.sentences(claim)
        if len(collection.problems) > 1 or tag:  # else the head of the report has this sentence
            yield Strong(first)
        yield Items(others)
        picture = claim_figures.draw_claim(claim)
        yield picture and replace(picture, name=picture.name + tag)
        yield Sheet(f"claim{tag}", claim_tables.claim_table(collection, claim))
    missing = claim_tables.lacking(collection, problem)
    yield Items(missing) if missing else None
    yield Sheet("accuracy", claim_tables.accuracy_table(collection, problem))
    yield _sheet("published", set_tables.published_table(collection.of(problem)))
    yield _sheet("sets", set_tables.sets_table(collection, problem))
    yield _sheet("values", cost_tables.values_table(collection, problem))


def _image_use(runs: Sequence[Run]) -> Iterator[Block]:
    table = set_tables.image_use_table(runs)
    if table is not None:
        yield Items(set_tables.image_use_sentences(runs))
        yield Sheet("images", table)


def _kinds(runs: Sequence[Run]) -> Iterator[Block]:
    tables = set_tables.kind_tables(runs)
    for name, table in tables.items():
        yield Sheet("kinds" if len(tables) == 1 else f"kinds_{_slug(name)}", table)


def _cost(
    collection: Collection, problem: Problem, claims: Sequence[Claim], timings: Timings
) -> Iterator[Block | None]:
    costs = [search_cost(collection, problem, claim.setting, timings.step_ms) for claim in claims]
    yield from map(cost_tables.search_sentence, costs)
    yield Sheet("size", cost_tables.cost_table(collection, problem))
    yield cost_tables.unmeasured(collection, timings) or Sheet(
        "time", cost_tables.timing_table(collection, problem, timings)
    )
    yield _sheet("generation", cost_tables.generation_table(collection, problem))
    for cost in costs:
        table = cost_tables.search_table(collection, cost)
        yield Sheet(f"search{_tag(cost.setting, claims)}", table)


def _exemplary(runs: Sequence[Run]) -> list[str]:
    """Return the settings whose load is shown: the adaptive ones, and for contrast one of the grid.

    It is the most accurate one whose tokens choose among experts, if there is one.
    """
    ranks: dict[str, tuple[bool, float]] = {}
    for setting, members in by_setting([run for run in runs if run.kind == "fixed"]).items():
        config = members[0].config
        accuracies = [run.outcome.accuracy for run in members]
        chooses = config.get("moe.top_k", 0) < config["moe.num_experts"]
        ranks[setting] = chooses, sum(accuracies) / len(accuracies)
    adaptive = dict.fromkeys(run.setting for run in runs if run.kind == "adaptive")
    return [*adaptive, *sorted(ranks, key=ranks.__getitem__)[-1:]]


def _title_of(problem: Problem, problems: Sequence[Problem]) -> str:
    """Return the data set, and what distinguishes it from other problems on the same data."""
    if sum(other.dataset == problem.dataset for other in problems) == 1:
        return problem.dataset
    return f"{problem.dataset}, protocol {problem.protocol}, {RULES[problem.selection]}"


def _sheet(name: str, table: Table | None) -> Sheet | None:
    return None if table is None else Sheet(name, table)


def _tag(setting: str, claims: Sequence[Claim]) -> str:
    """Return what distinguishes the files of one of several claims."""
    return f"_{_slug(setting)}" if len(claims) > 1 else ""


def _slug(text: str) -> str:
    """Return a part of file names: a setting's name may be longer than a file's may be."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(slug) <= LONGEST:
        return slug
    return f"{slug[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

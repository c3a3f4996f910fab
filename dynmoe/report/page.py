"""The report of a collection of runs: its sentences, tables and figures, in their order.

The claim comes first, then its cost, then figures of what happened, then what all of it rests on:
how the runs were made, and which are missing.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from dynmoe.report import (
    claim_figures,
    claim_tables,
    cost_tables,
    document,
    frontier,
    mixing,
    routing_figures,
    set_tables,
)
from dynmoe.report.claim import Claim, examine
from dynmoe.report.costs import Timings, generation_rows, read_timings, search_cost
from dynmoe.report.document import Block, Code, Document, Items, Picture, Section, Sheet
from dynmoe.report.run import Problem, Run, by_setting, conditions, every, seeds
from dynmoe.report.runs import Collection
from dynmoe.report.setting_names import start_name
from dynmoe.report.tables import Strong, Table, format_mean
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
        Sheet(f"{prefix}runs", every_run(collection, problem))
        for problem, prefix in prefixes.items()
    ]
    rest = [
        how_it_was_made(collection, timings.values()),
        what_is_missing(collection),
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
    kinds = set_tables.kind_tables(runs)
    parts: list[tuple[str, str, Iterable[Block | None]]] = [
        (
            "routers",
            "Routers at the experts they activate",
            [
                claim_figures.draw_accuracy_by_experts(runs, timings),
                _sheet("routers", cost_tables.router_table(runs)),
                routing_figures.draw_budget(runs),
            ],
        ),
        ("claim", "The claim", _claim(collection, problem, claims)),
        ("images", "Whether the images are used", _image_use(runs)),
        (
            "kinds",
            "Scores by kind of question",
            [
                Sheet("kinds" if len(kinds) == 1 else f"kinds_{_slug(name)}", table)
                for name, table in kinds.items()
            ],
        ),
        ("cost", "Cost", _cost(collection, problem, claims, timings)),
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
            "Load of the experts",
            [
                routing_figures.draw_load_by_part(examples),
                routing_figures.draw_load_by_environment(examples),
                routing_figures.draw_load_by_class(examples),
                routing_figures.draw_overlap([run for each in shown for run in each]),
            ],
        ),
        ("curves", "Training", [claim_figures.draw_curves(runs), mixing.draw_mixing(runs)]),
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


def _cost(
    collection: Collection, problem: Problem, claims: Sequence[Claim], timings: Timings
) -> Iterator[Block | None]:
    costs = [search_cost(collection, problem, claim.setting, timings.step_ms) for claim in claims]
    yield from map(cost_tables.search_sentence, costs)
    yield _sheet("frontier", frontier.frontier_table(collection, problem))
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
        results = [run.scale.better * run.outcome.accuracy for run in members]
        chooses = config.get("moe.top_k", 0) < config["moe.num_experts"]
        ranks[setting] = chooses, sum(results) / len(results)
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


# Provenance: conditions and commands of the runs, and which runs are missing.

ABSENT = "-"
"""Cell of a condition that does not apply to a problem; a row of such cells is left out."""

CellText = Callable[[Sequence[Run]], str]


def how_it_was_made(collection: Collection, timings: Iterable[Timings]) -> Section:
    """Return the conditions of every problem's runs in a table, and the commands."""
    problems = collection.problems
    columns = [collection.of(problem) for problem in problems]
    rows = [(name, *map(text, columns)) for name, text in CONDITIONS.items()]
    table = Table(
        "Conditions of the runs",
        ("condition", *(problem.dataset for problem in problems)),
        tuple(row for row in rows if set(row[1:]) != {ABSENT}),
        note="Where runs differ, all values are named.",
        in_words=True,
    )
    commands = "\n".join(_commands(collection, timings))
    return Section("made", "How it was made", [Sheet("conditions", table), Code(commands)])


def what_is_missing(collection: Collection) -> Section:
    """Name runs without a result, and warnings of the reader; without blocks if there are none."""
    blocks: list[Block] = []
    if collection.absent:
        table = Table(
            "Runs without a result",
            ("run", "state", "job", "failed with"),
            tuple(
                (entry.name, entry.state, entry.overrides or "-", entry.why or "-")
                for entry in collection.absent
            ),
            note="Nothing above counts them. The sweep's command, started again, runs those that "
            "have not finished; diverged or short ones are finished, and need other settings and "
            "overwrite=true.",
            in_words=True,
        )
        blocks.append(Sheet("absent", table))
    if collection.warnings:
        blocks += ["Noticed while reading the records:", Items(collection.warnings)]
    return Section("missing", "Missing runs, warnings", blocks)


def every_run(collection: Collection, problem: Problem) -> Table:
    """Return the results of each run of a problem, so that all means can be computed again."""
    runs = collection.of(problem)
    words = runs[0].words
    step, note, more = "last step", "", []
    if problem.validates:
        step, note = "selected step", f"; validation: the {words.noun} that the rule selects by"
        unit = words.scale.name
        more = [f"validation, {unit}", f"{words.noun} at the last step, {unit}"]
    rows, scale = [], words.scale._replace(digits=max(2, words.scale.digits))
    for run in runs:
        found = run.outcome
        numbers = (found.accuracy, found.validation, found.last)[: 1 + len(more)]
        cells = (format_mean([number], scale) for number in numbers)
        rows.append(
            (run.setting, run.environment, *map(str, (*run.repetition, found.step)), *cells)
        )
    return Table(
        f"Every run on {problem.dataset}",
        ("setting", words.place, "seed", "trial seed", step, words.column, *more),
        tuple(rows),
        note=f"{capital(words.measure)}{words.split}{note}.",
        conditions=conditions(runs),
    )


def _each(value: Callable[[Run], object]) -> CellText:
    """All values that differ between runs."""
    return lambda runs: every(map(value, runs))


def _fact(key: str, missing: str | None = None) -> CellText:
    return _each(lambda run: missing if run.facts.get(key) is None else run.facts[key])


def _config(key: str) -> CellText:
    return _each(lambda run: run.config.get(key))


def _sizes(run: Run) -> str:
    """`2490 train, 277 dev`: training examples, and those that select or are reported."""
    facts, sizes = run.facts, run.facts["sizes"]
    names = ["train", *facts["selects"]["sets"], *facts["reported"]["sets"]]
    found = {name: sizes[name] for name in names if sizes.get(name)}
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "unknown"


def _batch(run: Run) -> str:
    """In DomainBed each training environment has a batch in every step."""
    size, samples = run.facts["batch_size"], run.facts["samples_per_step"]
    return str(size) if samples == size else f"{size} x {samples // size}"


CONDITIONS: dict[str, CellText] = {
    "measure": _each(lambda run: run.words.measure),
    "reported on": _each(lambda run: ", ".join(run.facts["reported"]["sets"])),
    "examples": _each(_sizes),
    "tokens of an example, mean": _each(
        lambda run: (
            format(run.facts["mean_tokens"], ".1f") if "mean_tokens" in run.facts else ABSENT
        )
    ),
    "patience, in evaluations": _fact("patience", ABSENT),
    "stage": _fact("stage", ABSENT),
    "started from": _each(
        lambda run: f"{start}, of the same seed" if (start := start_name(run.config)) else ABSENT
    ),
    "protocol": _fact("protocol"),
    "selection rule": _each(lambda run: RULES[run.facts["selection"]]),
    "repetitions": lambda runs: seeds({run.repetition for run in runs}),
    "steps": _fact("steps"),
    "batch size": _each(_batch),
    "learning rate": _config("task.optimizer.lr"),
    "weight decay": _config("task.optimizer.weight_decay"),
    "backbone": _fact("backbone"),
    "weights": _fact("weights"),
    "data hash": lambda runs: every(sorted({run.facts["data_hash"] for run in runs})),
    "versions": _fact("versions"),
    "machine": _fact("machine"),
    "device, threads": _each(lambda run: f"{run.facts['device']}, {run.facts['threads']}"),
    "runtime": _fact("runtime"),
}


def _commands(collection: Collection, timings: Iterable[Timings]) -> Iterator[str]:
    """Yield the commands of the runs, of their timing and of this report, as far as recorded."""
    found: dict[str, None] = {}
    by_folder: dict[Path, list[Run]] = {}
    for run in collection.runs:
        by_folder.setdefault(run.folder.path.parent, []).append(run)
    for folder, runs in by_folder.items():
        found |= dict.fromkeys(collection.commands.get(folder) or _training(runs))
    yield from found
    yield from dict.fromkeys(command for each in timings for command in each.commands)
    answered = [generation_rows(folder).command for folder in collection.folders]
    yield from dict.fromkeys(command for command in answered if command)
    yield shlex.join(["dynmoe-report", *map(str, collection.folders)])


def _training(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the sweep's command, or that of the first run of each setting."""
    jobs = {}
    for run in runs:
        jobs[run.folder.path] = _words(run.folder.path / ".hydra" / "overrides.yaml")
    shared = [
        text for text in next(iter(jobs.values())) if all(text in job for job in jobs.values())
    ]
    if any(text.startswith("sweep=") for text in shared):
        yield shlex.join(["dynmoe-run", *shared])
        return
    seen = set()
    for run in runs:
        job = jobs[run.folder.path]
        if job and run.setting not in seen:
            seen.add(run.setting)
            yield shlex.join(["dynmoe-run", *job])


def _words(file: Path) -> list[str]:
    """The user's words of a run, as Hydra wrote them; none where its file is gone or damaged."""
    try:
        texts = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(texts, list):
        return []
    # dynmoe-run hands values to Hydra as `++key=value`.
    return [text.removeprefix("++") for text in texts if isinstance(text, str)]

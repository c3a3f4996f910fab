"""The claim as tables and sentences. The words follow from the numbers by rule alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from dynmoe.report.claim import (
    MEAN,
    Claim,
    Difference,
    Rival,
    columns,
    examine,
    expected,
    lacks,
    score_cells,
)
from dynmoe.report.cost_tables import taken
from dynmoe.report.paired import FEWEST, LEVEL
from dynmoe.report.run import (
    Problem,
    conditions,
    counted,
    environments,
    seeds,
    settings,
    short_name,
)
from dynmoe.report.runs import Collection
from dynmoe.report.tables import SHARE, Strong, Table, format_mean, format_points, format_result
from dynmoe.report.words import NOUNS, capital

# Rivals that sentences and tables name, in order.
RIVALS: dict[Rival, str] = {
    "mean": "mean of the grid",
    "best": "best of the grid",
    "worst": "worst of the grid",
    "pick": "grid's best by validation",
    "dense": "dense",
}
ERROR = "+/- is the standard error over repetitions (population form, ddof 0); one alone has none."
GRID = (
    "The grid is all settings with fixed experts and k. Its best and worst are chosen by the {} "
    "itself, which is optimistic for the best{}."
)
PICK = "; its best by validation is what one could have picked, in each repetition anew"
PAIRED = "Differences are paired: same {}, same repetition."
TESTED = (
    "The 95 % interval of their mean (in brackets) and p are of a paired t test, two-sided, not "
    f"corrected; by Holm: p corrected for {{}}. Bold: by Holm < {LEVEL}."
)


def headline(claim: Claim) -> str:
    """Return the conclusion of the paired tests on the mean over environments, one sentence."""
    whole, several = claim.overall, len(claim.comparisons) - 1
    place = f"{claim.words.place} {whole.environment}"
    place = f"mean of {several} test environments" if several else place
    where = f"{claim.setting} on {claim.problem.dataset}, {place}"
    if not whole.repetitions:
        return f"{where}: no repetition has a result of most settings, nothing can be compared."
    if not whole.against("mean"):
        return f"{where}: there is no grid of fixed settings to compare with."
    (mean,), (best,) = whole.against("mean"), whole.against("best")
    count = len(whole.repetitions)
    to_mean, to_best = (_difference(each) for each in (mean, best))
    if mean.why and best.why:
        apart = f"against the mean, {mean.why}; against the best, {best.why}"
        why = mean.why if mean.why == best.why else apart
        return (
            f"{where}: {to_mean} from the mean of the grid and {to_best} from its best; no "
            f"verdict: {why}."
        )
    if len(whole.against("grid")) == 1:
        only = f"{best.said} {best.setting}, the grid's only setting"
        return f"{where}, {only} ({to_best}; n = {count})."
    if best.why:
        known = f"{mean.said} the mean of the grid ({to_mean}; n = {count})"
        return f"{where}, {known}; no verdict against its best ({to_best}): {best.why}."
    if mean.why:
        known = f"{best.said} the best of the grid ({to_best}; n = {count})"
        return f"{where}, {known}; no verdict against its mean ({to_mean}): {mean.why}."
    link = f"and {best.said}"
    if (mean.verdict, best.verdict) == ("beats", "is below"):
        link = "but not"
    elif mean.verdict == best.verdict:
        link = "nor from" if mean.verdict == "is not significantly different from" else "and"
    return (
        f"{where}, {mean.said} the mean of the grid ({to_mean}) {link} its best "
        f"({to_best}; n = {count})."
    )


def _difference(difference: Difference) -> str:
    return f"{format_points(difference.mean, difference.scale)} {difference.scale.steps}"


def sentences(claim: Claim) -> list[str]:
    """The headline, the accuracy and rank, each difference, and what weakens them."""
    whole, words = claim.overall, claim.words
    found = [headline(claim)]
    if whole.rank is not None:
        # `71.2 +/- 0.3 %`, or `65.2 +/- 0.3 (Matthews correlation, x 100)`
        plain = words.measure in NOUNS
        unit = words.scale.unit if plain else f" ({words.column})"
        found.append(
            f"{claim.setting} reaches {format_mean(whole.accuracies, words.scale)}{unit}: rank "
            f"{whole.rank} of {counted(len(whole.means), 'setting')} by mean {words.noun}."
        )
    # In a grid of one setting all its rivals are the same.
    shown = RIVALS if len(whole.against("grid")) > 1 else ("best", "dense")
    reasons = {each.why for each in whole.differences}
    said = reasons.pop() if len(reasons) == 1 else ""  # by the headline
    found += [_sentence(claim, each, said) for each in whole.differences if each.rival in shown]
    return [*found, *_caveats(claim)]


def statements(collection: Collection) -> list[str]:
    """Return the sentences on all claims of a collection, and what is missing to say more."""
    return [
        sentence
        for problem in collection.problems
        for each in (*map(sentences, examine(collection, problem)), lacking(collection, problem))
        for sentence in each
    ]


def lacking(collection: Collection, problem: Problem) -> list[str]:
    """Name each side of the comparison that has no finished run."""
    kinds = {run.kind for run in collection.of(problem)}
    missing = {
        "adaptive": "no finished run that adapts its experts, so there is no claim to check",
        "fixed": "no finished run with fixed experts, so there is no grid to compare with",
        "dense": "no finished dense run to compare with",
    }
    return [f"{problem.dataset}: {text}." for kind, text in missing.items() if kind not in kinds]


def claim_table(collection: Collection, claim: Claim) -> Table:
    """The adaptive setting and its rivals in every environment, with paired differences."""
    rows: list[tuple[str, ...]] = []
    scale = claim.words.scale
    for comparison in claim.comparisons:
        place, count = comparison.environment, str(len(comparison.repetitions))
        own = format_mean(comparison.accuracies, scale)
        rows.append((claim.setting, place, own, *[""] * 3, count))
        for each in comparison.differences:
            if each.rival in RIVALS:
                style = Strong if each.is_significant else str
                cells = map(style, (each.points, *each.p_cells))
                theirs = format_mean(each.accuracies, scale)
                rows.append((_rival(each), place, theirs, *cells, count))
    notes = [
        ERROR,
        PAIRED.format(claim.words.part),
        *([TESTED.format(tested)] if (tested := families(claim)) else []),
        *no_verdicts(claim),
        GRID.format(f"reported {claim.words.noun}", PICK if claim.problem.validates else ""),
        *(
            f"Incomplete in {', '.join(places)}: {', '.join(left_out)}."
            for left_out, places in _incomplete(claim).items()
        ),
    ]
    return Table(
        f"{claim.setting} against the grid on {claim.problem.dataset}",
        (
            *("setting", claim.words.place, claim.words.column),
            *(f"{claim.setting} minus it, {scale.steps}", "p", "by Holm", "n"),
        ),
        tuple(rows),
        note=" ".join(notes),
        conditions=conditions(collection.of(claim.problem)),
    )


def families(claim: Claim) -> str:
    """The comparisons that p values are corrected for: `5 comparisons in the mean of environments,
    20 comparisons in the single environments`. Empty where nothing could be tested."""
    single, whole = (
        max((d.family for d in each.differences), default=0)
        for each in (claim.comparisons[0], claim.overall)
    )
    by_place = {
        f" in the {claim.overall.environment}": whole,
        " in the single environments": single,
    }
    if len(claim.comparisons) == 1:
        by_place = {"": whole}
    return ", ".join(f"{counted(n, 'comparison')}{at}" for at, n in by_place.items() if n)


def _incomplete(claim: Claim) -> dict[tuple[str, ...], list[str]]:
    """Environments by what is left out there."""
    found: dict[tuple[str, ...], list[str]] = {}
    for each in claim.comparisons:
        if each.left_out:
            found.setdefault(each.left_out, []).append(each.environment)
    return found


def no_verdicts(claim: Claim) -> Iterator[str]:
    """Yield a sentence on each reason for which differences of the table have no verdict."""
    reasons: dict[str, list[str]] = {}
    for comparison in claim.comparisons:
        for each in comparison.differences:
            if each.why and each.rival in RIVALS:
                places = reasons.setdefault(each.why, [])
                places.append(f"{_rival(each)} in {comparison.environment}")
    count = sum(each.rival in RIVALS for c in claim.comparisons for each in c.differences)
    for why, places in reasons.items():
        where = "anything" if len(places) == count else ", ".join(places)
        yield f"No verdict against {where}: {why}."


def accuracy_table(collection: Collection, problem: Problem) -> Table:
    """Every setting in every environment, on all repetitions it has."""
    runs = collection.of(problem)
    words, values = runs[0].words, taken(collection, problem)
    scale = words.scale
    keys = [f"{', '.join(runs[0].searched)} taken"] if values else []
    absent = [entry for entry in collection.absent if entry.problem == problem]
    cells, places = score_cells(runs), columns(runs)
    repetitions = expected(runs, absent)
    settings_asked = [*settings(runs), *(entry.setting for entry in absent if entry.setting)]
    names = list(dict.fromkeys(settings_asked))

    def mean(name: str, place: str) -> float:
        found = [scale.better * score.accuracy for score in cells[name, place].values()]
        return sum(found) / len(found) if found else -math.inf

    best = {place: max(mean(name, place) for name in names) for place in places}

    def cell(name: str, place: str) -> str:
        found = cells[name, place]
        text = format_mean([found[repetition].accuracy for repetition in sorted(found)], scale)
        gaps = lacks(name, place, found, repetitions, absent)
        text = f"{text} ({gaps})" if gaps else text
        return Strong(text) if found and mean(name, place) == best[place] else text

    return Table(
        f"{capital(words.measure)} of every setting on {problem.dataset}, {scale.name}",
        ("setting", *(p if p == MEAN else f"{words.place} {p}" for p in places), *keys),
        tuple(
            (name, *(cell(name, place) for place in places), *[values.get(name, "X")] * len(keys))
            for name in names
        ),
        note=f"{ERROR} Bold: the {words.best} of a column.",
        conditions=conditions(runs),
    )


def _sentence(claim: Claim, difference: Difference, said: str) -> str:
    """The reason for no verdict is left out if it was `said`."""
    rival = _rival(difference)
    if difference.rival == "mean":
        rival = f"{rival} ({counted(len(claim.overall.against('grid')), 'setting')})"
    article = "" if difference.rival == "dense" else "the "
    scale = claim.words.scale
    rival = f"{article}{rival}, {format_mean(difference.accuracies, scale)}{scale.unit}"
    points = f"{difference.points} {scale.steps}"
    if difference.why:
        why = "" if difference.why == said else f"; no verdict: {difference.why}"
        return f"Against {rival}: {points}{why}."
    return f"It {difference.said} {rival}: {points}, {difference.p_words}."


def _caveats(claim: Claim) -> Iterator[str]:
    whole = claim.overall
    last, scale = whole.at_the_end, claim.words.scale
    if last is not None and claim.problem.validates:
        reached, of_grid = (format_result(x, scale) for x in (last.own, last.grid))
        grid = "" if math.isnan(last.grid) else f", the mean of the grid {of_grid}"
        yield (
            f"At the end of training instead of the selected steps: {claim.setting} "
            f"{reached}{grid}, rank {last.rank}."
        )
    if claim.problem.selection == "best_dev":
        yield (
            "Validation chooses by the very score that is reported, as in published tables: "
            "this is optimistic for every setting."
        )
    if claim.samples and claim.words.measure == "accuracy":
        sizes = "/".join(map(str, claim.samples))
        if len(claim.samples) > 1 and len(set(claim.samples)) == 1:
            sizes = f"{len(claim.samples)} x {claim.samples[0]}"
        own = sum(whole.accuracies) / len(whole.accuracies) if whole.accuracies else 0.5
        error = 100 * math.sqrt(own * (1 - own) / sum(claim.samples))
        yield (
            f"Tested on {sizes} samples: from that alone a run's accuracy has a standard error of "
            f"{error:.1f} points."
        )
    if len(set(claim.draws.values())) > 1:
        draws = ", ".join(f"{name} {count}" for name, count in claim.draws.items())
        yield f"The search was unequal; draws of hyper-parameters to choose from: {draws}."
    count = len(whole.repetitions)
    if FEWEST <= count < 10 and whole.differences:
        yield f"{counted(count, 'repetition')} can show large differences only."
    if whole.left_out:
        held = seeds(whole.repetitions) if count else "none"
        yield (
            f"The comparison is on the repetitions that most settings have ({held}), and of the "
            f"settings that have them all. Incomplete: {', '.join(whole.left_out)}."
        )


def _rival(difference: Difference) -> str:
    name = RIVALS[difference.rival]
    if difference.rival == "dense":
        return difference.setting
    return f"{name} ({difference.setting})" if difference.setting else name


# The head of a report: its title, its extent, the claims on all data.


def title_of(collection: Collection) -> str:
    # One name for all targets of a budget: with them the title of a frontier had seven lines.
    adaptive = dict.fromkeys(short_name(run) for run in collection.runs if run.kind == "adaptive")
    datasets = ", ".join(dict.fromkeys(problem.dataset for problem in collection.problems))
    if adaptive and any(run.kind == "fixed" for run in collection.runs):
        return f"{', '.join(adaptive)} against fixed experts and k: {datasets}"
    return f"{', '.join(settings(collection.runs))}: {datasets}"


def extent(collection: Collection) -> str:
    """Return the numbers of runs, settings, places and repetitions."""
    found = []
    for problem in collection.problems:
        runs = collection.of(problem)
        repetitions = {run.repetition for run in runs}
        found.append(
            f"{counted(len(runs), 'run')} on {problem.dataset}: "
            f"{counted(len(settings(runs)), 'setting')}, "
            f"{counted(len(environments(runs)), runs[0].words.place)}, "
            f"{counted(len(repetitions), 'repetition')}"
        )
    absent = f" {counted(len(collection.absent), 'run')} without a result."
    return f"{'; '.join(found)}.{absent if collection.absent else ''}"


def overview_table(claims: Mapping[Problem, Sequence[Claim]]) -> Table:
    """One row for each adaptive setting on each problem."""
    rows = []
    for problem, found in claims.items():
        for claim in found:
            mean, best = ([*claim.overall.against(rival), None][0] for rival in ("mean", "best"))
            scale = claim.words.scale
            cells = [
                format_mean(each.accuracies if each else (), scale)
                for each in (claim.overall, mean, best)
            ]
            verdicts = [_verdict(each) for each in (mean, best)]
            rows.append((problem.dataset, claim.setting, *cells, *verdicts))
    words = [claim.words for found in claims.values() for claim in found]
    columns = ("accuracy, %", "mean of the grid, %", "best of the grid, %")
    if any(each.noun != "accuracy" for each in words):
        columns = ("result", "mean of the grid", "best of the grid")
        if all(each.scale.factor == SHARE.factor for each in words):
            columns = ("score, x 100", *columns[1:])
    return Table(
        "The claim on every data set",
        ("data set", "setting", *columns, "against the mean", "against the best"),
        tuple(rows),
        note=f"Verdicts: paired t tests (p < {LEVEL}), corrected by Holm's method for the "
        "comparisons on each data set, not for the number of data sets. Protocol, selection rule, "
        "seeds, weights, data and versions are below the tables of each data set.",
    )


def _verdict(difference: Difference | None) -> str:
    if difference is None:
        return "nothing to compare with"
    return f"no verdict: {difference.why}" if difference.why else difference.said

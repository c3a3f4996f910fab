"""How fast the settings answer, as a table."""

from __future__ import annotations

from dynmoe.comparison.conditions import conditions, every
from dynmoe.comparison.cost_tables import number, spread
from dynmoe.comparison.generation import generation_rows
from dynmoe.comparison.run import Problem
from dynmoe.comparison.runs import Collection
from dynmoe.report.tables import Table


def generation_table(collection: Collection, problem: Problem) -> Table | None:
    """Every measured setting of a problem; None if none was measured.

    Raises:
        RecordError: a damaged `generation.json`.
    """
    runs = collection.of(problem)
    names = {run.folder.path.name: run.setting for run in runs}
    measured = [generation_rows(folder) for folder in collection.folders]
    own = [each for each in measured if any(row.run in names for row in each.rows)]
    rows = [row for each in own for row in each.rows if row.run in names]
    if not rows:
        return None
    note = (
        "Medians with quartiles, measured in turns. First token: the time to read a batch of "
        "questions and their images. Ratio: over the speed of the reference in the same rounds. "
        f"Measured on: {every(each.conditions for each in own)}."
    )
    if any(2 * row.contaminated > row.rounds for row in rows):
        note += " *: other processes were busy during more than half of the rounds."
    return Table(
        f"How fast every setting answers on {problem.dataset}",
        (
            *("setting", "first token, ms", "each further token, ms", "tokens/s"),
            f"over {every(row.reference for row in rows)}",
            "peak memory beyond weights, GiB",
        ),
        tuple(
            (
                names[row.run],
                spread(row.prompt_ms, row.prompt_quartiles_ms),
                number(row.token_ms),
                spread(row.tokens_per_s, row.tokens_per_s_quartiles)
                + "*" * (2 * row.contaminated > row.rounds),
                f"{spread(row.ratio, row.ratio_quartiles)} x",
                number(row.peak_bytes / 2**30),
            )
            for row in rows
        ),
        note=note,
        conditions=conditions(runs),
    )

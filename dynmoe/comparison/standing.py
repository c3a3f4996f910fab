"""Which runs stand for their repetitions, and are reported.

A search belongs to its method, whatever was searched over: of its runs those stand that validation
is best for.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from dynmoe.comparison.run import Run, order
from dynmoe.selection import best_of_sweep


def choose(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that stand for their repetitions, and the others.

    Of several draws of hyper-parameters the best by validation stands, as in DomainBed; of values
    that a protocol searches over, one for all repetitions of a setting.
    """
    runs = list(runs)
    trials: defaultdict[object, list[Run]] = defaultdict(list)
    for run in _with_best_values(sorted(runs, key=order)):
        trials[run.problem, run.setting, run.repetition].append(run)
    standing = [run for trial in trials.values() for run in _standing(trial)]
    paths = {run.folder.path for run in standing}
    return standing, [run for run in runs if run.folder.path not in paths]


def _with_best_values(runs: Iterable[Run]) -> Iterable[Run]:
    """Of each setting the runs with the searched values of the best mean validation.

    Values that lack repetitions which others have are not taken: their mean is of other runs.
    """
    searches: defaultdict[object, defaultdict[str, list[Run]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run in runs:
        searches[run.problem, run.setting][json.dumps(run.searched)].append(run)
    for by_values in searches.values():
        most = max(map(len, by_values.values()))
        complete = [members for members in by_values.values() if len(members) == most]
        yield from complete[0] if len(complete) == 1 else max(complete, key=_mean_validation)


def _mean_validation(runs: Iterable[Run]) -> float:
    mean = float(np.mean([run.outcome.validation for run in runs]))
    return -math.inf if math.isnan(mean) else mean


def _standing(trial: Sequence[Run]) -> Iterable[Run]:
    """For each test environment of one setting's repetition, the run that stands for it."""
    rule = trial[0].problem.selection
    draws: defaultdict[tuple[int, ...], list[Run]] = defaultdict(list)
    for run in trial:
        draws[tuple(run.facts["test_envs"])].append(run)
    for tests, candidates in draws.items():
        if len(tests) == 1:
            holding_out = (run.results for run in trial if tests[0] in run.facts["test_envs"])
            choice = best_of_sweep(chain.from_iterable(holding_out), rule, tests[0])
            if choice is None:  # leave-one-domain-out without its pairs: the last step is shown
                yield candidates[0]
                continue
            draw = choice.record["args"]["hparams_seed"]
            (best,) = (run for run in candidates if run.facts["hparams_seed"] == draw)
            yield replace(best, chosen=dict(choice.record))
        elif rule != "leave_one_domain_out":
            yield max(candidates, key=lambda run: run.outcome.validation)

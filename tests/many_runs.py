"""A sweep of many synthetic runs, to measure a report: `python tests/many_runs.py FOLDER 5000`.

Runs are as long as real ones on digits: 21 evaluations, two MoE layers, four sources, and the
configuration that a run of the demo has. `--settings N` spreads them over N settings by their
learning rate; without it there are ten settings and as many seeds as it takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sweeps

from dynmoe.config.compose import Composer, parse, search_path
from dynmoe.config.runs import flat

GRID = [f"top-{k} of {n}" for n in (2, 4, 8) for k in (1, 2, 4) if k <= n]
SETTINGS = ["dense", *GRID, "DynMoE"]
STEPS = tuple(range(0, 1001, 50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=int)
    parser.add_argument("--settings", type=int, default=len(SETTINGS))
    args = parser.parse_args()
    with search_path():
        overrides, _ = parse(["task=vit_domainbed"])
        config = flat(Composer(overrides, None).compose(overrides).cfg)
    own = ("data.test_envs", "moe.", "seed", "trial_seed", "hparams_seed")
    common = {key: value for key, value in config.items() if not key.startswith(own)}
    sweeps.STEPS, sweeps.SELECTED = STEPS, STEPS[-2]
    for number in range(args.runs):
        number, environment = divmod(number, len(sweeps.ENVIRONMENTS))
        seed, setting = divmod(number, args.settings)
        rate, kind = divmod(setting, len(SETTINGS))
        accuracy = 0.5 + 0.01 * kind + 0.003 * (number * 7 % 11)
        facts = {"task.optimizer.lr": 0.001 + 0.0001 * rate}
        sweeps.write_run(
            args.folder,
            SETTINGS[kind],
            accuracy,
            sweeps.ENVIRONMENTS[environment],
            seed,
            config={**common, **facts, "task.steps": STEPS[-1] + 1},
            facts={"steps": STEPS[-1] + 1},
            name=f"run{number}_env{environment}_seed{seed}",
        )


if __name__ == "__main__":
    main()

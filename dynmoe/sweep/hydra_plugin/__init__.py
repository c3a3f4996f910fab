"""Hydra's sweeper for our sweeps. Hydra takes plugins only from the package hydra_plugins, where
pyproject.toml puts this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dynmoe.config.identity import flat, run_name
from dynmoe.config.jobs import job_axes, jobs
from dynmoe.errors import ConfigError
from dynmoe.report.records import RunFolder
from dynmoe.sweep import manifest, plan
from dynmoe.sweep.jobs import Job, labels

# States in which a job is left alone.
LEFT_ALONE = ("done", "running")


class DynMoESweeper(Sweeper):
    """Settings x parameters, on whatever launcher was chosen.

    A job that is done, or that another process is running, is not started. A failed or stopped one
    is started again and goes on from its last evaluation. `mode=plan` starts none.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        settings: Sequence[dict[str, str]] = (),
    ) -> None:
        self.max_batch_size = max_batch_size
        self.params = params
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch what is to do, and end with a line for each job that has no result.

        Raises:
            SystemExit: with 2, the folder holds a sweep of another configuration; with 1, some jobs
                failed.
        """
        assert self.config is not None
        sweep = self.config.hydra.runtime.choices.get("sweep")
        folder = Path(self.config.hydra.sweep.dir)
        base, found = self._jobs(arguments, folder)
        if sweep:
            try:
                manifest.check(folder, sweep, base, found)
            except ConfigError as error:  # which Hydra would show with a traceback
                print(f"dynmoe-run: {error}", file=sys.stderr)
                raise SystemExit(2) from None
        mode = self.config.get("mode")
        if mode == "plan":
            Console().print(plan.render(found, self._parallel()))
            return []
        todo = found
        if mode == "train" and not self.config.get("overwrite"):
            todo = [job for job in found if job.state not in LEFT_ALONE]
        if mode == "train":
            kept = len(found) - len(todo)
            print(f"{len(found)} jobs in {folder}: {kept} done or running, {len(todo)} to do")
            folder.mkdir(parents=True, exist_ok=True)
            if sweep:
                manifest.write(folder, sweep, base, found)
        returns = []
        size = self.max_batch_size or max(1, len(todo))
        for start in range(0, len(todo), size):
            batch = [list(job.overrides) for job in todo[start : start + size]]
            returns.append(self.launcher.launch(batch, initial_job_idx=start))
        if mode == "train":
            _tell(folder, found)
        return returns

    def _jobs(self, arguments: list[str], folder: Path) -> tuple[dict[str, Any], list[Job]]:
        """The configuration without what is swept, and all jobs."""
        assert self.config is not None and self.hydra_context is not None
        config, loader = self.config, self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        given = parser.parse_overrides(arguments)
        node = OmegaConf.create({"params": self.params, "settings": list(self.settings)})
        overrides = [tuple(job) for job in jobs(job_axes(parser, node, given))]

        def load(texts: Sequence[str]) -> DictConfig:
            return loader.load_sweep_config(config, list(texts))

        shared = [str(o.input_line) for o in given if not o.is_sweep_override()]
        made = []
        for texts, label in zip(overrides, labels(overrides), strict=True):
            cfg = load(texts)
            made.append(Job(texts, label, RunFolder(folder / run_name(cfg)), flat(cfg)))
        return flat(load(shared)), list({job.name: job for job in made}.values())

    def _parallel(self) -> int:
        """Jobs at once, where the launcher says it."""
        assert self.config is not None
        launcher = self.config.hydra.launcher
        jobs_at_once = int(launcher.get("n_jobs") or launcher.get("array_parallelism") or 1)
        return jobs_at_once if jobs_at_once > 0 else os.cpu_count() or 1


def _tell(folder: Path, jobs: Sequence[Job]) -> None:
    """Say what came of the jobs.

    Raises:
        SystemExit: with 1, if some have no result and nobody is working on it.
    """
    rest = [job for job in jobs if job.state != "done"]
    for job in rest:
        why = f": {job.folder.failure}" if job.state == "failed" else ""
        print(f"{job.state}: {job.label}{why}\n  {job.folder.path}", file=sys.stderr)
    print(f"{len(jobs) - len(rest)} of {len(jobs)} jobs are done. Next: dynmoe-report {folder}")
    if any(job.state != "running" for job in rest):
        print("The same command runs again what is not done.", file=sys.stderr)
        raise SystemExit(1)

"""Hydra's sweeper for our sweeps. Hydra takes plugins only from the package hydra_plugins, where
pyproject.toml puts this one."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from dynmoe.config.check import report
from dynmoe.config.compose import Composer, MissingGroup, checked, parser
from dynmoe.config.models import causal_model
from dynmoe.config.runs import flat, run_name
from dynmoe.config.sweeps import read_sweep
from dynmoe.errors import ConfigError, UserError
from dynmoe.records import Held, State
from dynmoe.sweep import manifest
from dynmoe.sweep.manifest import Job

# Hydra runs the modules of hydra_plugins once more when it looks for plugins, those with _ not.
from ._launchers import LocalLauncher, RayLauncher, SlurmLauncher

KILLED = (
    "its process was killed, and once more when it ran alone: for want of memory? The same command "
    "goes on from the last evaluation"
)
ENDS = 10.0  # seconds in which a process that was killed is gone

LAUNCHERS = (LocalLauncher, RayLauncher, SlurmLauncher)


class DynMoESweeper(Sweeper):
    """Settings x parameters, on any launcher.

    A job that is done, or that another process is running, is not started. A failed or stopped one
    is started again and goes on from its last evaluation. `mode=plan` starts none.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        target_k: float | None = None,  # which settings refer to
        params: dict[str, str] | None = None,
        settings: Sequence[dict[str, str]] = (),
        unless_causal: Sequence[dict[str, str]] = (),
    ) -> None:
        self.max_batch_size = max_batch_size
        lists = {"settings": list(settings), "unless_causal": list(unless_causal)}
        self.node = OmegaConf.create({"params": params, **lists})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the unfinished jobs, and end with a line for each job that has no result.

        Raises:
            SystemExit: with 2 for an error of the user, 1 if some jobs failed.
        """
        try:
            return self._sweep(arguments)
        except (UserError, OSError) as error:  # which Hydra would show with a traceback
            print(f"dynmoe-run: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    def _sweep(self, arguments: list[str]) -> list[JobReturn]:
        from rich.console import Console

        assert self.config is not None
        sweep, mode = self.config.hydra.runtime.choices.get("sweep"), self.config.get("mode")
        folder = Path(self.config.hydra.sweep.dir)
        with Console(stderr=True).status("composing the jobs"):
            base, jobs = self._jobs(arguments, folder)
        if mode != "train":
            if sweep:
                manifest.check(folder, sweep, base, jobs)
            if mode == "plan":
                print(manifest.render(jobs, self._parallel()))
                return []
            returns = self._launch(jobs)
            if any(each.status is JobStatus.FAILED for each in returns):
                raise SystemExit(1)
            return returns
        with manifest.locked(folder):
            if sweep:
                manifest.check(folder, sweep, base, jobs)
                # dynmoe-run handed the user's values to Hydra in the form `++key=value`.
                command = ["dynmoe-run", *(text.removeprefix("++") for text in sys.argv[1:])]
                manifest.record(folder, sweep, shlex.join(command), base, jobs)
        again = self.config.get("overwrite")
        # Jobs of Slurm that run are waited for; those of another launcher are left to it.
        waiting = self.launcher.look() if isinstance(self.launcher, SlurmLauncher) else {}
        todo = [
            job
            for job in jobs
            if again
            or job.state not in ("done", "running")
            or (job.name in waiting and not job.folder.is_done)
        ]
        counts = f"{len(jobs) - len(todo)} done or running, {len(todo)} to do"
        print(f"{len(jobs)} job{'s' * (len(jobs) != 1)} in {folder}: {counts}")
        for job in todo:
            print(f"  {job.name}: {job.label}")
        returns = self._launch(todo)
        _print_outcome(folder, jobs)
        return returns

    def _jobs(self, arguments: list[str], folder: Path) -> tuple[dict[str, Any], list[Job]]:
        """The configuration without the swept keys, and all jobs.

        Raises:
            ConfigError: with the problems of every job.
        """
        assert self.config is not None
        hydra = self.config.hydra
        reader = parser()
        sweep = read_sweep(reader, self.node, reader.parse_overrides(arguments))
        parsed = cache(lambda text: reader.parse_override(text))
        always = [parsed(text) for text in hydra.overrides.hydra]
        composer = checked() or Composer(always, config_name=hydra.job.config_name)
        found: list[str] = []
        jobs: dict[str, Job] = {}
        for asked in sweep.jobs:
            with composer.shared.job([*always, *map(parsed, asked.overrides)]) as made:
                if asked.unless_causal and any(causal_model(made.cfg)):
                    continue
                wrong = made.problems(multirun=True)
                found += [f"{asked.label}: {text}" for text in wrong]
                if not wrong:
                    job = Job.of(made.cfg, folder / run_name(made.cfg), asked)
                    jobs.setdefault(job.name, job)
        if found:
            raise ConfigError(report(found))
        try:
            base = flat(composer.compose([*always, *map(parsed, sweep.base)]).cfg)
        except MissingGroup:  # of a sweep over tasks: each job's configuration is kept as well
            base = {}
        return base, list(jobs.values())

    def _launch(self, jobs: Sequence[Job]) -> list[JobReturn]:
        """Launch the jobs. A launcher that loses a process ends the jobs of all its processes:
        they begin again, one by one, and only one that loses its own process again is failed."""
        if isinstance(self.launcher, SlurmLauncher):
            self.launcher.names = {job.overrides: job.name for job in jobs}
        returns: list[JobReturn] = []
        size = self.max_batch_size or max(1, len(jobs))
        for start in range(0, len(jobs), size):
            rest, begun, before = list(jobs[start : start + size]), list[Job](), 0
            while len(rest) != before:
                before = len(rest)
                rest, stopped = self._launch_once(rest, start, returns)
                begun += stopped
            for job in begun:
                _, stopped = self._launch_once([job], start, returns)
                if stopped:
                    with suppress(Held), job.folder.hold():
                        job.folder.mark_failed(KILLED)
        return returns

    def _launch_once(
        self, jobs: Sequence[Job], start: int, returns: list[JobReturn]
    ) -> tuple[list[Job], list[Job]]:
        """The jobs that never began and those that began, where the launcher stopped; else none."""
        if not jobs:
            return [], []
        starts = [_started_at(job) for job in jobs]
        try:
            overrides = [list(job.overrides) for job in jobs]
            returns += self.launcher.launch(overrides, initial_job_idx=start)
            return [], []
        except UserError:
            raise
        except Exception as error:  # a process of the launcher was killed
            print(f"dynmoe-run: the launcher stopped: {error}", file=sys.stderr)
        rest, begun = list[Job](), list[Job]()
        for job, before in zip(jobs, starts, strict=True):
            if _state_at_rest(job) in ("missing", "stopped"):
                (rest if _started_at(job) == before else begun).append(job)
        return rest, begun

    def _parallel(self) -> int:
        """Jobs at once, where the launcher says it."""
        assert self.config is not None
        launcher = self.config.hydra.launcher
        jobs_at_once = int(launcher.get("n_jobs") or launcher.get("array_parallelism") or 1)
        return jobs_at_once if jobs_at_once > 0 else os.cpu_count() or 1


def _started_at(job: Job) -> int | None:
    """When Hydra started the job last, which writes its files then."""
    file = job.folder.path / ".hydra" / "overrides.yaml"
    return file.stat().st_mtime_ns if file.exists() else None


def _state_at_rest(job: Job) -> State:
    """The state of a job whose process is being ended."""
    deadline = time.monotonic() + ENDS
    while (state := job.state) == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    return state


def _print_outcome(folder: Path, jobs: Sequence[Job]) -> None:
    """Print the outcome of the jobs.

    Raises:
        SystemExit: with 1, if some have no result and nobody is working on it.
    """
    states = {job.name: job.state for job in jobs}
    rest = [job for job in jobs if states[job.name] != "done"]
    for job in rest:
        why = f": {job.folder.failure}" if states[job.name] == "failed" else ""
        print(f"{states[job.name]}: {job.label}{why}\n  {job.folder.path}", file=sys.stderr)
    print(f"{len(jobs) - len(rest)} of {len(jobs)} jobs are done. Next: dynmoe-report {folder}")
    if any(states[job.name] != "running" for job in rest):
        print("The same command runs the unfinished jobs again.", file=sys.stderr)
        raise SystemExit(1)

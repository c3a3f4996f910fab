"""Hydra's launchers for other machines: thin layers over submitit and Ray, which are extras.

A launcher gets the overrides of jobs and returns how each ended. The jobs themselves end with a
record in their folders, and that is what the sweeper reads.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from dynmoe import process
from dynmoe.errors import UserError
from dynmoe.records import Held, RunFolder
from dynmoe.sweep import slurm
from dynmoe.sweep.manifest import locked

LOOK = 0.5  # seconds between two looks at the files of results
SOON, SELDOM = 2.0, 30.0  # seconds between two questions to Slurm, at first and later

SURE, GRACE = 3, 60.0
"""Questions in a row, and seconds since the first of them, after which a job that is not in the
queue counts as gone: one that is requeued may be out of it for a moment, and NFS may show a new
file, its result, up to a minute late (acregmax, acdirmax)."""

# What AutoExecutor of submitit calls the same on every cluster; other options have a prefix.
COMMON = (
    *("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node"),
    *("tasks_per_node", "stderr_to_stdout"),
)


class TimeIsOver(UserError):
    """The last time limit of a job; what it has recorded stays."""


@dataclass
class Work:
    """One job, as it is sent to another process."""

    context: HydraContext
    function: TaskFunction
    config: DictConfig
    overrides: list[str]
    number: int
    state: Any  # of Hydra's singletons

    def __call__(self) -> JobReturn:
        Singleton.set_state(self.state)
        setup_globals()
        config = self.context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = str(self.number), self.number
        return run_job(
            hydra_context=self.context,
            task_function=self.function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


class SubmittedWork(Work):
    """A job that submitit puts back into the queue when its time is over."""

    def __call__(self) -> JobReturn:
        _say_time_is_over()
        return super().__call__()

    def checkpoint(self) -> Any:
        """The job that goes into the queue in the place of this one."""
        from submitit.helpers import DelayedSubmission

        # The first start has removed what was there; the next one goes on from its checkpoint.
        return DelayedSubmission(replace(self, overrides=[*self.overrides, "++overwrite=false"]))


def _say_time_is_over() -> None:
    """submitit's handler raises an error where a job may not go back into the queue: say it in
    words, which are the user's to read in failed.txt."""
    from submitit import JobEnvironment
    from submitit.core.utils import UncompletedJobError

    signum = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
    theirs: Any = signal.getsignal(signum)

    def handler(number: int, frame: Any) -> None:
        try:
            theirs(number, frame)
        except UncompletedJobError:
            raise TimeIsOver(
                "its time was over (hydra.launcher.timeout_min) once more than "
                "hydra.launcher.max_num_timeout allows. The same command goes on from the last "
                "evaluation; task.save_every=STEPS saves between evaluations"
            ) from None

    signal.signal(signum, handler)


def _failed(message: str) -> JobReturn:
    done = JobReturn(status=JobStatus.FAILED)
    done.return_value = RuntimeError(message)
    return done


def _read_result(file: Path) -> JobReturn:
    """The result that submitit has kept of a job."""
    outcome, result = pickle.loads(file.read_bytes())
    if outcome == "success":
        return result
    return _failed(str(result).strip().rpartition("\n")[2])  # the last line of a traceback


class WorkLauncher(Launcher):
    """A launcher that makes `Work` of its jobs."""

    def __init__(self, **params: Any) -> None:
        plain = OmegaConf.to_container(OmegaConf.create(params), resolve=True)
        assert isinstance(plain, dict)
        self.params: dict[str, Any] = {str(key): value for key, value in plain.items()}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config: DictConfig = config
        self.hydra_context = hydra_context
        self.function = task_function

    def work(
        self, kind: type[Work], job_overrides: Sequence[Sequence[str]], first: int
    ) -> list[Work]:
        shared = (self.hydra_context, self.function, self.config)
        state = Singleton.get_state()
        return [
            kind(*shared, list(overrides), first + number, state)
            for number, overrides in enumerate(job_overrides)
        ]


class LocalLauncher(WorkLauncher):
    """submitit on this machine: all jobs at once, each in processes of its own."""

    cluster = "local"

    def executor(self, **changed: Any) -> Any:
        """An executor of submitit with the options of this launcher, `changed` over them.

        Raises:
            UserError: an option that submitit does not know.
        """
        from submitit import AutoExecutor

        options = {k: v for k, v in (self.params | changed).items() if v is not None}
        folder, again = options.pop("submitit_folder"), options.pop("max_num_timeout")
        named = {k if k in COMMON else f"{self.cluster}_{k}": v for k, v in options.items()}
        executor = AutoExecutor(folder, self.cluster, **{f"{self.cluster}_max_num_timeout": again})
        try:
            executor.update_parameters(**named)
        except (NameError, ValueError, TypeError) as error:
            raise UserError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
        return executor

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        work = self.work(SubmittedWork, job_overrides, initial_job_idx)
        jobs = self.executor().submit_array(work)
        try:
            while not all(job.done() for job in jobs):
                sleep(LOOK)
        except KeyboardInterrupt:
            for job in jobs:
                job.cancel()
            raise
        return [
            _read_result(file)
            if (file := job.paths.result_pickle).exists()
            else _failed(f"ended without a result, see {job.paths.stderr}")
            for job in jobs
        ]


class SlurmLauncher(LocalLauncher):
    """Slurm's queue: a job that is in it is not submitted again, but waited for."""

    cluster = "slurm"
    names: Mapping[tuple[str, ...], str] = {}
    """Names of runs by their overrides, as far as the sweeper knows them: to compose them again
    takes a twentieth of a second each."""
    _is_away = False  # it does not answer
    _seen: Mapping[str, str] = {}

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    @property
    def batches(self) -> slurm.Batches:
        return slurm.Batches(self.folder / ".submitit")

    def waiting(self) -> dict[str, str]:
        """The ids of the jobs that are in the queue, by the names of their runs; Slurm takes a
        moment to see that one has ended."""
        found = self.batches.waiting(slurm.states())
        return {
            name: job for name, job in found.items() if not self._paths(job).result_pickle.exists()
        }

    def look(self) -> Mapping[str, str]:
        """`waiting()`, by which the jobs to launch are chosen: of these `launch` submits none again
        that ends in between, but reads how it ended."""
        self._seen = self.waiting()
        return self._seen

    def _paths(self, job: str) -> Any:
        """The files of a job, by submitit's names for them."""
        from submitit.core.utils import JobPaths

        return JobPaths(self.params["submitit_folder"], job, 0)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        names = [self._name(overrides) for overrides in job_overrides]
        work = self.work(SubmittedWork, job_overrides, initial_job_idx)
        ids: dict[str, str] = {}
        try:
            with locked(self.folder):
                there = {**self._seen, **self.waiting()}
                self._seen = {n: job for n, job in self._seen.items() if n not in names}
                ids |= {name: there[name] for name in names if name in there}
                if ids:
                    print(f"in the queue of Slurm already, waited for: {_listed(ids.values())}")
                    if self.config.get("overwrite"):
                        print(
                            "overwrite=true begins none of these again; for that end them first: "
                            f"scancel {_listed(ids.values())}"
                        )
                new = {n: each for n, each in zip(names, work, strict=True) if n not in ids}
                self._submit(new, ids)
            found = self._wait(ids)
        except KeyboardInterrupt:
            self._say_what_stays(ids)
            raise
        return [found[name] for name in names]

    def _name(self, overrides: Sequence[str]) -> str:
        """The folder of a job; a check of its data is another job than its training."""
        if (known := self.names.get(tuple(overrides))) is not None:
            mode = self.config.get("mode")
            return known if mode == "train" else f"{mode}:{known}"
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        name, mode = str(config.hydra.sweep.subdir), config.get("mode")
        return name if mode == "train" else f"{mode}:{name}"

    def _submit(self, work: Mapping[str, Work], ids: dict[str, str]) -> None:
        """Submit the jobs, those of an array together, and add their ids.

        Raises:
            UserError: sbatch refuses them.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        names = list(work)
        for start in range(0, len(names), slurm.LONGEST):
            runs = names[start : start + slurm.LONGEST]
            token = self.batches.new(runs)
            tasks = self.params["tasks_per_node"] or self.config.trainer.devices
            executor = self.executor(
                name=f"{self.params['name']}-{token}", tasks_per_node=int(tasks)
            )
            try:
                with _signals_later():  # sbatch, and the files that the jobs read first
                    jobs = executor.submit_array([work[name] for name in runs])
            except (FailedJobError, FailedSubmissionError) as error:
                said = [line for line in str(error).splitlines() if "sbatch: " in line]
                raise UserError("; ".join(said) or str(error)) from None
            ids |= {name: job.job_id for name, job in zip(runs, jobs, strict=True)}
            print(f"submitted to Slurm: {_listed(job.job_id for job in jobs)}")

    def _wait(self, ids: dict[str, str]) -> dict[str, JobReturn]:
        """Wait until no job is left in `ids`; how each ended."""
        found: dict[str, JobReturn] = {}
        results = {name: self._paths(job).result_pickle for name, job in ids.items()}
        absent = {name: [0, 0.0] for name in ids}  # questions in a row, the time of the first
        pause, asked = SOON, monotonic()
        while ids:
            for name in [name for name in ids if results[name].exists()]:
                found[name] = _read_result(results[name])
                del ids[name]
            if monotonic() - asked >= pause:
                states = self._states(ids)
                pause, asked = min(SELDOM, 1.5 * pause), monotonic()
                for name, state in states.items():
                    count, since = absent[name]
                    if slurm.in_queue(state):
                        absent[name] = [0, 0.0]
                        continue
                    absent[name] = [count + 1, since if count else asked]
                    pause = SOON
                    if count + 1 >= SURE and asked - absent[name][1] >= GRACE:
                        found[name] = self._gone(name, ids.pop(name), state)
            sleep(LOOK)
        return found

    def _states(self, ids: Mapping[str, str]) -> dict[str, str | None]:
        """The states of jobs, None of one that is gone; empty while Slurm does not answer."""
        try:
            states = slurm.states()
        except UserError as error:
            if not self._is_away:
                print(f"dynmoe-run: {error}. Waiting for it", file=sys.stderr)
            self._is_away = True
            return {}
        self._is_away = False
        return {name: states.get(job, (None,))[0] for name, job in ids.items()}

    def _gone(self, name: str, number: str, state: str | None) -> JobReturn:
        """A job that has left the queue without a result: its folder says why, if Slurm does."""
        run = RunFolder(self.folder / name)
        if run.is_done:
            return JobReturn(status=JobStatus.COMPLETED)
        paths = self._paths(number)
        if state:
            why = f"{state}: {slurm.ENDED[state]}"
        elif paths.stdout.exists():
            why = "it was cancelled, or its process was killed"
        else:  # Slurm forgets an element of an array at once
            why = "CANCELLED: it was cancelled before it began"
        message = f"job {number} of Slurm has ended, {why} ({paths.stderr})"
        if self.config.get("mode") == "train":
            with suppress(Held), run.hold():  # other launchers write the same
                run.mark_failed(message)
        return _failed(message)

    def _say_what_stays(self, ids: Mapping[str, str]) -> None:
        listed = _listed(ids.values())
        print(
            f"dynmoe-run: jobs in the queue of Slurm stay there: {listed}. The same command waits "
            f"for them, scancel {listed} ends them",
            file=sys.stderr,
        )


def _listed(ids: Iterable[str]) -> str:
    return " ".join(slurm.short(ids))


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold up the signals that end a command until the body is done; its programs inherit this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, process.ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayLauncher(WorkLauncher):
    """Tasks of Ray, which end with the launcher."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        import ray

        if not ray.is_initialized():
            ray.init(**self.params["init"] or {})
        options = {"max_retries": 0, "num_cpus": 1} | (self.params["remote"] or {})
        run = ray.remote(**options)(_call)
        try:
            tasks = [run.remote(work) for work in self.work(Work, job_overrides, initial_job_idx)]
            return [_result_of_ray(ray, task) for task in tasks]
        finally:
            ray.shutdown()


def _call(work: Work) -> JobReturn:
    # Ray may have been started by one of several tasks of Slurm: this process is none of them.
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    return work()


def _result_of_ray(ray: Any, task: Any) -> JobReturn:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:  # a worker was killed, or there is no room for it
        return _failed(f"{type(error).__name__}: {error}".splitlines()[0])

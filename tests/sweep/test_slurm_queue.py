"""Jobs in Slurm's queue, which programs of these names on PATH stand for: each submitted once."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.dynmoe_sweeper import SlurmLauncher, _launchers
from omegaconf import DictConfig, OmegaConf

from dynmoe import process, ranks
from dynmoe.errors import UserError
from dynmoe.records import RunFolder
from dynmoe.sweep import slurm

pytest.importorskip("submitit")

PROGRAMS = {
    "squeue": 'test -e $FAKE/away && { echo "squeue: error: no answer" >&2; exit 1; }\n'
    "cat $FAKE/queue\n",
    "sbatch": 'test -e $FAKE/refuses && { echo "sbatch: error: no partition" >&2; exit 1; }\n'
    "job=$(( $(cat $FAKE/last) + 1 )); echo $job > $FAKE/last\n"
    "name=$(sed -n 's/^#SBATCH --job-name=//p' $1)\n"
    "last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' $1)\n"
    'if test -n "$last"; then for i in $(seq 0 $last); do echo "${job}_$i PENDING $name"; done\n'
    'else echo "$job PENDING $name"; fi >> $FAKE/queue\n'
    "echo Submitted batch job $job\n",
    "srun": "",
}
PARAMS = {
    **{"name": "run", "timeout_min": 60, "signal_delay_s": 60, "max_num_timeout": 1},
    **{"tasks_per_node": None, "nodes": 1, "partition": None, "additional_parameters": {}},
}


class Loader:
    def load_sweep_config(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        return OmegaConf.merge(config, {"hydra": {"sweep": {"subdir": overrides[0]}}})  # type: ignore[return-value]


class Slurm:
    """A queue that stands still until a test says otherwise."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sweep = root / "sweep"
        (root / "bin").mkdir()
        for name, text in PROGRAMS.items():
            file = root / "bin" / name
            file.write_text(f"#!/bin/bash\n{text}")
            file.chmod(0o755)
        (root / "queue").touch()
        (root / "last").write_text("0\n")

    @property
    def submitted(self) -> int:
        return int((self.root / "last").read_text())

    def end(self, job: str, state: str = "") -> None:
        """The job leaves the queue, to be seen in a state or not at all."""
        lines = (self.root / "queue").read_text().splitlines()
        kept = [line for line in lines if line.split()[0] != job]
        ended = [f"{job} {state} {line.split()[2]}" for line in lines if line.split()[0] == job]
        (self.root / "queue").write_text("".join(f"{x}\n" for x in kept + ended * bool(state)))

    def finish(self, job: str, result: object = None) -> None:
        folder = self.sweep / ".submitit" / job
        folder.mkdir(parents=True, exist_ok=True)
        done = ("success", JobReturn(status=JobStatus.COMPLETED)) if result is None else result
        (folder / f"{job}_0_result.pkl").write_bytes(pickle.dumps(done))
        self.end(job, "COMPLETED")

    def launcher(self, mode: str = "train", overwrite: bool = False) -> SlurmLauncher:
        launcher = SlurmLauncher(**PARAMS, submitit_folder=f"{self.sweep}/.submitit/%j")
        node = {"sweep": {"dir": str(self.sweep), "subdir": ""}}
        config = {"mode": mode, "overwrite": overwrite, "trainer": {"devices": 1}, "hydra": node}
        launcher.setup(
            hydra_context=SimpleNamespace(config_loader=Loader()),
            task_function=str,
            config=OmegaConf.create(config),
        )
        return launcher

    def launch(self, *runs: str, **options: Any) -> Sequence[JobReturn]:
        return self.launcher(**options).launch([[run] for run in runs], 0)


Events = Callable[..., None]
WHILE = [lambda: None] * 9


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setattr(_launchers, "SOON", 0.0)
    monkeypatch.setattr(_launchers, "GRACE", 0.0)
    return Slurm(tmp_path)


@pytest.fixture
def then(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What happens, one after the other, while a launcher waits."""

    def set_events(*events: Callable[[], object]) -> None:
        left = [*events, *[lambda: None] * 99]
        monkeypatch.setattr(_launchers, "sleep", lambda _: left.pop(0)())

    return set_events


def stop() -> None:
    raise process.Stopped(signal.SIGINT)


def test_jobs_in_the_queue_are_waited_for(
    queue: Slurm, then: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    then(stop)
    with pytest.raises(KeyboardInterrupt):
        queue.launch("a", "b")
    err = capsys.readouterr().err
    assert "stay there: 1_[0,1]." in err and "scancel 1_[0,1]" in err

    # Another launcher finds them, and submits what is not there.
    then(*(lambda job=job: queue.finish(job) for job in ("1_1", "2", "1_0")))
    done = queue.launch("b", "c", "a")
    out = capsys.readouterr().out
    assert "already, waited for: 1_[0,1]" in out and "submitted to Slurm: 2" in out
    assert queue.submitted == 2
    assert [each.status for each in done] == [JobStatus.COMPLETED] * 3


def test_two_launchers_at_once_submit_one_batch(queue: Slurm) -> None:
    launchers = [queue.launcher() for _ in range(2)]
    for launcher in launchers:
        launcher._wait = lambda ids: dict.fromkeys(ids, sorted(ids.values()))  # type: ignore
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda each: each.launch([["a"], ["b"]], 0), launchers)]
    assert queue.submitted == 1 and found[0] == found[1] == [["1_0", "1_1"]] * 2


def test_a_cancelled_job_is_not_submitted_again(queue: Slurm, then: Events) -> None:
    log = queue.sweep / ".submitit" / "1_1" / "1_1_0_log.out"
    then(
        lambda: queue.end("1_0", "CANCELLED"),
        lambda: (queue.end("1_1"), log.parent.mkdir(exist_ok=True), log.touch()),
        lambda: queue.end("1_2"),
    )
    done = queue.launch("a", "b", "c")
    assert queue.submitted == 1
    assert [each.status for each in done] == [JobStatus.FAILED] * 3
    failures = [RunFolder(queue.sweep / name).failure for name in "abc"]
    assert "1_0" in failures[0] and "CANCELLED: it was cancelled" in failures[0]
    # The queue forgets jobs; nobody can say more of one that has begun.
    assert "1_1" in failures[1] and "cancelled, or its process was killed" in failures[1]
    assert "1_2" in failures[2] and "cancelled before it began" in failures[2]


def test_a_job_that_is_requeued_has_not_ended(queue: Slurm, then: Events) -> None:
    then(
        lambda: queue.end("1", "NODE_FAIL"),
        lambda: queue.end("1", "PENDING"),
        *WHILE,
        lambda: queue.finish("1"),
    )
    (done,) = queue.launch("a")
    assert done.status is JobStatus.COMPLETED and not RunFolder(queue.sweep / "a").failure


def test_a_controller_may_be_away_for_a_while(
    queue: Slurm, then: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    away = queue.root / "away"
    then(away.touch, *WHILE, away.unlink, *WHILE, lambda: queue.finish("1"))
    (done,) = queue.launch("a")
    assert done.status is JobStatus.COMPLETED
    assert capsys.readouterr().err.count("squeue: error: no answer") == 1
    away.touch()
    with pytest.raises(UserError, match="no answer"):  # nothing is submitted without knowing
        queue.launch("b")
    assert queue.submitted == 1


def test_a_run_that_is_done_needs_no_result(queue: Slurm, then: Events) -> None:
    """Its job may have been cancelled while it wrote the result."""
    RunFolder(queue.sweep / "a").mark_done()
    then(lambda: queue.end("1", "CANCELLED"))
    assert queue.launch("a")[0].status is JobStatus.COMPLETED


def test_a_job_that_ends_between_two_looks_is_not_submitted_again(
    queue: Slurm, then: Events
) -> None:
    then(stop)
    with pytest.raises(KeyboardInterrupt):
        queue.launch("a", "b")
    launcher = queue.launcher()
    assert launcher.look() == {"a": "1_0", "b": "1_1"}
    queue.finish("1_0", ("error", "ValueError: why\n"))
    queue.end("1_1", "CANCELLED")
    then()
    done = launcher.launch([["a"], ["b"]], 0)
    assert queue.submitted == 1 and [each.status for each in done] == [JobStatus.FAILED] * 2
    # A second launch of the same run is meant to be one.
    then(lambda: queue.finish("2"))
    assert launcher.launch([["a"]], 0)[0].status is JobStatus.COMPLETED


def test_a_result_may_be_seen_late(
    queue: Slurm, then: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS hides new files for a while."""
    clock = [0.0]
    monkeypatch.setattr(_launchers, "monotonic", lambda: clock[0])
    monkeypatch.setattr(_launchers, "GRACE", 60.0)

    def later() -> None:
        clock[0] += 2.0

    then(lambda: queue.end("1", "COMPLETED"), *[later] * 25, lambda: queue.finish("1"))
    assert queue.launch("a")[0].status is JobStatus.COMPLETED
    assert not RunFolder(queue.sweep / "a").failure

    then(lambda: queue.end("2", "COMPLETED"), *[later] * 40)
    assert queue.launch("b")[0].status is JobStatus.FAILED
    assert "without a result" in RunFolder(queue.sweep / "b").failure


def test_an_error_in_a_job_is_one_line(queue: Slurm, then: Events) -> None:
    then(lambda: queue.finish("1", ("error", "Traceback\n  many lines\nValueError: why\n")))
    (done,) = queue.launch("a")
    with pytest.raises(RuntimeError, match=r"^ValueError: why$"):
        _ = done.return_value


def test_a_refusal_of_sbatch_is_said_in_its_words(queue: Slurm) -> None:
    (queue.root / "refuses").touch()
    with pytest.raises(UserError, match=r"^sbatch: error: no partition$"):
        queue.launch("a")
    (queue.root / "refuses").unlink()
    assert queue.launcher().waiting() == {}


def test_a_check_is_another_job_than_the_training(queue: Slurm, then: Events) -> None:
    then(stop)
    with pytest.raises(KeyboardInterrupt):
        queue.launch("a")
    then(lambda: queue.finish("2"))
    queue.launch("a", mode="check")
    assert queue.submitted == 2


def test_many_jobs_are_several_arrays(
    queue: Slurm, then: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "LONGEST", 2)
    then(*(lambda job=job: queue.finish(job) for job in ("1_0", "1_1", "2_0", "2_1", "3")))
    assert len(queue.launch(*"abcde")) == 5 and queue.submitted == 3


def test_options_that_submitit_does_not_know_are_refused(queue: Slurm) -> None:
    launcher = queue.launcher()
    launcher.params["partitoin"] = "low"
    with pytest.raises(UserError, match="partitoin"):
        launcher.launch([["a"]], 0)


def test_the_last_time_limit_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What submitit raises from its handler would be a traceback in failed.txt."""
    from submitit.core.utils import UncompletedJobError

    def theirs(signum: int, frame: Any) -> None:
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    before = signal.signal(signal.SIGUSR2, theirs)
    try:
        _launchers._say_time_is_over()
        with pytest.raises(UserError, match=r"timeout_min.*max_num_timeout"):
            os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_job_in_the_queue_is_not_overwritten(
    queue: Slurm, then: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    then(stop)
    with pytest.raises(KeyboardInterrupt):
        queue.launch("a", overwrite=True)
    assert "overwrite" not in capsys.readouterr().out
    then(lambda: queue.finish("1"))
    queue.launch("a", overwrite=True)
    out = capsys.readouterr().out
    assert "overwrite=true begins none" in out and "scancel 1\n" in out and queue.submitted == 1


def test_a_task_of_ray_is_no_task_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "2", "PROCID": "1", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert ranks.tasks() == 2
    assert _launchers._call(lambda: (ranks.tasks(), ranks.rank())) == (None, 0)  # type: ignore


def test_a_second_start_does_not_overwrite_the_first(queue: Slurm) -> None:
    work, *_ = queue.launcher().work(_launchers.SubmittedWork, [["overwrite=true"]], 0)
    again = work.checkpoint().function  # type: ignore[attr-defined]
    assert again.overrides == ["overwrite=true", "++overwrite=false"]
    assert again.checkpoint().function.overrides[-1] == "++overwrite=false"
    assert isinstance(again, _launchers.SubmittedWork) and again.number == work.number

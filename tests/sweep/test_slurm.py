"""Runs and sweeps on a real Slurm of one node."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from one_node import OneNode, missing, wait_for
from tiny_runs import TINY_DYNMOE

from dynmoe.records import RunFolder

MISSING = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} is not installed (slurm-wlm, munge)"),
]
RUN = (sys.executable, "-m", "runners.run", *TINY_DYNMOE, "seed=0")
LONG = ("task.steps=241", "task.eval_every=20")  # 13 evaluations
LAUNCHER = ("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1")
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
TIMED = ("step_time", "eval_time", "mem_gb")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    pytest.importorskip("submitit")
    node = OneNode(tmp_path_factory.mktemp("slurm"))
    node.env = {**node.env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        node.start()
        yield node
    finally:
        node.stop()


class Site:
    """Commands on the node, and the runs that they leave in a folder."""

    def __init__(self, node: OneNode, folder: Path) -> None:
        self.node, self.folder = node, folder

    def start(self, *words: str, name: str = "out") -> subprocess.Popen[bytes]:
        with (self.folder / name).open("wb") as out:
            return subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, cwd=self.folder, env=self.node.env
            )

    def launch(self, *words: str, name: str = "out") -> subprocess.Popen[bytes]:
        outputs = f"paths.outputs={self.folder}"
        return self.start(*RUN, "-m", *LAUNCHER, outputs, *words, name=name)

    def batch(self, *words: str, srun: str = "srun", options: str = "", after: str = "") -> str:
        """Submit a script with one command of ours; the id of its job."""
        script = self.folder / f"script{len(list(self.folder.glob('script*')))}.sh"
        command = shlex.join((*RUN, f"paths.outputs={self.folder}", *words))
        script.write_text(f"#!/bin/bash\n{srun} {command}\n{after}\n")
        shown = f"--output={self.folder}/%j.out"
        said = self.node.run("sbatch", "--parsable", shown, *options.split(), str(script))
        return said.strip()

    def text(self, name: str = "out") -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def waits(self, *jobs: str) -> None:
        """Wait until the jobs have left the queue."""
        wait_for(lambda: not set(jobs) & set(self.node.queue()))

    @property
    def runs(self) -> list[RunFolder]:
        return [RunFolder(path) for path in self.folder.glob("vit_domainbed/[!.]*/")]

    @property
    def submitted(self) -> int:
        """Batches of launchers."""
        return len(list(self.folder.glob("vit_domainbed/.submitit/batch-*.json")))


@pytest.fixture
def site(node: OneNode, tmp_path: Path) -> Iterator[Site]:
    yield Site(node, tmp_path)
    node.cancel_all()


def results(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in each.items() if k not in TIMED} for each in run.read("results")]


def starts(run: RunFolder) -> int:
    return (run.path / "run.log").read_text().count("run folder:")


def begun(site: Site) -> bool:
    return bool(list(site.folder.glob("vit_domainbed/*/checkpoints/last.ckpt")))


def ends(process: subprocess.Popen[bytes], seconds: float = 900) -> int:
    return process.wait(timeout=seconds)


def test_each_job_of_a_sweep_is_submitted_once(site: Site) -> None:
    """A stopped launcher, two others at once, a cancelled job; then what is missing alone."""
    first = site.launch("seed=0,1,2,3", name="first")
    wait_for(lambda: len(site.node.queue()) == 4)
    (array,) = {job.partition("_")[0] for job in site.node.queue()}
    first.terminate()  # as Ctrl-C, which a shell lets its background jobs ignore
    assert ends(first) == 143
    assert f"scancel {array}_[0,1,2,3]" in site.text("first") and len(site.node.queue()) == 4

    again = [site.launch("seed=0,1,2,3", name=name) for name in ("second", "third")]
    for name in ("second", "third"):
        wait_for(lambda name=name: "waited for" in site.text(name))
    site.node.run("scancel", f"{array}_3")
    assert [ends(each) for each in again] == [1, 1]
    assert site.submitted == 1
    assert sorted(run.state for run in site.runs) == ["done"] * 3 + ["failed"]
    assert "it was cancelled before it began" in site.text("second")

    assert ends(site.launch("seed=0,1,2,3", name="last")) == 0
    assert site.submitted == 2 and [run.state for run in site.runs] == ["done"] * 4


def test_a_preempted_job_goes_on_with_equal_records(site: Site, tmp_path: Path) -> None:
    launcher = site.launch(*LONG, "seed=0", "hydra.launcher.cpus_per_task=2")
    wait_for(lambda: begun(site))
    site.node.run("sbatch", "-p", "high", "-c2", "--output=/dev/null", "--wrap", "sleep 1")
    assert ends(launcher) == 0, site.text()
    (run,) = site.runs
    assert starts(run) == 2
    (tmp_path / "alone").mkdir()
    alone = Site(site.node, tmp_path / "alone")
    assert ends(alone.start(*RUN, *LONG, f"paths.outputs={alone.folder}")) == 0
    assert results(run) == results(alone.runs[0]) and len(results(run)) == 13


def test_a_script_goes_back_into_the_queue_before_its_limit(site: Site) -> None:
    """The script of docs/scale.md, with a real limit of a minute."""
    again = '[ $? = 138 ] && scontrol requeue "$SLURM_JOB_ID"'
    options = "--time=1 --signal=USR1@20 --requeue --open-mode=append"
    job = site.batch("task.steps=99999", "task.eval_every=40", options=options, after=again)
    wait_for(lambda: "stopped by SIGUSR1" in site.text(f"{job}.out"))
    (run,) = site.runs
    wait_for(lambda: starts(run) == 2)
    assert not list(run.path.rglob("hpc_ckpt*"))
    site.node.run("scancel", job)
    site.waits(job)
    assert run.state == "stopped"


def test_the_last_limit_of_a_launchers_job_is_said_in_words(site: Site) -> None:
    """submitit counts every signal as a limit where the limit is 10 minutes or less."""
    limits = ("hydra.launcher.timeout_min=5", "hydra.launcher.max_num_timeout=0")
    launcher = site.launch("task.steps=99999", "task.eval_every=40", *limits)
    wait_for(lambda: begun(site))
    (job,) = site.node.queue()
    site.node.run("scancel", "--signal=USR2", job)
    assert ends(launcher) == 1
    (run,) = site.runs
    text = (run.path / "failed.txt").read_text()
    assert "hydra.launcher.timeout_min" in text and text.count("\n") == 1
    assert site.submitted == 1


def test_several_devices_are_tasks_of_srun(site: Site) -> None:
    job = site.batch(*DDP, options="-n2")
    refused = [
        site.batch(*DDP, options="-n1"),  # Lightning would train on one
        site.batch(*DDP, options="-n2", srun=""),  # and here wait for the other one without end
        site.batch("seed=1", options="-n2"),  # two times the same run
    ]
    site.waits(job, *refused)
    (run,) = site.runs
    assert run.state == "done", site.text(f"{job}.out")
    assert run.read_run()["device"] == "2 x cpu"
    for each, count in zip(refused, (1, 1, 2), strict=True):
        text = site.text(f"{each}.out")
        assert text.count("1 problem in the configuration") == count and "Traceback" not in text
        assert "srun --ntasks" in text
    assert ends(site.launch(*DDP, "seed=2", "hydra.launcher.cpus_per_task=1")) == 0
    assert sorted(run.state for run in site.runs) == ["done", "done"]


def test_lost_daemons_and_launchers_lose_nothing(site: Site) -> None:
    """A launcher killed, slurmctld away for a while, slurmd killed."""
    node = site.node
    first = site.launch(*LONG, "seed=0,1,2", name="first")
    wait_for(lambda: begun(site))
    first.kill()
    first.wait()
    second = site.launch(*LONG, "seed=0,1,2", name="second")
    wait_for(lambda: "waited for" in site.text("second"))
    node.stop_daemon("slurmctld", signal.SIGKILL)
    node.stop_daemon("slurmd", signal.SIGKILL)
    wait_for(lambda: "cannot be asked" in site.text("second"))
    node.start_daemon("slurmctld", "-D")
    node.start_daemon("slurmd", "-D")
    assert ends(second) == 0, site.text("second")
    assert site.submitted == 1 and [run.state for run in site.runs] == ["done"] * 3
    assert [len(run.read("results")) for run in site.runs] == [13] * 3

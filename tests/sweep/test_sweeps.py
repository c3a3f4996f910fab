"""A sweep as a user meets it: nothing twice, nothing mixed, nothing hidden.

Training is a stand-in. Commands run in this process unless they run side by side or are killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_line import command
from hydra_plugins.dynmoe_sweeper import DynMoESweeper
from omegaconf import DictConfig

from dynmoe import cli, job
from dynmoe.config.compose import preflight
from dynmoe.errors import ConfigError, DataError
from dynmoe.records import RunFolder
from dynmoe.sweep import manifest
from dynmoe.sweep.manifest import Job

OWN = """# @package _global_
name: own
hydra:
  mode: MULTIRUN
  sweeper:
    params: {seed: '0,1'}
    settings:
      - {moe: dense}
      - {moe: topk, moe.num_experts: 2, moe.top_k: 1}
"""
TARGETS = """{moe: topk, moe.top_k: '${hydra.sweeper.target_k}'}
    unless_causal:
      - {moe: expert_choice}
    target_k: '1,2'"""
SWEEP = ("--config-dir", "conf", "task=vit_domainbed", "sweep=own")


def fit(cfg: DictConfig, folder: RunFolder) -> bool:
    """Instead of training: a line in the file `log`, and the records of a run."""
    with open("log", "a") as log:
        log.write(f"{cfg.moe.name} {cfg.moe.num_experts} {cfg.seed}\n")
    time.sleep(float(os.environ.get("NAP", 0)))
    folder.write_run({})
    folder.append("results", {"step": 60, "step_time": 1.0, "eval_time": 30.0})
    if cfg.seed == 13 and not Path("mended").exists():
        raise DataError("PACS lacks the folder 'sketch'")
    if cfg.seed == 14:
        raise ZeroDivisionError("a bug")
    folder.append("results", {"step": 500, "step_time": 1.0, "eval_time": 30.0})
    return True


def show(folder: RunFolder) -> float:
    folder.mark_done()
    return 0.5


class Sweep:
    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "conf" / "sweep").mkdir(parents=True)
        (root / "conf" / "sweep" / "own.yaml").write_text(OWN)
        self.folder = root / "outputs" / "own"

    def rewrite(self, before: str, after: str) -> None:
        """Replace a text in the sweep's file."""
        file = self.root / "conf" / "sweep" / "own.yaml"
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))

    def start(self, *arguments: str, nap: float) -> subprocess.Popen[str]:
        """The command in a process of its own; every job takes `nap` seconds."""
        tests = Path(__file__).parents[1]
        paths = os.pathsep.join(map(str, (tests.parent, tests)))
        return subprocess.Popen(
            [sys.executable, __file__, *SWEEP, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": paths, "NAP": str(nap)},
        )

    def call(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "train", fit)
            patch.setattr(job, "show", show)
            done = command(job.job, self.root, *SWEEP, *arguments)
        return done.returncode, done.stdout, done.stderr

    def problems(self, *arguments: str) -> list[str]:
        return preflight([*SWEEP[2:], *arguments], config_dir=str(self.root / "conf")).problems

    @property
    def log(self) -> list[str]:
        """What was trained, in order, since the last look."""
        log = self.root / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    @property
    def states(self) -> list[str]:
        runs = [path for path in self.folder.glob("*/") if path.name != ".locks"]
        return sorted(RunFolder(path).state for path in runs)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_settings_times_parameters_once_and_never_again(sweep: Sweep) -> None:
    status, out, err = sweep.call()
    assert (status, err) == (0, "")
    assert "4 of 4 jobs are done. Next: dynmoe-report outputs/own" in out
    # The settings of the first seed come first.
    one = ["dense 1", "topk 2"]
    assert sweep.log == [f"{setting} {seed}" for seed in (0, 1) for setting in one]
    assert sweep.states == ["done"] * 4
    status, out, _ = sweep.call("seed=0,2")
    assert status == 0 and sweep.log == [f"{setting} 2" for setting in one]
    assert "4 jobs in outputs/own: 2 done or running, 2 to do" in out
    content = json.loads((sweep.folder / "sweep.json").read_text())
    assert content["commands"] == [
        "dynmoe-run --config-dir conf task=vit_domainbed sweep=own",
        "dynmoe-run --config-dir conf task=vit_domainbed sweep=own seed=0,2",
    ]
    jobs = content["jobs"]
    assert len(jobs) == 6 and set(jobs) == {path.name for path in sweep.folder.glob("rot*")}
    # Another configuration is refused, with every key that differs.
    status, _, err = sweep.call("seed=0", "task.steps=101", "task.optimizer.lr=0.1")
    assert status == 2 and sweep.log == [] and "Traceback" not in err
    assert "task.optimizer.lr: 0.001 there, 0.1 now" in err
    assert "task.steps: 501 there, 101 now" in err and "name=FOLDER" in err


@pytest.mark.slow
def test_failed_jobs_are_named_and_planned_and_tried_again(sweep: Sweep) -> None:
    status, out, _ = sweep.call("seed=0", "mode=plan")
    assert status == 0 and not sweep.folder.exists()
    assert "2 jobs: 2 missing" in out and "unknown until a first evaluation" in out
    status, out, err = sweep.call("seed=13,14,1")
    assert status == 1 and len(sweep.log) == 6
    assert sweep.states == ["done"] * 2 + ["failed"] * 4
    assert "2 of 6 jobs are done" in out
    assert "failed: moe=dense seed=13: PACS lacks the folder 'sketch'\n" in err
    assert "failed: moe=dense seed=14: ZeroDivisionError: a bug\n" in err
    assert "Traceback" in (next(sweep.folder.glob("*dense*seed14*")) / "failed.txt").read_text()

    _, out, _ = sweep.call("seed=1,13,2", "mode=plan")
    assert sweep.log == []
    assert "6 jobs: 2 done, 2 failed, 2 missing" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "moe=dense seed=1 done 501/501" in lines
    # 501 steps of 1 s and 11 evaluations of 30 s; of seed 13, 61 steps and 1 evaluation are done.
    assert "moe=dense seed=2 missing 0/501 14 min" in lines
    assert "moe=dense seed=13 failed 61/501 13 min PACS lacks the folder 'sketch'" in lines
    assert "Time left: about 53 min of work." in lines  # 2 x 831 s + 2 x 740 s = 52.4 min

    (sweep.root / "mended").touch()
    status, _, err = sweep.call("seed=13,1")
    assert (status, err) == (0, "")
    assert [line.split()[-1] for line in sweep.log] == ["13"] * 2
    assert sweep.states == ["done"] * 4 + ["failed"] * 2


def test_a_changed_option_of_a_setting_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    """The plain command, which has moe=dynmoe, does not show the change."""
    options = tmp_path / "conf" / "moe"
    options.mkdir()
    (options / "mine.yaml").write_text("defaults: [topk, _self_]\naux_weight: 0.1\n")
    sweep.rewrite("moe: dense", "moe: mine")
    assert sweep.call("seed=0")[0] == 0 and len(sweep.log) == 2
    (options / "mine.yaml").write_text("defaults: [topk, _self_]\naux_weight: 0.2\n")
    status, _, err = sweep.call("seed=1")
    assert status == 2 and sweep.log == [] and "moe.aux_weight: 0.1 there, 0.2 now" in err


def made(folder: Path, setting: str, **config: Any) -> Job:
    return Job((), setting, setting, RunFolder(folder / str(config)), config, 1, 1)


def test_seeds_environments_and_settings_may_join(tmp_path: Path) -> None:
    first = [made(tmp_path, "moe=dense", seed=0, lr=0.1)]
    manifest.check(tmp_path, "own", {"seed": 0, "steps": 61}, first)
    manifest.record(tmp_path, "own", "command", {"seed": 0, "steps": 61}, first)
    joining = [
        made(tmp_path, "moe=dense", seed=1, lr=0.1, **{"data.test_envs": [1]}),
        made(tmp_path, "moe=topk", seed=0, lr=0.2),
    ]
    manifest.check(tmp_path, "own", {"seed": 1, "steps": 61}, joining)
    for name, steps, lr, message in (
        ("own", 31, 0.1, "steps: 61 there, 31 now"),
        ("own", 61, 0.2, "lr: 0.1 there, 0.2 now"),
        ("other", 61, 0.1, "sweep: own there, other now"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed = made(tmp_path, "moe=dense", seed=2, lr=lr)
            manifest.check(tmp_path, name, {"seed": 2, "steps": steps}, [changed])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sweep": "own"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.json: expected .*found damage"):
        manifest.check(tmp_path, "own", {}, [])


@pytest.mark.slow
def test_two_launchers_share_the_jobs(sweep: Sweep) -> None:
    processes = [sweep.start(nap=0.5) for _ in range(2)]
    ends = [process.communicate(timeout=240) for process in processes]
    assert len(log := sweep.log) == len(set(log)) == 4, ends
    assert sweep.states == ["done"] * 4
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.slow
def test_a_killed_launcher_loses_one_job_at_most(sweep: Sweep) -> None:
    process = sweep.start(nap=2.0)
    deadline = time.monotonic() + 120
    while "done" not in sweep.states and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = sweep.log
    assert "done" in sweep.states and len(before) < 4
    assert sweep.call()[0] == 0 and sweep.states == ["done"] * 4
    # At most the job that was running is started twice.
    assert len(before) + len(sweep.log) <= 5


class TwoWorkers:
    """A launcher of two processes that ends with both when one is killed, as joblib's does."""

    def __init__(self, killers: Sequence[str]) -> None:
        self.killers, self.started = list(killers), list[str]()

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        names = [name for (name,) in overrides]
        for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
            for name in pair:
                self.started.append(name)
                write(Path(name) / ".hydra" / "overrides.yaml", f"{len(self.started)}")
                write(Path(name) / "run.json", "{}")
            if {Path(name).name for name in pair} & set(self.killers):
                raise ChildProcessError("a worker was killed")
            for name in pair:
                RunFolder(name).mark_done()
        return []


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_killed_worker_loses_its_own_job_alone(tmp_path: Path) -> None:
    """The jobs that ran beside it, and those behind it, are done by the same command."""
    sweeper, launcher = DynMoESweeper(None), TwoWorkers(killers=["b"])
    sweeper.launcher = launcher  # type: ignore[assignment]
    jobs = [
        Job((str(tmp_path / name),), name, name, RunFolder(tmp_path / name), {}, 1, 1)
        for name in "abcde"
    ]
    sweeper._launch(jobs)
    assert [job.state for job in jobs] == ["done", "failed", "done", "done", "done"]
    assert "killed" in jobs[1].folder.failure and "same command" in jobs[1].folder.failure
    assert [Path(name).name for name in launcher.started] == list("abcdeab")


def test_a_key_that_the_sweep_sets_is_refused(sweep: Sweep) -> None:
    found = "\n".join(sweep.problems("moe.top_k=2", "moe=gmoe"))
    assert "moe.top_k: sweep=own sets it" in found and "moe: sweep=own sets it" in found


def test_causal_models_leave_settings_out(sweep: Sweep) -> None:
    """And settings may refer to several targets."""
    sweep.rewrite("{moe: topk, moe.num_experts: 2, moe.top_k: 1}", TARGETS)
    glue = ("task=glue", "backbone=bert_tiny", "sweep=own", "mode=plan", "seed=0")
    plans = {}
    for architecture in ("bert", "gpt2"):
        words = (*glue, f"backbone.architecture={architecture}")
        done = command(job.job, sweep.root, "--config-dir", "conf", *words)
        assert done.returncode == 0, done.stderr
        plans[architecture] = [
            line.split(" missing")[0].strip() for line in done.stdout.splitlines()
        ]
    several = ["moe=topk moe.top_k=1", "moe=topk moe.top_k=2"]
    assert plans["bert"][1:5] == ["moe=dense", *several, "moe=expert_choice"]
    assert (
        plans["gpt2"][1:4] == ["moe=dense", *several] and "moe=expert_choice" not in plans["gpt2"]
    )


def test_a_sweep_over_tasks_is_planned(tmp_path: Path) -> None:
    words = ("task=vit_domainbed,glue", "moe=dense", "name=both", "mode=plan")
    done = command(job.job, tmp_path, "-m", *words)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 missing" in done.stdout


def test_every_combination_is_checked_before_any_work(sweep: Sweep) -> None:
    """Each value is right beside the first of the other; the last two are not."""
    sweep.rewrite("moe.num_experts: 2, moe.top_k: 1", "moe.num_experts: '4,2', moe.top_k: '1,3'")
    status, _, err = sweep.call("seed=0")
    assert status == 2 and sweep.log == []
    assert "moe.num_experts=2 moe.top_k=3: moe: top_k (3) > num_experts (2)" in err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("moe: dense", "moe: [dense, topk]", "settings[0].moe: expected text, found a list. Sev"),
        ("moe: dense", "moe: denze", "moe: no option 'denze'. Did you mean 'dense'?"),
        ("- {moe: dense}", "- dense", "settings[0]: expected {key: 'value,value'}, found dense"),
        ("{seed: '0,1'}", "seed", "hydra.sweeper.params: expected {key: 'value,value'}, found"),
        ("params:", "max_batch_size: -1\n    params:", "max_batch_size: expected null, or 1 or"),
        ("    settings:", "    setings:", "hydra.sweeper.setings: unknown key. Known: max_batch"),
        ("params:", "target_k: x\n    params:", "target_k: expected a number above 0, or several"),
        ("    settings:", "    unless_causal: [a]\n    settings:", "unless_causal[0]: expected"),
        ("# @package _global_", "", "sweep: the file of this group has to begin with '# @packa"),
        ("moe: dense", "moe: 'den=se['", "cannot be read as key=value"),
        ("{moe: dense}", "{moe: dense", "own.yaml"),
        ("moe: dense", "task.steps: '${foo.bar}'", "foo"),
        ("moe.num_experts: 2, moe.top_k: 1", "moe.top_k: 9", "top_k (9) > num_experts (8)"),
    ],
)
def test_a_wrong_file_is_refused(sweep: Sweep, before: str, after: str, message: str) -> None:
    sweep.rewrite(before, after)
    found = sweep.problems()
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed=interval(0,1)"], "seed=interval(0,1): only a search draws from an interval"),
        (["sweep=smoke,topk_grid"], "sweep: one at a time, start them one after the other"),
        (["mode=plan,train"], "mode: one at a time, start them one after the other"),
        (["sweep=optuna", "mode=plan"], "mode: a search draws its jobs one after another"),
    ],
)
def test_commands_that_mean_nothing_are_refused(texts: list[str], message: str) -> None:
    (found,) = preflight(["task=vit_domainbed", *texts], multirun=True).problems
    assert found.startswith(message)


def test_launchers_do_not_write_over_one_another(tmp_path: Path) -> None:
    """Each adds its jobs to sweep.json while another one does."""

    def launch(who: str) -> None:
        for number in range(10):
            added = made(tmp_path, f"{who}{number}", who=who, number=number)
            with manifest.locked(tmp_path):
                manifest.record(tmp_path, "own", "c", {}, [added])

    with ThreadPoolExecutor(2) as launchers:
        list(launchers.map(launch, "ab"))
    assert len(json.loads((tmp_path / "sweep.json").read_text())["jobs"]) == 20


if __name__ == "__main__":  # as Sweep.start runs it
    job.train, job.show = fit, show
    cli.run(job.job, prog="dynmoe-run")

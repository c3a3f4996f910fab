"""A sweep as a user meets it: nothing twice, nothing mixed, nothing hidden.

Training is a stand-in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynmoe.config.compose import preflight
from dynmoe.records import RunFolder

SCRIPT = """
import os, time
from pathlib import Path
from dynmoe.errors import DataError
from dynmoe import cli, job

def fit(cfg, folder):
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{cfg.moe.name} {cfg.moe.num_experts} {cfg.seed}\\n")
    time.sleep(float(os.environ["NAP"]))
    folder.write_run({})
    folder.append("results", {"step": 60, "step_time": 1.0, "eval_time": 30.0})
    if cfg.seed == 13 and not Path("mended").exists():
        raise DataError("PACS lacks the folder 'sketch'")
    if cfg.seed == 14:
        raise ZeroDivisionError("a bug")
    folder.append("results", {"step": 500, "step_time": 1.0, "eval_time": 30.0})
    return True

def show(folder):
    folder.mark_done()
    return 0.5

job.train, job.show = fit, show

if __name__ == "__main__":
    cli.run(job.job, prog="dynmoe-run")
"""
OWN = """# @package _global_
name: own
hydra:
  mode: MULTIRUN
  sweeper:
    params: {seed: '0,1'}
    settings:
      - {moe: dense}
      - {moe: topk, moe.num_experts: '2,4', moe.top_k: 1}
"""
SWEEP = ("--config-dir", "conf", "task=vit_domainbed", "sweep=own")


class Sweep:
    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "job_script.py").write_text(SCRIPT)
        (root / "conf" / "sweep").mkdir(parents=True)
        (root / "conf" / "sweep" / "own.yaml").write_text(OWN)
        self.folder = root / "outputs" / "own"

    def rewrite(self, before: str, after: str) -> None:
        """Replace a text in the sweep's file."""
        file = self.root / "conf" / "sweep" / "own.yaml"
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))

    def start(self, *arguments: str, nap: float = 0.0) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        env = {"PYTHONPATH": paths, "LOG": str(self.root / "log"), "NAP": str(nap)}
        return subprocess.Popen(
            [sys.executable, "job_script.py", *SWEEP, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={**os.environ, **env, "COLUMNS": "200"},
        )

    def call(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

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
    assert "6 of 6 jobs are done. Next: dynmoe-report outputs/own" in out
    # The settings of the first seed come first.
    one = ["dense 1", "topk 2", "topk 4"]
    assert sweep.log == [f"{setting} {seed}" for seed in (0, 1) for setting in one]
    assert sweep.states == ["done"] * 6
    status, out, _ = sweep.call("seed=0,1,2")
    assert status == 0 and sweep.log == [f"{setting} 2" for setting in one]
    assert "9 jobs in outputs/own: 6 done or running, 3 to do" in out
    content = json.loads((sweep.folder / "sweep.json").read_text())
    assert content["commands"] == [
        "dynmoe-run --config-dir conf task=vit_domainbed sweep=own",
        "dynmoe-run --config-dir conf task=vit_domainbed sweep=own seed=0,1,2",
    ]
    jobs = content["jobs"]
    assert len(jobs) == 9 and set(jobs) == {path.name for path in sweep.folder.glob("rot*")}


def test_a_failed_job_is_named_and_tried_again(sweep: Sweep) -> None:
    status, out, err = sweep.call("seed=13,14,1")
    assert status == 1 and len(sweep.log) == 9
    assert sweep.states == ["done"] * 3 + ["failed"] * 6
    assert "3 of 9 jobs are done" in out
    assert "failed: moe=dense seed=13: PACS lacks the folder 'sketch'\n" in err
    assert "failed: moe=dense seed=14: ZeroDivisionError: a bug\n" in err
    assert "Traceback" in (next(sweep.folder.glob("*dense*seed14*")) / "failed.txt").read_text()
    (sweep.root / "mended").touch()
    status, _, err = sweep.call("seed=13,1")
    assert (status, err) == (0, "")
    assert [line.split()[-1] for line in sweep.log] == ["13"] * 3
    assert sweep.states == ["done"] * 6 + ["failed"] * 3


def test_the_plan_says_where_every_job_stands_and_starts_none(sweep: Sweep) -> None:
    status, out, _ = sweep.call("mode=plan")
    assert status == 0 and not sweep.folder.exists()
    assert "6 jobs: 6 missing" in out and "unknown until a first evaluation" in out
    sweep.call("seed=0,13")
    assert len(sweep.log) == 6
    _, out, _ = sweep.call("seed=0,13,2", "mode=plan")
    assert sweep.log == []
    assert "9 jobs: 3 done, 3 failed, 3 missing" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "moe=dense seed=0 done 501/501" in lines
    # 501 steps of 1 s and 11 evaluations of 30 s; of seed 13, 61 steps and 1 evaluation are done.
    assert "moe=dense seed=2 missing 0/501 14 min" in lines
    (failed,) = (line for line in lines if line.startswith("moe=dense seed=13 failed: PACS lacks"))
    assert failed.endswith("61/501 13 min")
    assert "Time left: about 79 min of work." in lines  # 3 x 831 s + 3 x 740 s = 78.6 min


def test_another_configuration_is_refused_with_the_differing_keys(sweep: Sweep) -> None:
    sweep.call()
    assert len(sweep.log) == 6
    status, _, err = sweep.call("task.steps=101", "task.optimizer.lr=0.1")
    assert status == 2 and sweep.log == []
    assert "task.optimizer.lr: 0.001 there, 0.1 now" in err and "Traceback" not in err
    assert "task.steps: 501 there, 101 now" in err and "name=FOLDER" in err
    assert sweep.call("name=elsewhere", "task.steps=101")[0] == 0 and len(sweep.log) == 6


@pytest.mark.parametrize("seeds", ["seed=2", "seed=0,1,2"])
def test_a_changed_file_is_refused_whatever_the_seeds(sweep: Sweep, seeds: str) -> None:
    sweep.rewrite("{seed: '0,1'}", "{seed: '0', task.steps: 61}")
    assert sweep.call()[0] == 0 and len(sweep.log) == 3
    sweep.rewrite("task.steps: 61", "task.steps: 31")
    status, _, err = sweep.call(seeds)
    assert status == 2 and sweep.log == [] and "task.steps: 61 there, 31 now" in err


def test_a_changed_option_of_a_setting_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    """What the plain command, which has moe=dynmoe, does not show."""
    options = tmp_path / "conf" / "moe"
    options.mkdir()
    (options / "mine.yaml").write_text("defaults: [topk, _self_]\naux_weight: 0.1\n")
    sweep.rewrite("moe: dense", "moe: mine")
    assert sweep.call("seed=0")[0] == 0 and len(sweep.log) == 3
    (options / "mine.yaml").write_text("defaults: [topk, _self_]\naux_weight: 0.2\n")
    status, _, err = sweep.call("seed=1")
    assert status == 2 and sweep.log == [] and "moe.aux_weight: 0.1 there, 0.2 now" in err


def test_seeds_environments_and_settings_may_join(sweep: Sweep) -> None:
    assert sweep.call("seed=0")[0] == 0 and len(sweep.log) == 3
    assert sweep.call("seed=5", "data.test_envs=[1]")[0] == 0 and len(sweep.log) == 3
    sweep.rewrite("'2,4'", "'8'")
    assert sweep.call("seed=0")[0] == 0 and sweep.log == ["topk 8 0"]


def test_a_damaged_manifest_is_named(sweep: Sweep) -> None:
    sweep.folder.mkdir(parents=True)
    for text in ("", "{", "[]", '{"sweep": "own"}'):
        (sweep.folder / "sweep.json").write_text(text)
        status, _, err = sweep.call("seed=0", "mode=plan")
        assert status == 2 and "sweep.json: expected what an earlier start" in err


def test_two_launchers_share_the_jobs(sweep: Sweep) -> None:
    processes = [sweep.start(nap=1.5) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert len(log := sweep.log) == len(set(log)) == 6, ends
    assert sweep.states == ["done"] * 6
    assert [process.returncode for process in processes] == [0, 0]


def test_a_killed_launcher_loses_one_job_at_most(sweep: Sweep) -> None:
    process = sweep.start(nap=2.0)
    deadline = time.monotonic() + 60
    while "done" not in sweep.states and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = sweep.log
    assert "done" in sweep.states and len(before) < 6
    assert sweep.call()[0] == 0 and sweep.states == ["done"] * 6
    # At most the job that was running is started twice.
    assert len(before) + len(sweep.log) <= 7


def test_a_key_that_the_sweep_sets_is_refused(sweep: Sweep) -> None:
    status, _, err = sweep.call("moe.top_k=2", "moe=gmoe")
    assert status == 2
    assert "moe.top_k: sweep=own sets it" in err and "moe: sweep=own sets it" in err


def test_every_setting_is_checked_before_any_work(sweep: Sweep) -> None:
    sweep.rewrite("moe.num_experts: '2,4', moe.top_k: 1", "moe.top_k: 9")
    status, _, err = sweep.call()
    assert status == 2 and "top_k (9) > num_experts (8)" in err and not sweep.folder.exists()


def test_every_combination_is_checked_before_any_work(sweep: Sweep) -> None:
    """Each value is right beside the first of the other; the last two are not."""
    sweep.rewrite("'2,4', moe.top_k: 1", "'4,2', moe.top_k: '1,3'")
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
        ("# @package _global_", "", "sweep: the file of this group has to begin with '# @packa"),
        ("moe: dense", "moe: 'den=se['", "cannot be read as key=value"),
        ("{moe: dense}", "{moe: dense", "own.yaml"),
        ("moe: dense", "task.steps: '${foo.bar}'", "foo"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    sweep = Sweep(tmp_path)
    sweep.rewrite(before, after)
    found = preflight(list(SWEEP[2:]), config_dir=str(tmp_path / "conf")).problems
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed=interval(0,1)"], "seed=interval(0,1): an interval is drawn from by a search"),
        (["sweep=smoke,topk_grid"], "sweep: one at a time, start them one after the other"),
        (["mode=plan,train"], "mode: one at a time, start them one after the other"),
        (["sweep=optuna", "mode=plan"], "mode: a search draws its jobs as it goes, there is no"),
    ],
)
def test_commands_that_mean_nothing_are_refused(texts: list[str], message: str) -> None:
    (found,) = preflight(["task=vit_domainbed", *texts], multirun=True).problems
    assert found.startswith(message)


def test_launchers_do_not_write_over_one_another(tmp_path: Path) -> None:
    """Each adds its jobs to sweep.json, as two processes do."""
    code = (
        "import sys; from pathlib import Path; from dynmoe.sweep import manifest;"
        "from dynmoe.sweep.manifest import Job; from dynmoe.records import RunFolder\n"
        "folder, who = Path(sys.argv[1]), sys.argv[2]\n"
        "for n in range(30):\n"
        "    job = Job((), f'{who}{n}', f'{who}{n}', RunFolder(folder / f'{who}{n}'), {}, 1, 1)\n"
        "    with manifest.locked(folder): manifest.write(folder, 'own', 'c', {}, [job])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    for process in [subprocess.Popen([*command, who]) for who in "ab"]:
        assert process.wait(timeout=60) == 0
    assert len(json.loads((tmp_path / "sweep.json").read_text())["jobs"]) == 60

"""The command line as a user meets it: exit status, messages, folders, and no torch on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe.records import RunFolder

SCRIPT = """
import sys
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from dynmoe.records import RunFolder
from dynmoe.errors import DataError
from dynmoe import cli

def refuse():
    raise DataError("data.root: no images")

def trainer_fit():  # lightning/pytorch/trainer/call.py
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)

def job(cfg):
    if cfg.seed == 13:
        raise DataError("data.root: PACS lacks the folder 'sketch'")
    if cfg.seed == 14:
        raise ZeroDivisionError("a bug")
    if cfg.seed == 15:
        instantiate({"_target_": "__main__.refuse"})
    if cfg.seed == 16:
        raise KeyboardInterrupt
    if cfg.seed == 17:
        trainer_fit()
    folder = HydraConfig.get().runtime.output_dir
    print("folder", folder, cfg.seed)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        RunFolder(folder).mark_done()

try:
    cli.run(job, prog="dynmoe-run")
finally:
    print("heavy", sorted({"torch", "lightning"} & set(sys.modules)))
"""
TASK = "task=vit_domainbed"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job_script.py"
    path.write_text(SCRIPT)
    return path


def call(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an empty folder of its own; nothing of it may load torch."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": paths, "DYNMOE_OUTPUTS": str(script.parent / "outputs")},
        timeout=60,
        check=False,
    )
    assert "heavy []" in done.stdout
    return done


def folders(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.split()[1] for line in done.stdout.splitlines() if line.startswith("folder ")}


def run_folders(script: Path) -> list[Path]:
    return list((script.parent / "outputs" / "vit_domainbed").glob("[!.]*/"))


def test_a_wrong_command_is_refused_whole_with_status_2(script: Path) -> None:
    done = call(script, TASK, "moe=topk", "moe.num_expert=3", "moe.top_k=9")
    assert done.returncode == 2
    assert done.stderr == (
        "dynmoe-run: 2 problems in the configuration\n"
        "  moe.num_expert: unknown key. Did you mean 'num_experts'?\n"
        "  moe: top_k (9) > num_experts (8): a token cannot choose more experts than exist. "
        "Lower moe.top_k or raise moe.num_experts.\n"
    )
    assert not (script.parent / "outputs").exists()


def test_one_command_has_one_folder_alone_or_in_a_sweep(script: Path) -> None:
    alone = call(script, TASK, "moe=topk", "moe.top_k=1", "seed=1")
    again = call(script, "seed=1", "++moe.top_k=1", TASK, "moe=topk", "overwrite=true")
    # top_k is no key of the default moe, which Hydra composes a sweep with as well
    sweep = call(script, "-m", TASK, "seed=0,1", "moe=topk,gmoe", "moe.top_k=1")
    assert (alone.returncode, again.returncode, sweep.returncode) == (0, 0, 0)
    assert folders(alone) == folders(again)
    assert folders(alone) < folders(sweep)
    assert len(folders(sweep)) == 4


def test_a_user_error_ends_a_single_run_with_its_message(script: Path) -> None:
    done = call(script, TASK, "seed=13")
    assert done.returncode == 2
    assert done.stderr == "dynmoe-run: data.root: PACS lacks the folder 'sketch'\n"
    assert run_folders(script) == []


def test_a_user_error_inside_of_instantiate_is_one(script: Path) -> None:
    done = call(script, TASK, "seed=15")
    assert (done.returncode, done.stderr) == (2, "dynmoe-run: data.root: no images\n")


@pytest.mark.parametrize("arguments", [["seed=16"], ["seed=17"], ["-m", "seed=16,1"]])
def test_ctrl_c_ends_the_command_in_one_line(script: Path, arguments: list[str]) -> None:
    done = call(script, *arguments, TASK)
    assert (done.returncode, done.stderr) == (
        130,
        "dynmoe-run: stopped. The same command goes on from the last evaluation.\n",
    )
    assert folders(done) == set()


def test_a_folder_with_anything_else_is_kept_whole(script: Path) -> None:
    (folder,) = map(Path, folders(call(script, TASK, "seed=1")))
    assert sorted(p.name for p in folder.iterdir()) == [".hydra", "run.log"]
    call(script, TASK, "seed=1", "mode=check")
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").touch()
    call(script, TASK, "seed=1", "mode=check")
    assert sorted(p.name for p in folder.iterdir()) == [".hydra", "mine.txt", "run.log"]


def test_a_folder_that_another_process_holds_is_kept(script: Path) -> None:
    (folder,) = map(Path, folders(call(script, TASK, "seed=1")))
    with RunFolder(folder).hold():
        call(script, TASK, "seed=1", "mode=check")
    assert sorted(p.name for p in folder.iterdir()) == [".hydra", "run.log"]


def test_a_user_error_ends_one_job_of_a_sweep_and_is_told_at_once(script: Path) -> None:
    done = call(script, "-m", TASK, "seed=13,15,1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[:2] == [
        "dynmoe-run: job 0 (task=vit_domainbed seed=13) failed: "
        "data.root: PACS lacks the folder 'sketch'",
        "dynmoe-run: job 1 (task=vit_domainbed seed=15) failed: data.root: no images",
    ]
    assert "1 of 3 jobs are done" in done.stdout
    failures = {RunFolder(path).failure for path in run_folders(script)}
    assert failures == {"data.root: PACS lacks the folder 'sketch'", "data.root: no images", ""}


def test_other_errors_keep_their_traceback(script: Path) -> None:
    done = call(script, TASK, "seed=14")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr


def test_help_lists_groups_and_needs_no_task(script: Path) -> None:
    done = call(script, "--help")
    assert done.returncode == 0
    assert "dynmoe-run task=TASK [group=option ...] [key=value ...]" in done.stdout
    assert (
        "  protocol    domainbed, domainbed_2020, glue, glue_heldout, gmoe, llava, swad\n"
        in done.stdout
    )
    assert " _base" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cfg", "job", "--resolve", TASK], "steps: 501"),
        (["--info", "defaults", TASK], "task/vit_domainbed"),
        (["--version"], "Hydra 1."),
    ],
)
def test_what_only_shows_goes_to_hydra(script: Path, arguments: list[str], expected: str) -> None:
    done = call(script, *arguments)
    assert done.returncode == 0
    assert expected in done.stdout

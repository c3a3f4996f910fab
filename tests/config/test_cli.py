"""The command line as a user meets it: exit status, messages, folders, and no torch on the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Done, command
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from dynmoe import cli
from dynmoe.errors import DataError
from dynmoe.process import GOES_ON
from dynmoe.records import RunFolder

TASK = "task=vit_domainbed"


def refuse() -> None:
    raise DataError("data.root: no images")


def trainer_fit() -> None:  # lightning/pytorch/trainer/call.py
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def job(cfg: DictConfig) -> None:
    match cfg.seed:
        case 13:
            raise DataError("data.root: PACS lacks the folder 'sketch'")
        case 14:
            raise ZeroDivisionError("a bug")
        case 15:
            instantiate({"_target_": f"{__name__}.refuse"})
        case 16:
            raise KeyboardInterrupt
        case 17:
            trainer_fit()
        case 18:
            raise OSError(errno.ENOSPC, "No space left on device", "/disk/last.ckpt")
    folder = HydraConfig.get().runtime.output_dir
    print("folder", folder, cfg.seed)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        RunFolder(folder).mark_done()


def call(root: Path, *arguments: str) -> Done:
    return command(job, root, *arguments)


def folders(root: Path, done: Done) -> set[Path]:
    printed = (line.split() for line in done.stdout.splitlines())
    return {root / words[1] for words in printed if words[:1] == ["folder"]}


def run_folders(root: Path) -> list[Path]:
    return list((root / "outputs" / "vit_domainbed").glob("[!.]*/"))


def test_a_wrong_command_is_refused_whole_with_status_2_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dynmoe import cli\n"
        "try: cli.run(print, prog='dynmoe-run')\n"
        "finally: print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, TASK, "moe=topk", "moe.num_expert=3", "moe.top_k=9"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    first, *rest = done.stderr.splitlines()
    assert first == "dynmoe-run: 2 problems in the configuration"
    assert rest[0] == "  moe.num_expert: unknown key. Did you mean 'num_experts'?"
    assert rest[1].startswith("  moe: top_k (9) > num_experts (8)") and len(rest) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_command_has_one_folder_alone_or_in_a_sweep(tmp_path: Path) -> None:
    alone = call(tmp_path, TASK, "moe=topk", "moe.top_k=1", "seed=1")
    again = call(tmp_path, "seed=1", "++moe.top_k=1", TASK, "moe=topk", "overwrite=true")
    # top_k is no key of the default moe, which Hydra composes a sweep with as well
    sweep = call(tmp_path, "-m", TASK, "seed=0,1", "moe=topk,gmoe", "moe.top_k=1")
    assert (alone.returncode, again.returncode, sweep.returncode) == (0, 0, 0)
    assert folders(tmp_path, alone) == folders(tmp_path, again)
    assert folders(tmp_path, alone) < folders(tmp_path, sweep)
    assert len(folders(tmp_path, sweep)) == 4


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (13, "data.root: PACS lacks the folder 'sketch'"),
        (15, "data.root: no images"),  # raised inside of Hydra's instantiate
        (18, f"/disk/last.ckpt: the disk is full. Make room on it. {GOES_ON}"),
    ],
)
def test_a_user_error_ends_a_single_run_with_its_message(
    tmp_path: Path, seed: int, message: str
) -> None:
    done = call(tmp_path, TASK, f"seed={seed}")
    assert (done.returncode, done.stderr) == (2, f"dynmoe-run: {message}\n")
    assert run_folders(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/runs/a: the disk is full. Make room"),
        (OSError(errno.EFBIG, "File too large", "/tmp/x"), "/tmp/x: the disk is full"),
        (
            OSError(errno.EROFS, "Read-only file system", "/runs/a/run.json"),
            "/runs/a/run.json: Rea",
        ),
        (
            FileNotFoundError(2, "No such file", "/runs/a/b.tmp"),
            "for the folder of the run is gone",
        ),
        (FileNotFoundError(2, "No such file", "/other/file"), None),  # a bug: with its traceback
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "data.workers=0"),
        (RuntimeError("shapes do not fit"), None),
    ],
)
def test_faults_of_the_machine_are_told_in_words(error: Exception, words: str | None) -> None:
    found = cli._disk_problem(error, Path("/runs/a")) or cli._lost_loader(error)
    if words is None:
        assert found is None
    else:
        assert words in str(found) and "same command goes on" in str(found)


@pytest.mark.parametrize("arguments", [["seed=16"], ["seed=17"], ["-m", "seed=16,1"]])
def test_ctrl_c_ends_the_command_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    done = call(tmp_path, *arguments, TASK)
    assert (done.returncode, done.stderr) == (
        130,
        "dynmoe-run: stopped. The same command goes on from the last evaluation.\n",
    )
    assert folders(tmp_path, done) == set()


def test_only_an_unused_folder_is_removed(tmp_path: Path) -> None:
    """Neither one that another process holds, nor one with anything but Hydra's files."""
    (folder,) = folders(tmp_path, call(tmp_path, TASK, "seed=1"))
    with RunFolder(folder).hold():
        call(tmp_path, TASK, "seed=1", "mode=check")
    assert sorted(p.name for p in folder.iterdir()) == [".hydra", "run.log"]
    call(tmp_path, TASK, "seed=1", "mode=check")
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").touch()
    call(tmp_path, TASK, "seed=1", "mode=check")
    assert sorted(p.name for p in folder.iterdir()) == [".hydra", "mine.txt", "run.log"]


@pytest.mark.parametrize("name", ["", ".hydra", ".hydra/hydra.yaml", "run.log"])
def test_a_folder_or_log_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (folder,) = folders(tmp_path, call(tmp_path, TASK, "seed=1"))
    place = folder / name
    if place.is_dir():
        shutil.rmtree(place)
        place.touch()
    else:
        place.unlink()
        place.mkdir()
    done = call(tmp_path, TASK, "seed=1")
    assert done.returncode == 2
    assert f"{place.relative_to(tmp_path)}: " in done.stderr
    assert GOES_ON in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_user_error_ends_one_job_of_a_sweep_and_is_printed_at_once(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", TASK, "seed=13,15,1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[:2] == [
        "dynmoe-run: job 0 (task=vit_domainbed seed=13) failed: "
        "data.root: PACS lacks the folder 'sketch'",
        "dynmoe-run: job 1 (task=vit_domainbed seed=15) failed: data.root: no images",
    ]
    assert "1 of 3 jobs are done" in done.stdout
    failures = {RunFolder(path).failure for path in run_folders(tmp_path)}
    assert failures == {"data.root: PACS lacks the folder 'sketch'", "data.root: no images", ""}


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    done = call(tmp_path, TASK, "seed=14")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr


def test_help_lists_groups_and_needs_no_task(tmp_path: Path) -> None:
    done = call(tmp_path, "--help")
    assert done.returncode == 0
    assert "dynmoe-run task=TASK [group=option ...] [key=value ...]" in done.stdout
    (protocols,) = (line for line in done.stdout.splitlines() if line.startswith("  protocol "))
    assert {"domainbed,", "glue,", "llava,"} < set(protocols.split())
    assert " _base" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cfg", "job", "--resolve", TASK], "steps: 501"),
        (["--info", "defaults", TASK], "task/vit_domainbed"),
        (["--version"], "dynmoe-run 0.1.0"),
    ],
)
def test_what_only_shows(tmp_path: Path, arguments: list[str], expected: str) -> None:
    # A process of its own: Hydra prints by a logger, which jobs of this process have set up.
    command = [sys.executable, "-m", "runners.run", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert expected in done.stdout

"""Who trains with whom, by the variables that Slurm and Lightning set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynmoe import ranks
from dynmoe.errors import UserError

BATCH = {"NTASKS": "2", "PROCID": "0", "JOB_NAME": "train", "JOB_ID": "7"}
OTHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR")
STEP = {**BATCH, "STEP_ID": "0", "STEP_NUM_TASKS": "2"}


def slurm(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith(OTHERS)]:
        patch.delenv(name)
    for name, value in variables.items():
        patch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, None),
        (BATCH, 1),  # a batch script is one process
        (STEP, 2),
        ({**STEP, "STEP_NUM_TASKS": "1"}, 1),  # srun -n1 in a job of two tasks
        ({**BATCH, "PROCID": "1"}, 2),
        ({**BATCH, "JOB_NAME": "interactive"}, None),  # a shell of salloc: Lightning may start some
        ({**STEP, "JOB_NAME": "bash", "STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
        ({**STEP, "JOB_NAME": "interactive"}, 2),
    ],
)
def test_tasks_of_slurm(
    variables: dict[str, str], tasks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch, variables)
    assert ranks.tasks() == tasks


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"NTASKS": ""}, "SLURM_NTASKS: .* found ''"),
        ({"NTASKS": "two"}, "SLURM_NTASKS: .* found 'two'"),
        ({**STEP, "STEP_NUM_TASKS": "-1"}, "SLURM_STEP_NUM_TASKS: .* found '-1'"),
        ({"NTASKS": "2", "STEP_ID": "0"}, "SLURM_PROCID: .* found none"),
    ],
)
def test_variables_by_hand_are_refused(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch, variables)
    with pytest.raises(UserError, match=f"^{name}.*unset"):
        ranks.rank()


def test_torchrun_starts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, STEP)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert ranks.tasks() is None


def test_the_rank_is_slurms_or_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, {**STEP, "PROCID": "1"})
    assert ranks.rank() == 1
    slurm(monkeypatch, BATCH)
    assert ranks.rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.rank() == 3


def test_other_nodes_are_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, {})
    for name, value in {"NODE_RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank() == 0  # of something else: Lightning trains here alone
    monkeypatch.setenv("MASTER_ADDR", "first")
    assert ranks.rank() > 0
    monkeypatch.delenv("LOCAL_RANK")  # Lightning starts the other processes of the node later
    assert ranks.rank() > 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "4")
    assert ranks.rank() == 4
    monkeypatch.setenv("RANK", "")
    with pytest.raises(UserError, match=r"^RANK: .*unset it$"):
        ranks.rank()


def test_the_others_do_as_the_first_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    slurm(monkeypatch, STEP)
    for word, trains in ((ranks.TRAIN, True), (ranks.LEAVE, False)):
        ranks.tell_others(run, word)
        assert ranks.told_to_train(run) is trains
    # The word of an earlier start is none.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="task 0"):
        ranks.told_to_train(run, patience=0.01)


def test_the_others_wait_with_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it says that it waits: then its last word is an old one."""
    run, said = tmp_path / "run", [ranks.WAIT, ranks.WAIT, ranks.WAIT, ranks.TRAIN]
    slurm(monkeypatch, STEP)
    now = [0.0]
    monkeypatch.setattr(ranks.time, "monotonic", lambda: now[0])

    def sleep(_: float) -> None:
        now[0] += 8
        if said:
            ranks.tell_others(run, said.pop(0))
            os.utime(next(tmp_path.glob("run.*.start")), (now[0], now[0]))

    monkeypatch.setattr(ranks.time, "sleep", sleep)
    assert ranks.told_to_train(run, patience=10) and now == [32.0]
    ranks.tell_others(run, ranks.WAIT)
    with pytest.raises(UserError, match="task 0"):
        ranks.told_to_train(run, patience=10)


def test_two_jobs_of_one_run_do_not_hear_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    slurm(monkeypatch, {**STEP, "JOB_ID": "1"})
    ranks.tell_others(run, ranks.TRAIN)
    slurm(monkeypatch, {**STEP, "JOB_ID": "2"})
    ranks.tell_others(run, ranks.LEAVE)  # it has found the folder held
    slurm(monkeypatch, {**STEP, "JOB_ID": "1"})
    assert ranks.told_to_train(run)  # a late process of the first job


def test_words_are_removed_after_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "run.of_another_name"
    slurm(monkeypatch, {**STEP, "JOB_ID": "1"})
    ranks.tell_others(run, ranks.LEAVE)
    ranks.tell_others(other, ranks.LEAVE)
    (old,) = tmp_path.glob("run.1.*")
    os.utime(old, (0, 0))
    slurm(monkeypatch, {**STEP, "JOB_ID": "2"})
    ranks.tell_others(run, ranks.TRAIN)
    assert len([*tmp_path.glob("run.*")]) == 2
    ranks.all_have_heard(run)
    assert [file.name for file in tmp_path.iterdir()] == ["run.of_another_name.1.0.0.start"]


def test_processes_that_lightning_starts_need_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch, {})
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks.tell_others(tmp_path / "run", ranks.TRAIN)
    assert not any(tmp_path.iterdir()) and ranks.told_to_train(tmp_path / "run")

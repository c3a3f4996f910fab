"""The installed commands: a run that is killed goes on, and evaluation repeats its numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import NO_DROPOUT, TINY, TINY_DYNMOE
from tiny_texts import FEW_EXPERTS, TINY_TEXT, write_rte

from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.training import evaluate

LONGER = (*TINY_DYNMOE, "task.steps=41", "task.eval_every=10")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*overrides: str, module: str = "runners.run") -> list[str]:
    return [sys.executable, "-m", module, *overrides]


def dynmoe_run(outputs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*overrides, f"paths.outputs={outputs}"),
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
    )


def only_run(outputs: Path, name: str = "vit_domainbed") -> RunFolder:
    (folder,) = outputs.glob(f"{name}/[!.]*")
    return RunFolder(folder)


def stable(folder: RunFolder) -> list[dict[str, Any]]:
    dropped = ("step_time", "eval_time", "mem_gb", "args")
    return [
        {k: v for k, v in record.items() if k not in dropped}
        for kind in ("results", "routing", "events")
        for record in folder.read(kind)
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_is_evaluated_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = dynmoe_run(tmp_path / "straight", *LONGER)
    assert done.returncode == 0, done.stderr
    straight = only_run(tmp_path / "straight")

    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(*LONGER, f"paths.outputs={broken}"), env=ENV, stdout=subprocess.DEVNULL
    )
    for _ in range(1200):  # until the second evaluation; then at once, wherever it is
        files = list(broken.glob("vit_domainbed/*/results.jsonl"))
        if files and files[0].read_text().count("\n") >= 2:
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not only_run(broken).is_done

    again = dynmoe_run(broken, *LONGER)
    assert again.returncode == 0, again.stderr
    assert stable(only_run(broken)) == stable(straight)

    before = (only_run(broken).path / "results.jsonl").stat().st_mtime_ns
    third = dynmoe_run(broken, *LONGER)
    assert third.returncode == 0 and "0/in" in third.stdout
    assert (only_run(broken).path / "results.jsonl").stat().st_mtime_ns == before

    for name in ("selected", "last"):
        _, folder, checkpoint, cfg = evaluate.parse([f"run={straight.path}", f"checkpoint={name}"])
        scores = evaluate.evaluate(folder, checkpoint, cfg)
        (recorded,) = [r for r in straight.read("results") if r["step"] == _step(checkpoint)]
        assert scores == recorded["scores"]
    assert "recorded" in capsys.readouterr().out


def _step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"]) - 1


@pytest.mark.slow
def test_two_processes_give_the_records_of_one(tmp_path: Path) -> None:
    """Data-parallel over two CPU processes: same splits, batches, and decisions on experts.

    Checkpoints between evaluations, of the two alone, change no mean loss.
    """
    options = (*TINY_DYNMOE, *NO_DROPOUT)
    one = dynmoe_run(tmp_path / "one", *options)
    two = dynmoe_run(
        tmp_path / "two",
        *(*options, "trainer=ddp", "trainer.accelerator=cpu", "overwrite=true"),
        "+task.save_every=1",
    )
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    single, double = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    assert double.read("events") == single.read("events") and double.is_done
    for a, b in zip(double.read("results"), single.read("results"), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["aux_loss"] == pytest.approx(b["aux_loss"], rel=1e-3)
        for key in (k for k in a if k.endswith("_acc")):
            assert a[key] == pytest.approx(b[key], abs=0.02)


@pytest.mark.slow
def test_two_processes_give_the_records_of_one_on_texts(tmp_path: Path) -> None:
    """22 examples in batches of 8: the last batch of an epoch is smaller."""
    root = write_rte(tmp_path / "glue")
    dropouts = "hidden_dropout_prob: 0, attention_probs_dropout_prob: 0"
    tiny = [text.replace("{", f"{{{dropouts}, ") for text in TINY_TEXT]
    options = (*tiny, *FEW_EXPERTS, "data=rte", f"data.root={root}")
    one = dynmoe_run(tmp_path / "one", *options)
    two = dynmoe_run(tmp_path / "two", *options, "trainer=ddp", "trainer.accelerator=cpu")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    single, double = (only_run(tmp_path / each, "glue") for each in ("one", "two"))
    assert double.read("events") == single.read("events") and double.is_done
    assert len(double.read("results")) == 2
    for a, b in zip(double.read("results"), single.read("results"), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        dev, expected = a["scores"]["dev"], b["scores"]["dev"]
        assert dev["score"] == pytest.approx(expected["score"], abs=0.11)  # one of ten
        assert dev["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_mix_data_as_one(tmp_path: Path) -> None:
    """Loads and losses of probes are summed, and the batches of the new weights divided."""
    mixing = ("mixing=dynamic", "mixing.every=2", "mixing.probe_tokens=40", "mixing.eta=50")
    options = (*TINY_DYNMOE, *NO_DROPOUT, *mixing)
    one = dynmoe_run(tmp_path / "one", *options)
    two = dynmoe_run(tmp_path / "two", *options, "trainer=ddp", "trainer.accelerator=cpu")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    single, double = (only_run(tmp_path / each).read("mixing") for each in ("one", "two"))
    assert [each["step"] for each in double] == [1, 3, 5, 7, 8]
    assert double[0]["load"] == single[0]["load"]
    for a, b in zip(double, single, strict=True):
        assert a["weights"] == pytest.approx(b["weights"], abs=0.02)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    losses = [
        [each["loss"] for each in only_run(tmp_path / n).read("results")] for n in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_evaluation_on_data_that_moved(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28))
    for env in ("a", "b"):
        for label in ("x", "y"):
            folder = tmp_path / "here" / env / label
            folder.mkdir(parents=True)
            for i in range(10):
                image.rotate(i * 9 + 90 * (label == "y")).save(folder / f"{i}.png")
    options = (
        "task=vit_domainbed",
        "data=image_folder",
        "backbone=vit_digits",
        "data.batch_size=8",
    )
    done = dynmoe_run(tmp_path, *options, f"data.root={tmp_path}/here", "trainer=smoke")
    assert done.returncode == 0, done.stderr
    (tmp_path / "here").rename(tmp_path / "there")
    path = only_run(tmp_path).path
    _, folder, checkpoint, cfg = evaluate.parse([f"run={path}", f"data.root={tmp_path}/there"])
    scores = evaluate.evaluate(folder, checkpoint, cfg)
    (recorded,) = [r for r in folder.read("results") if r["step"] == _step(checkpoint)]
    assert scores == recorded["scores"]


@pytest.mark.slow
def test_a_sweep_runs_every_job_in_its_own_folder(tmp_path: Path) -> None:
    sweep = dynmoe_run(tmp_path, "-m", *TINY, "task.steps=3", "moe=dense,topk")
    assert sweep.returncode == 0, sweep.stderr
    runs = [RunFolder(path) for path in tmp_path.glob("vit_domainbed/*_seed0_*")]
    assert sorted(run.read_run()["moe"] for run in runs) == ["dense", "topk"]
    assert all(run.is_done for run in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run=FOLDER is missing"),
        (["run=/nowhere"], "expected a folder with a config.yaml"),
        (["run=x", "chekpoint=last"], "chekpoint=last: unknown argument, expected run="),
    ],
)
def test_wrong_evaluation_commands(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.parse(arguments)

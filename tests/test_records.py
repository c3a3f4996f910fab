"""A run folder gives back what was written, survives a kill, and reads as DomainBed reads it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from dynmoe.errors import UserError
from dynmoe.records import TRAINED, VOCABULARY, Held, Kind, RecordError, RunFolder, Seal


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "vit_digits" / "run")


def test_records_come_back_in_order_and_by_kind(folder: RunFolder) -> None:
    folder.append("results", {"step": 0, "loss": 1.5})
    folder.append("results", {"step": 10, "loss": 0.5})
    folder.append("routing", {"step": 0, "layer": "a"}, {"step": 0, "layer": "b"})
    assert folder.read("results") == [{"step": 0, "loss": 1.5}, {"step": 10, "loss": 0.5}]
    assert [line["layer"] for line in folder.read("routing")] == ["a", "b"]
    assert folder.read("events") == []


def test_lines_are_as_domainbed_writes_and_reads_them(folder: RunFolder) -> None:
    folder.append("results", {"step": 0, "env0_in_acc": 0.5, "args": {"b": 1, "a": [0]}})
    lines = (folder.path / "results.jsonl").read_text().splitlines(keepends=True)
    assert lines == ['{"args": {"a": [0], "b": 1}, "env0_in_acc": 0.5, "step": 0}\n']
    assert json.loads(lines[0][:-1])["step"] == 0


def only_json(text: str) -> Any:
    """NaN and Infinity are no JSON, although Python reads them."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_files_are_json_whatever_was_measured(folder: RunFolder, number: float) -> None:
    for kind in get_args(Kind):
        folder.append(kind, {"step": 0, "loss": number, "scores": {"dev": {"f1": number, "n": 1}}})
        (line,) = (folder.path / f"{kind}.jsonl").read_text().splitlines()
        assert only_json(line) == {"step": 0, "loss": None, "scores": {"dev": {"f1": None, "n": 1}}}
    (result,) = folder.read("results")
    assert math.isnan(result["loss"]) and math.isnan(result["scores"]["dev"]["f1"])
    folder.write_run({"costs": [{"flops": number}]})
    folder.add_facts(nonfinite_step=3)
    facts = only_json((folder.path / "run.json").read_text())
    assert facts == {"costs": [{"flops": None}], "nonfinite_step": 3}


def test_a_line_cut_short_is_ignored_and_taken_away_on_resume(folder: RunFolder) -> None:
    folder.append("results", {"step": 0}, {"step": 10})
    with (folder.path / "results.jsonl").open("a") as file:
        file.write('{"loss": 0.')
    assert [record["step"] for record in folder.read("results")] == [0, 10]
    folder.truncate_after(10)
    folder.append("results", {"step": 20})
    assert [record["step"] for record in folder.read("results")] == [0, 10, 20]


def test_truncate_drops_later_records_of_every_kind(folder: RunFolder) -> None:
    for kind in get_args(Kind):
        folder.append(kind, *({"step": step} for step in (0, 10, 20)))
    folder.truncate_after(10)
    for kind in get_args(Kind):
        assert folder.read(kind) == [{"step": 0}, {"step": 10}]
    folder.truncate_after(-1)
    assert folder.read("results") == []
    assert sorted(path.suffix for path in folder.path.iterdir()) == [".jsonl"] * len(get_args(Kind))


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"loss": 1.0}'])
def test_a_damaged_line_is_named(folder: RunFolder, line: str) -> None:
    folder.append("events", {"step": 0})
    with (folder.path / "events.jsonl").open("a") as file:
        file.write(line + "\n")
    message = f"events.jsonl, line 2: expected a JSON object with a step, found {line!r}"
    with pytest.raises(UserError, match=re.escape(message)):
        folder.read("events")


def test_run_facts_and_done(folder: RunFolder) -> None:
    with pytest.raises(UserError, match=r"found no run\.json in it"):
        folder.read_run()
    folder.write_run({"name": "vit_digits", "seed": 3})
    assert folder.read_run() == {"name": "vit_digits", "seed": 3}
    assert not folder.is_done
    folder.mark_done()
    assert folder.is_done


def test_damaged_run_facts_are_named(folder: RunFolder) -> None:
    folder.write_run({})
    (folder.path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: expected JSON, found damage"):
        folder.read_run()
    (folder.path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json: expected a JSON object, found '\[\]'"):
        folder.read_run()


def test_a_kill_at_any_byte_loses_nothing_earlier(folder: RunFolder) -> None:
    """Whatever is left of the file: all whole lines are read, a cut one is reported and ignored."""
    records = [{"name": "Größe", "step": 0}, {"loss": 0.5, "step": 10}, {"step": 20}]
    folder.append("results", *records)
    file = folder.path / "results.jsonl"
    whole = file.read_bytes()
    for length in range(len(whole), -1, -1):
        file.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert folder.read("results") == records[:lines]
        torn = length > 0 and whole[length - 1 : length] != b"\n"
        assert folder.torn == ([file] if torn else [])


def test_a_kill_at_any_byte_does_not_stop_the_next_start(folder: RunFolder) -> None:
    folder.append("results", {"step": 0}, {"step": 10})
    file = folder.path / "results.jsonl"
    whole = file.read_bytes()
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        folder.truncate_after(0)  # resumes from the checkpoint of step 0, or from none
        folder.append("results", {"step": 10})
        steps = [record["step"] for record in folder.read("results")]
        assert steps == ([0, 10] if whole[:length].count(b"\n") else [10])


def test_a_damaged_file_leaves_the_others_as_they_are(folder: RunFolder) -> None:
    for kind in get_args(Kind):
        folder.append(kind, *({"step": step} for step in (0, 10)))
        before = {file: file.read_bytes() for file in folder.path.iterdir()}
        damaged = folder.path / f"{kind}.jsonl"
        damaged.write_text('{"step": null}\n')
        with pytest.raises(RecordError, match=rf"{kind}\.jsonl, line 1"):
            folder.truncate_after(0)
        others = {file: content for file, content in before.items() if file != damaged}
        assert {file: file.read_bytes() for file in others} == others
        damaged.write_bytes(before[damaged])


def test_every_changed_file_of_a_finished_run_is_found(folder: RunFolder) -> None:
    folder.write_run({"seed": 0})
    (folder.path / "config.yaml").write_text("seed: 0\n")
    (folder.path / VOCABULARY).write_text("{}\n")
    for kind in TRAINED:
        folder.append(kind, {"step": 0})
    files = [file for file in folder.path.iterdir() if file.is_file()]
    folder.mark_done()
    folder.check_finished()
    assert len(files) == 3 + len(TRAINED)
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(b"")
        with pytest.raises(RecordError, match=file.name):
            folder.check_finished()
        file.unlink()
        with pytest.raises(RecordError, match=file.name):
            folder.check_finished()
        file.write_bytes(whole)
    folder.check_finished()


def test_states_of_a_run(folder: RunFolder) -> None:
    assert folder.state == "missing"
    with folder.hold():
        assert RunFolder(folder.path).state == "running"
    folder.write_run({})
    assert folder.state == "stopped"
    folder.mark_failed("DataError: no images\nmore", "Traceback ...")
    assert (folder.state, folder.failure) == ("failed", "DataError: no images")
    folder.forget_failure()
    assert (folder.state, folder.failure) == ("stopped", "")
    folder.mark_done()
    assert folder.state == "done"


def test_a_folder_is_held_by_one_and_free_again_after(folder: RunFolder) -> None:
    for _ in range(2):
        refused = pytest.raises(Held, match="another process is running")
        with folder.hold(), refused, RunFolder(folder.path).hold(wait=0):
            pass


@pytest.mark.parametrize("harm", ["line lost", "digit", "gone", "facts"])
def test_a_finished_run_that_has_changed_is_told(folder: RunFolder, harm: str) -> None:
    folder.write_run({"seed": 1})
    folder.append("results", {"step": 0, "loss": 0.5}, {"step": 10, "loss": 0.25})
    folder.mark_done()
    assert len(folder.read("results")) == 2 and folder.read_run() == {"seed": 1}
    file = folder.path / ("run.json" if harm == "facts" else "results.jsonl")
    text = file.read_text()
    if harm == "gone":
        file.unlink()
    else:
        changed = {"line lost": text[: text.index("\n") + 1], "digit": text.replace("0.5", "0.6")}
        file.write_text(changed.get(harm, text.replace("1", "2")))
    read = folder.read_run if harm == "facts" else lambda: folder.read("results")
    with pytest.raises(UserError, match=rf"{file.name}: is not as it was .*overwrite=true") as told:
        read()
    assert f"echo > {folder.path / 'done'}" in str(told.value)
    (folder.path / "done").write_text("\n")  # what that command does
    read()
    assert folder.is_done


def test_evaluations_add_to_a_finished_run(folder: RunFolder) -> None:
    folder.append("results", {"step": 0})
    folder.mark_done()
    folder.append("budget", {"step": 0})
    assert len(folder.read("budget")) == 1 and len(folder.read("results")) == 1


def test_a_seal_is_of_the_records_up_to_a_step(folder: RunFolder) -> None:
    """However they were written: at once, line by line, with later lines or a part of one."""
    lines = [{"step": 0}, {"step": 3}, {"step": 3, "layer": "b"}, {"step": 7}]
    growing, seals = Seal(folder), []
    for line in lines:
        folder.append("routing", line)
        seals.append(growing.at(line["step"]))
    assert len({repr(seal) for seal in seals}) == 4
    assert Seal(folder).at(3) == seals[2] and Seal(folder).at(6) == seals[2]
    with (folder.path / "routing.jsonl").open("a") as file:
        file.write('{"step": 7')
    assert Seal(folder).at(7) == growing.at(7) == seals[3]
    folder.replace("routing", *lines[1:])
    assert Seal(folder).at(3) != seals[2]


def test_a_folder_that_is_removed_in_mid_run_is_told(folder: RunFolder) -> None:
    folder.write_run({})
    folder.check_there()
    shutil.rmtree(folder.path)
    with pytest.raises(UserError, match="was removed while the run was writing"):
        folder.check_there()

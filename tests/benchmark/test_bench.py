"""`dynmoe-bench layer` at a tiny size: what it writes, what it compares, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Refused, Run

from dynmoe.benchmark.cases import LAYER_CASES
from dynmoe.benchmark.options import GPU_PARTS
from dynmoe.benchmark.results import load_note, noise
from dynmoe.benchmark.rivals import HF
from dynmoe.layers import Experts

pytestmark = pytest.mark.usefixtures("short_samples")

ROOT = Path(__file__).parents[2]
TINY = ["layer", "--shape", "64,16,32,4", "--device", "cpu", "--malloc", "system"]
TINY += ["--threads", "1", "--rounds", "2"]


def test_measures_all_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    run(*TINY, "--k", "1", "1.5")
    (file,) = Path("outputs/bench").glob("layer-*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    assert content["command"].startswith("dynmoe-bench layer --shape 64,16,32,4")
    assert content["machine"]["threads"] == 1
    assert content["settings"]["malloc"] == "system"
    assert content["load_average"].keys() == {"before", "after"}
    rows = content["rows"]
    cases = {k: [row["case"] for row in rows if row["k"] == k] for k in (1, 1.5)}
    assert cases[1] == [case for case in LAYER_CASES if case not in HF]
    assert cases[1.5] == [case for case in cases[1] if "top_k" not in case]
    for row in rows:
        assert row["mean_k"] == pytest.approx(row["k"], rel=0.2), row  # later draws fluctuate
        numbers = [row[key] for key in ("median_ms", "ratio", "gflops", "kept_ratio")]
        numbers += [*row["quartiles_ms"], *row["ratio_quartiles"]]
        numbers += [row["kept_bytes"], row["peak_bytes"], row["rounds"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert (row["router_share"] is not None) == (row["case"] == "layer")
    limit = rows[0]
    assert limit["ratio"] == limit["kept_ratio"] == 1
    pairs = round(64 * limit["mean_k"])
    assert limit["kept_bytes"] == 4 * pairs * (16 + 2 * 32)  # x, pre-activation, activation

    shown = capsys.readouterr().out
    assert all(case in shown for case in cases[1])
    assert "load average" in shown and "Summary" in shown and str(file) in shown


def test_a_busy_machine_is_reported() -> None:
    assert load_note(0.5, 2.1, 2) == "load average of a minute 0.5 before, 2.1 after, on 2 cores"
    assert "WARNING: the machine was busy" in load_note(0.6, 2.1, 2)


def test_one_round_has_no_spread_to_judge_by() -> None:
    assert noise((1.0, 3.0), (2.0, 4.0)) == "within noise"
    assert noise((1.0, 2.0), (3.0, 4.0)) == ""
    assert noise((1.0, 1.0), (3.0, 4.0)) == noise((1.0, 2.0), (3.0, 3.0)) == "no spread to judge by"


def test_compares_with_a_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run, refused: Refused
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "deeper" / "new.json"
    few = [*TINY, "--k", "1", "--only", "experts"]
    run(*few, "--json", str(old))
    content = json.loads(old.read_text())
    limit, experts = content["rows"]
    experts.update(ratio=1000.0, ratio_quartiles=[999.0, 1001.0])
    limit.update(quartiles_ms=[0.0, 1e9])
    old.write_text(json.dumps(content))
    capsys.readouterr()

    run(*few, "--json", str(new), "--baseline", str(old))
    lines = capsys.readouterr().out.split("Against the baseline")[1].splitlines()
    assert any("limit" in line and "ms" in line and "within noise" in line for line in lines)
    (line,) = (line for line in lines if "experts" in line)
    assert "1000.000" in line and "-99." in line.replace("-100.0", "-99.") and "within" not in line

    content["machine"]["threads"] = 77
    old.write_text(json.dumps(content))
    assert "threads (77, now 1)" in refused(*few, "--json", str(new), "--baseline", str(old))


@pytest.mark.slow
def test_times_another_build_beside_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    """A copy of this one, which says by a case's result whose code it ran."""
    file, folder = tmp_path / "new.json", tmp_path / "build"
    for part in ("dynmoe", "conf"):
        shutil.copytree(ROOT / part, folder / part)
    (folder / "dynmoe" / "__init__.py").write_text('__version__ = "0.0.7"')
    run(*TINY, "--k", "1", "2", "--only", "layer", "--against", str(folder), "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["limit", "layer"] * 2
    for row in rows:
        assert row["against_ratio"] > 0 and len(row["against_quartiles"]) == 2
    shown = capsys.readouterr().out
    assert "x other" in shown and f"dynmoe 0.0.7 in {folder}" in shown.replace("\n", "")

    (folder / "dynmoe" / "layers" / "__init__.py").write_text("")
    with pytest.raises(SystemExit):
        run(*TINY, "--against", str(folder), "--json", str(file))
    assert "this benchmark does not run with it: ImportError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "limt"], "--only limt: unknown case, expected some of 'limit', 'layer'"),
        (["--k", "5"], "--k 5: expected a mean number of experts per token above 0"),
        (["--k", "0"], "up to 4, the experts of shape 64,16,32,4"),
        (["--k", "nan"], "--k nan: expected a mean number"),
        (["--shape", "64,16,32"], "--shape 64,16,32: expected a, b, c, d, e, short or tokens,dim"),
        (["--shape", "64,16,32,-4"], "in positive integers"),
        (["--rounds", "0"], "expected a whole number of 1 or more"),
        (["--baseline", "gone.json"], "--baseline gone.json: there is no such file"),
        (["--baseline", "broken.json"], "--baseline broken.json: expected a file that"),
        (["--json", "broken.json/new.json"], "--json broken.json/new.json: cannot be written"),
        (["--against", "."], "--against .: expected a folder that holds dynmoe/"),
        (["--json", "."], "--json .: expected a file to write, this is a folder"),
    ],
)
def test_refuses_before_work(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Refused,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"machine": {}}')
    assert message in refused(*TINY, *arguments)
    assert not Path("outputs").exists()


def test_help_names_the_cases(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    with pytest.raises(SystemExit) as stop:
        run("layer", "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(case in shown for case in LAYER_CASES)


@pytest.mark.slow
def test_gpu_tiny_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    run("gpu", "--smoke", "--out", str(tmp_path))
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert files.keys() == {"check", *GPU_PARTS}
    for row in files["check"]["rows"]:
        assert row["path"] == "a loop" and 0 < row["values"] < 0.02 and 0 < row["gradients"] < 0.02
    for name in ("mlp", "gated"):
        rows = files[f"layer-{name}"]["rows"]
        assert {row["ffn"] for row in rows} == {name} and {row["k"] for row in rows} == {2}
        assert ("hf grouped_mm" in {row["case"] for row in rows}) == (name == "gated")
    assert [row["case"] for row in files["step"]["rows"]] == ["dense", "dynmoe 1.5"]
    assert {row["precision"] for row in files["step"]["rows"]} == {"bf16-mixed"}


def test_gpu_stops_where_the_experts_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    forward = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda *given: 1.1 * forward(*given))
    assert "mlp experts by a loop: the relative error of values is" in refused(
        "gpu", "--smoke", "--out", str(tmp_path)
    )
    assert [file.stem for file in tmp_path.iterdir()] == ["check"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_needs_one(tmp_path: Path, refused: Refused) -> None:
    assert "--smoke" in refused("gpu", "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()

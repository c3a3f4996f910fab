"""`dynmoe-report` from its arguments to its files and its messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import save_nothing, write_run, write_sweep

from dynmoe.report import document
from dynmoe.report.runs import read_runs
from runners.report import main


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    names = ("dense", "top-1 of 2", "DynMoE")
    return write_sweep(tmp_path / "small", {name: {"0": [0.5, 0.6]} for name in names})


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_report_of_a_sweep_is_light(sweep: Path) -> None:
    """It needs neither PyTorch nor pyplot, nor all of SciPy's distributions."""
    failed = write_run(sweep, "top-1 of 2", seed=2, state="failed")
    code = (
        "import re, sys, dynmoe.report.figures, dynmoe.report.summary, dynmoe.report.tables;"
        "from runners.report import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'hydra', 'matplotlib.pyplot', 'scipy.stats'};"
        "print(heavy & set(sys.modules));"
        # NOTE: getrusage would say how large the process was that started this one.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1];"
        "print(int(peak) < 250 * 1024)"
    )
    command = [sys.executable, "-c", code, str(sweep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    out = done.stdout
    assert out.startswith("DynMoE on RotatedDigits, test environment 0: 0.0 points from")
    assert f"Without a result:\n  {failed.path.name}: failed, DataError: no such folder" in out
    report = sweep / "report"
    assert out.endswith(f"\n6 runs reported:\n{report / 'report.html'}\nset()\nTrue\n")
    assert done.stderr == ""
    assert {"report.html", "report.md", "tables", "figures"} == {f.name for f in report.iterdir()}
    assert not read_runs([sweep]).warnings  # its own output is no run


def test_out_and_several_folders(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "save", save_nothing)
    write_sweep(tmp_path / "more", {"DynMoE-tutel": {"0": [0.5]}})
    main([str(sweep), str(tmp_path / "more"), "--out", str(tmp_path / "page")])
    assert "DynMoE-tutel" in (tmp_path / "page" / "report.md").read_text()
    assert not (sweep / "report").exists()


def test_two_runs_are_compared(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(run.folder.path) for run in read_runs([sweep]).runs[:2])
    main([a, b])
    out = capsys.readouterr().out
    assert "A is dense" in out and "Configuration" in out
    assert not (Path(a) / "report").exists()


def test_a_run_is_compared_with_its_repeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = (write_run(tmp_path / name, "dense").path for name in ("old", "new"))
    facts = json.loads((again / "run.json").read_text())
    facts["versions"]["torch"] = "2.12.0"
    (again / "run.json").write_text(json.dumps(facts))
    main([str(first), str(again)])
    out = capsys.readouterr().out
    assert "B is level with A" in out and "torch (2.11.0; 2.12.0)" in out.replace("\n", " ")


def test_domainbeds_own_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "dense", 0.25)
    main(["--domainbed", str(tmp_path)])
    assert "25.0 +/- 0.0" in capsys.readouterr().out
    assert (tmp_path / "results.tex").exists()


def test_what_cannot_be_reported_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{tmp_path / 'none'}: expected the folder" in refused([str(tmp_path / "none")], capsys)
    assert "found no run.json" in refused([str(tmp_path)], capsys)
    assert "expected FOLDER" in refused([], capsys)
    assert "unrecognized arguments: --foo" in refused(["--foo"], capsys)
    run = write_run(tmp_path, state="failed").path
    message = refused([str(tmp_path)], capsys)
    assert message == (
        f"dynmoe-report: {tmp_path}: expected a finished run, found none\n"
        f"  {run.name}: failed, DataError: no such folder\n"
    )
    other = write_run(tmp_path, seed=1).path
    assert f"{run}: expected a finished run, found none" in refused([str(run), str(other)], capsys)
    assert "expected two runs, found the same one twice" in refused([str(other)] * 2, capsys)
    for arguments in (["--domainbed", str(tmp_path)], [str(run), str(other)]):
        message = refused([*arguments, "--out", str(tmp_path / "page")], capsys)
        assert "--out: expected with a report of sweeps, found with " in message

"""The version that commands print and run.json records."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dynmoe
from dynmoe import version


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "code.py").write_text("1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "tests: begin"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path


def test_the_commit_of_a_clone(clone: Path) -> None:
    head = (clone / ".git" / "refs" / "heads").glob("*")
    commit = next(head).read_text()[:12]
    assert version._commit_of_clone(clone) == commit
    (clone / "outputs").write_text("no part of the code")
    assert version._commit_of_clone(clone) == commit
    (clone / "code.py").write_text("2\n")
    assert version._commit_of_clone(clone) == f"{commit}.changed"


def test_no_clone_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert version._commit_of_clone(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert version._commit_of_clone(tmp_path) is None  # an empty repository
    monkeypatch.setenv("PATH", "")
    assert version._commit_of_clone(tmp_path) is None


@pytest.mark.parametrize(
    ("note", "commit"),
    [
        (
            '{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}',
            "0123456789ab",
        ),
        ('{"url": "file:///x", "dir_info": {"editable": true}}', None),
        (None, None),
    ],
)
def test_the_commit_that_pip_noted(
    note: str | None, commit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted:
        def read_text(self, name: str) -> str | None:
            return note

    monkeypatch.setattr(version, "distribution", lambda name: Noted())
    assert version._commit_of_installation() == commit


@pytest.mark.parametrize("tool", ["run", "eval", "bench", "report", "convert"])
def test_every_command_prints_it(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"dynmoe-{tool}", "--version"])
    module = import_module(f"runners.{'evaluate' if tool == 'eval' else tool}")
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out == f"dynmoe-{tool} {version.version()}\n" and dynmoe.__version__ in out

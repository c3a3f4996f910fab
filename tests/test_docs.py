"""The pages for users: links lead somewhere, examples run, commands are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dynmoe.config.compose import preflight

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced code blocks of a page that are marked as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of its blocks that start a training run; a backslash continues a line."""
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("dynmoe-run ") and "--help" not in line]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    links += re.findall(r"^\[[^]]+\]: ([^:\s]+)$", text, re.MULTILINE)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_the_example_of_the_readme_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    namespace: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "README.md", "exec"), namespace)
    trainer = namespace["trainer"]
    assert trainer.global_step == 8  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_accepted(page: Path) -> None:
    """A page that shows a refused command says so by its prompt, ``$``."""
    refused = {}
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        if found := preflight(words).problems:
            refused[command] = found
    assert refused == {}

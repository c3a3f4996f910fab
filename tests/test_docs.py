"""The pages for users: links lead somewhere, examples run, commands are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dynmoe.config import machine
from dynmoe.config.compose import preflight

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MISSING = re.compile("no folder|found none in|not installed")
"""Problems that the reader's own folders, and an extra, solve."""

IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced code blocks of a page that are marked as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of its blocks that start a training run; a backslash continues a line."""
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("dynmoe-run ") and "--help" not in line]


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    links += re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    lost = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.slow
def test_the_example_of_the_readme_adapts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened to four steps: an update of both layers after every second one."""
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    events: list[dict[str, object]] = []
    shorter = example.replace("max_steps=200", "max_steps=4").replace("=100", "=2")
    recorded = shorter.replace("period=2", "period=2, on_event=events.append")
    exec(compile(recorded, "README.md", "exec"), {"events": events})
    assert [(event["step"], event["layer"]) for event in events] == [
        (1, "blocks.8.mlp"),
        (1, "blocks.10.mlp"),
        (3, "blocks.8.mlp"),
        (3, "blocks.10.mlp"),
    ]


# The log keeps commands as they were on their day.
WITH_COMMANDS = {p: n for p, n in zip(PAGES, IDS, strict=True) if commands(p) and p.stem != "LOG"}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(WITH_COMMANDS), ids=WITH_COMMANDS.get)
def test_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a page shows as refused follow a prompt, ``$``, and are left out."""
    monkeypatch.setattr(machine, "DEVICES", ("null",))  # a GPU's driver
    refused = {}
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        verdict = preflight([word for word in words if word != "-m"], multirun="-m" in words)
        if found := [text for text in verdict.problems if not MISSING.search(text)]:
            refused[command] = found
    assert refused == {}

"""Every option of every group in conf/ composes and passes the check, with some task."""

from __future__ import annotations

from pathlib import Path

import dynmoe.conf
import pytest

from dynmoe.config.compose import preflight, search_path
from dynmoe.config.options import modality, own

CONF = Path(dynmoe.conf.__file__).parent
OPTIONS = [
    f"{file.parent.name}={file.stem}"
    for file in sorted(CONF.glob("*/*.yaml"))
    if not file.name.startswith("_") and file.parent.name not in {"local"}
]

TASKS = {"image": "task=vit_domainbed", "text": "task=glue", "vision-language": "task=vl"}


def tasks_of(option: str) -> list[str]:
    """Those that an option may be for; of data and backbones the one that speaks their language."""
    group, name = option.split("=")
    with search_path():
        kind = modality(own(group, name)) if group in ("data", "backbone") else None
    return list(TASKS.values()) if kind is None else [TASKS[kind]]


def problems(command: list[str], root: Path) -> list[str]:
    found = preflight(command).problems
    if any(text.startswith("data.root: required") for text in found):
        found = preflight([*command, f"data.root={root}"]).problems
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, tmp_path: Path) -> None:
    """With the task it is meant for; a sweep chooses a backbone for the data as well."""
    if option.startswith("task="):
        assert option in TASKS.values() and problems([option], tmp_path) == []
        return
    found = []
    mode = ["mode=check"] if option == "data=questions" else []  # which cannot be trained on
    for task in tasks_of(option):
        found.append(problems([task, option, *mode], tmp_path))
        if not found[-1]:
            return
    raise AssertionError(found)

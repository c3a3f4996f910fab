"""Every option of every group in conf/ composes and passes the check, with some task."""

from __future__ import annotations

from pathlib import Path

import dynmoe.conf
import pytest

from dynmoe.config.preflight import preflight

CONF = Path(dynmoe.conf.__file__).parent
OPTIONS = [
    f"{file.parent.name}={file.stem}"
    for file in sorted(CONF.glob("*/*.yaml"))
    if not file.name.startswith("_") and file.parent.name not in {"local"}
]


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, tmp_path: Path) -> None:
    tasks = [[]] if option.startswith("task=") else [["task=vit_domainbed"], ["task=glue"]]
    for command in tasks:
        found = preflight([*command, option]).problems
        if any(text.startswith("data.root: required") for text in found):
            found = preflight([*command, option, f"data.root={tmp_path}"]).problems
        if not found:
            break
    assert found == []

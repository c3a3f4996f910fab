"""The package holds all its code and configs, and its imports run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    "errors files network passes seeding lazy version",
    "ranks",
    "image_files process",
    "layers questions runtime",
    "records selection metrics adaptation backbones",
    "data",
    "config",
    "report tasks sweep",
    "training",
    "estimate convert benchmark",
    "cli job",
)
"""A room imports from the floors above it in this list, never from its own or from below."""


def test_package_list_matches_the_folders() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("dynmoe", "runners")
        for init in (ROOT / top).rglob("__init__.py")
    }
    remapped = {"dynmoe.sweep.hydra_plugin": "hydra_plugins.dynmoe_sweeper"}
    assert listed == {remapped.get(name, name) for name in found} | {"dynmoe.conf"}


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "dynmoe":
            yield from (f"dynmoe.{each.name}" for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def room(name: str) -> str:
    """`layers` of `dynmoe.layers.moe`; empty for a module of others."""
    return name.split(".")[1] if name.startswith("dynmoe.") else ""


def test_imports_run_one_way() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    for file in (ROOT / "dynmoe").rglob("*.py"):
        here = file.relative_to(ROOT / "dynmoe").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for name in imported(ast.walk(ast.parse(file.read_text()))):
            assert not name.startswith("runners"), f"{file.name} imports {name}"
            other = room(name) or here
            assert other == here or floor[other] < floor[here], f"{file.name} imports {name}"


def test_layers_need_torch_alone() -> None:
    """And so does every room that they import from; functions may import more."""
    rooms, others = ["layers"], set[str]()
    for here in rooms:
        inside, alone = ROOT / "dynmoe" / here, ROOT / "dynmoe" / f"{here}.py"
        for file in inside.rglob("*.py") if inside.is_dir() else [alone]:
            names = set(imported(ast.parse(file.read_text()).body))
            rooms += {room(name) for name in names if room(name)} - set(rooms)
            others |= {name.split(".")[0] for name in names if not room(name)}
    assert "errors" in rooms and others - sys.stdlib_module_names == {"torch"}


def test_a_run_installs_no_developer_tools() -> None:
    """What make would do in a fresh clone."""
    first = {}
    for target in ("demo", "test"):
        dry = ["make", "--dry-run", "--always-make", target, "VENV=/nowhere"]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
        first[target] = [line for line in done.stdout.splitlines() if "--editable" in line]
    assert len(first["demo"]) == 1 and "[dev]" not in first["demo"][0]
    assert len(first["test"]) == 2 and "'.[dev]'" in first["test"][1]


@pytest.mark.slow
def test_wheel_works_from_any_folder(tmp_path: Path) -> None:
    """Build the wheel, compare it with conf/, and run the command from it in an empty folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(ROOT)], check=True, capture_output=True, text=True)
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    configs = {
        f"dynmoe/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")
    }
    assert configs == {name for name in names if name.endswith(".yaml")}
    assert "dynmoe/py.typed" in names
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[1:] = "
        "['task=vit_domainbed', 'trainer=smoke', 'trainer.enable_progress_bar=false']; "
        "import runners.run as t; assert t.__file__.startswith(sys.path[0]); t.main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("outputs/vit_domainbed/*/done"))) == 1

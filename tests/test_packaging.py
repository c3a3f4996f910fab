"""The package holds all its code and configs, and its imports run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "layers": set(),
    "config": {"data.glue_tasks", "data.protocol"},
    "data": {"questions"},
    "questions": set(),
    "metrics": {"layers"},
    "sweep": {"config", "metrics.selection", "report.records"},
    "report": {"metrics.efficiency", "metrics.selection"},
    "comparison": {"report", "metrics.efficiency", "metrics.selection"},
    "adaptation": {"layers"},
    "backbones": {"layers"},
    "benchmark": {"layers", "backbones", "config", "data", "metrics.efficiency", "runtime"},
    "tasks": {
        "layers",
        "metrics",
        "backbones.vlm",
        "data.chat",
        "data.protocol",
        "data.sampling",
        "data.text_batches",
        "data.vl_examples",
        "report.records",
    },
}


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


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str) -> None:
    """Each folder of dynmoe imports itself, dynmoe.errors, and what stands above it."""
    allowed = {room, "errors", *MAY_IMPORT[room]}
    for file in (ROOT / "dynmoe" / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("runners"), f"{file.name} imports {name}"
                if name.startswith("dynmoe."):
                    inner = name.removeprefix("dynmoe.")
                    assert any(inner == a or inner.startswith(f"{a}.") for a in allowed), (
                        f"dynmoe/{room}/{file.name} imports {name}"
                    )


def test_layers_need_torch_alone() -> None:
    code = (
        "import sys, dynmoe.layers; "
        "print([m for m in ('lightning', 'hydra', 'timm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_wheel_works_from_any_folder(tmp_path: Path) -> None:
    """Build the wheel, compare it with conf/, and run the command from it in an empty folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
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
        "import dynmoe.training.job as t; assert t.__file__.startswith(sys.path[0]); t.main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("outputs/vit_domainbed/*/done"))) == 1

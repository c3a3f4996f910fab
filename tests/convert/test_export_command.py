"""``dynmoe-convert run=...``: what is refused before any work, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Refused, Run
from omegaconf import DictConfig, OmegaConf
from tiny_runs import tiny_config
from tiny_texts import config as text_config

from dynmoe.convert import export as command
from dynmoe.convert import runs, transformers_folder
from dynmoe.records import RunFolder

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def configs() -> dict[str, DictConfig]:
    return {"text": text_config(Path("nowhere"), "data=rte"), "image": tiny_config()}


@pytest.fixture
def made(configs: dict[str, DictConfig], tmp_path: Path) -> Made:
    """Make the folder of a run with an empty checkpoint."""

    def make(kind: str, done: bool = True, **changes: object) -> Path:
        cfg = OmegaConf.create(OmegaConf.to_container(configs[kind], resolve=True))
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        folder = RunFolder(tmp_path / "runs" / kind)
        (folder.path / "checkpoints").mkdir(parents=True)
        (folder.path / "checkpoints" / "selected.ckpt").touch()
        OmegaConf.save(cfg, folder.path / "config.yaml")
        if done:
            folder.mark_done()
        return folder.path

    return make


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("text", ["format=gguf"], "format=gguf: unknown, expected transformers"),
        ("text", ["format=onnx"], "format=onnx: not for text runs, expected transformers"),
        ("image", ["format=llava"], "format=llava: not for image runs, expected onnx"),
        ("text", ["checkpoint=best"], "checkpoint=best: there is no file"),
        ("text", ["tokenizer=a"], "tokenizer= belongs to from=FOLDER"),
        ("image", ["backbone.path=a"], "backbone.path: this run on RotatedDigits has no such key"),
    ],
)
def test_refused(
    kind: str, arguments: list[str], message: str, made: Made, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused(f"run={made(kind)}", f"to={tmp_path}/out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused(made: Made, tmp_path: Path, refused: Refused) -> None:
    run = made("text", done=False)
    assert "expected a finished run" in refused(f"run={run}", f"to={tmp_path}/out")


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"moe__router__combine": "tutel"}, "combine=constant_k"),
        ({"moe__router__capacity_factor": 1.5}, "capacity_factor=null"),
    ],
)
def test_outputs_that_depend_on_the_batch_are_refused(
    change: dict[str, object], fix: str, made: Made, tmp_path: Path, refused: Refused
) -> None:
    run = made("image", **change)
    assert f"Train with moe.router.{fix}" in refused(f"run={run}", f"to={tmp_path}/out")


@pytest.mark.parametrize(
    ("kind", "router", "format_"),
    [("text", "BiasedTopKRouter", "transformers"), ("image", "PrefixRouter", "onnx")],
)
def test_routers_that_a_format_cannot_have_are_refused(
    kind: str, router: str, format_: str, made: Made, tmp_path: Path, refused: Refused
) -> None:
    run = made(kind, moe__router___target_=f"dynmoe.layers.{router}")
    message = refused(f"run={run}", f"to={tmp_path}/out")
    assert f"format={format_}" in message and router in message and "dynmoe-eval" in message


def test_a_head_for_each_task_is_refused(made: Made, tmp_path: Path, refused: Refused) -> None:
    run = made("text", data___target_="dynmoe.data.GlueMixData", data__tasks=["cola", "rte"])
    message = refused(f"run={run}", f"to={tmp_path}/out")
    assert "format=transformers" in message and "(cola, rte)" in message and "data=cola" in message


def test_missing_packages_are_named(
    made: Made, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "onnxscript" else True)
    message = refused(f"run={made('image')}", f"to={tmp_path}/out")
    assert "needs the package onnxscript: pip install 'dynmoe[onnx]'" in message


def test_folders_that_must_stay(made: Made, tmp_path: Path, refused: Refused) -> None:
    run, mine = made("text"), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    for target, message in (
        (run, "holds the run itself"),
        (run.parent, "holds the run itself"),
        (mine, "holds files that dynmoe-convert did not write"),
        (mine / "thesis.tex", "expected a folder, found a file"),
    ):
        assert message in refused(f"run={run}", f"to={target}", "overwrite=true")
    assert (mine / "thesis.tex").exists() and RunFolder(run).is_done


def test_a_folder_that_cannot_be_made_is_named(
    made: Made, tmp_path: Path, refused: Refused, writing: SimpleNamespace
) -> None:
    (tmp_path / "file").touch()
    message = refused(f"run={made('text')}", f"to={tmp_path}/file/out")
    assert f"to={tmp_path}/file/out: cannot be made (Not a directory)" in message


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the model and its writer by ones that need no time; ``difference`` is found."""
    found = SimpleNamespace(difference=1e-6, content="first")

    def write(model: object, folder: Path) -> float:
        (folder / "model.safetensors").write_text(found.content)
        (folder / "model.safetensors").chmod(0o600)  # as safetensors does
        return float(found.difference)

    model = SimpleNamespace(step=7, num_experts={"a": 3, "b": 4})
    monkeypatch.setattr(runs, "trained_model", lambda *arguments: model)
    monkeypatch.setattr(transformers_folder, "write", write)
    return found


def test_an_export_is_whole_or_not_there(
    made: Made,
    tmp_path: Path,
    run: Run,
    refused: Refused,
    writing: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "deep" / "out"
    arguments = [f"run={made('text')}", f"to={target}"]
    writing.difference = float("nan")
    assert "differ from the run's" in refused(*arguments)
    assert list(target.parent.iterdir()) == []

    writing.difference = 1e-6
    run(*arguments)
    printed = capsys.readouterr().out
    assert "3, 4 experts" in printed and "differ by 1.0e-06" in printed
    note = json.loads((target / "export.json").read_text())
    assert note["format"] == "transformers" and note["checkpoint"] == "selected.ckpt"
    assert (note["run"], note["step"]) == ("text", 7)
    modes = {file.stat().st_mode for file in target.iterdir()}
    assert len(modes) == 1  # whoever may read the note may read the weights

    assert "pass overwrite=true" in refused(*arguments)
    writing.content, writing.difference = "second", 0.1
    assert "Nothing was kept" in refused(*arguments, "overwrite=true")
    assert (target / "model.safetensors").read_text() == "first"
    writing.difference = 0.0
    run(*arguments, "overwrite=true")
    assert (target / "model.safetensors").read_text() == "second"
    assert [file.name for file in target.parent.iterdir()] == ["out"]

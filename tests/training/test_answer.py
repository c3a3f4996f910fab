"""`dynmoe-eval` of vision-language runs: scores again, and answers to published questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image
from sweeps import write_run
from tiny_runs import tiny_config
from tiny_vl import configuration

from dynmoe import job
from dynmoe.errors import ConfigError
from dynmoe.questions.vqa import INSTRUCTION
from dynmoe.records import RunFolder
from dynmoe.training import build, evaluate
from dynmoe.training.evaluate import print_scores
from runners import evaluate as command

ALONE = ("stage.start=null", "runtime.malloc=system", "data.cache=null")
SHORT = ("task.steps=2", "task.eval_every=2", "moe=dynmoe_vl")
IMAGES = ("red", "green", "blue")
THINGS = ("dog", "cat", "kite", "fork")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    path = tmp_path_factory.mktemp("runs") / "run"
    path.mkdir()
    job.train(configuration(path.parent, *ALONE, *SHORT), RunFolder(path))
    RunFolder(path).mark_done()
    return RunFolder(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """POPE with two splits, GQA and VizWiz, of a few questions on three plain images."""
    root = tmp_path_factory.mktemp("published")
    pope = [
        {"question_id": i, "image": f"{IMAGES[i % 3]}.png", "label": ("no", "yes")[i % 2]}
        | {"text": f"Is there a {thing} in the image?"}
        for i, thing in enumerate(THINGS)
    ]
    for split in ("popular", "random"):
        write(root / "pope" / f"coco_pope_{split}.json", "\n".join(map(json.dumps, pope)))
    gqa = {
        f"0{i}": {"question": f"Which colour has the {thing}?", "imageId": IMAGES[i % 3]}
        | {"answer": IMAGES[i % 3], "types": {"structural": "query"}}
        for i, thing in enumerate(THINGS)
    }
    write(root / "gqa" / "testdev_balanced_questions.json", json.dumps(gqa))
    vizwiz = [{"image": f"{name}.png", "question": "What is it?"} for name in IMAGES]
    write(root / "vizwiz" / "test.json", json.dumps(vizwiz))
    for folder, suffix in (("pope/val2014", "png"), ("gqa/images", "jpg"), ("vizwiz/test", "png")):
        (root / folder).mkdir()
        for name in IMAGES:
            Image.new("RGB", (20, 12), name).save(root / folder / f"{name}.{suffix}", format="PNG")
    return {name: root / name for name in ("pope", "gqa", "vizwiz")}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dynmoe-eval", *arguments])
    command.main()


def given(published: dict[str, Path], *names: str) -> list[str]:
    return [f"question_sets.{name}={published[name]}" for name in names]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_evaluate_repeats_the_recorded_scores(
    trained: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = trained.read("results")[-1]
    scores = evaluate.evaluate(*evaluate.parse([f"run={trained.path}", "checkpoint=last"])[1:])
    assert scores == recorded["scores"] and {"test", "shuffled"} == scores.keys()
    shown = words(capsys.readouterr().out)
    assert f"test score {100 * scores['test']['score']:.2f}" in shown
    assert f"shuffled kind colour {100 * scores['shuffled']['kind_colour']:.2f}" in shown


def test_answers_the_runs_own_questions(
    trained: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = trained.read("results")[-1]
    run(monkeypatch, f"run={trained.path}", "mode=answer")
    shown = capsys.readouterr().out
    for name in ("test", "shuffled"):
        (file,) = (trained.path / "answers" / name).glob("*.jsonl")
        assert str(file) in shown
        found = rows(file)
        right = sum(row["text"] == row["answer"] for row in found)
        assert len(found) == 10 and right / 10 == recorded["scores"][name]["score"]
    assert "shuffled score" in words(shown)
    routing = words(shown).split("Experts per token")[1]
    assert "answered ┃ MoE layer ┃ image ┃ prompt ┃ answer" in routing
    assert routing.count("layers.0.mlp") == routing.count("layers.2.mlp") == 2


def test_answers_published_sets(
    trained: RunFolder,
    published: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained.path / "answers"
    before = {file.name for file in folder.glob("*")}
    run(monkeypatch, f"run={trained.path}", "mode=answer", *given(published, *published))
    assert {file.name for file in folder.glob("*")} == before | {"pope", "gqa", "vizwiz"}
    shown = words(capsys.readouterr().out)
    for split in ("popular", "random"):
        found = rows(folder / "pope" / f"coco_pope_{split}_answers.jsonl")
        assert [row["question"] for row in found] == [
            f"Is there a {thing} in the image?" for thing in THINGS
        ]
        assert f"pope {split} accuracy" in shown
    gqa = json.loads((folder / "gqa" / "testdev_balanced_predictions.json").read_text())
    assert [row["questionId"] for row in gqa] == ["00", "01", "02", "03"]
    vizwiz = json.loads((folder / "vizwiz" / "vizwiz_test_results.json").read_text())
    assert [row["image"] for row in vizwiz] == [f"{name}.png" for name in IMAGES]
    assert "vizwiz has no local score. The answers are not public: eval.ai" in shown
    assert "vizwiz score" not in shown and "gqa kind query" in shown
    assert "test score" not in shown  # its own sets are left out
    assert "vizwiz layers.0.mlp" in shown


def test_answers_are_as_long_as_asked_for(
    trained: RunFolder,
    published: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dynmoe.backbones.vlm import VisionLanguageModel

    asked, original = list[int](), VisionLanguageModel.generate

    def generate(self: VisionLanguageModel, tokens: Any, max_new_tokens: int) -> Any:
        asked.append(max_new_tokens)
        return original(self, tokens, max_new_tokens)

    monkeypatch.setattr(VisionLanguageModel, "generate", generate)
    parsed = [f"run={trained.path}", "mode=answer", "data.max_new_tokens=9"]
    run(monkeypatch, *parsed, *given(published, "gqa"))
    assert set(asked) == {9}
    assert "gqa: 4 of 4 answers were cut off at 9 tokens" in words(capsys.readouterr().out)


def test_points_are_no_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    scores = {"mme": {"score": 0.5, "perception_points": 1000.0, "loss": 1.5}}
    folder.append("results", {"step": 7, "scores": scores})
    print_scores(folder, Path("last.ckpt"), 7, scores)
    shown = words(capsys.readouterr().out)
    assert "run, last.ckpt, step 7; in %, but losses and points" in shown
    assert "mme loss 1.5000 1.5000" in shown
    assert "mme score 50.00 50.00" in shown
    assert "mme perception points 1000.00 1000.00" in shown


def test_questions_alone_need_no_conversations(
    tmp_path: Path, published: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenized(*_: object) -> None:
        raise AssertionError("conversations are tokenized")

    monkeypatch.setattr("dynmoe.data.vl.module.tokenized", tokenized)
    data: Any = build.build_data(configuration(tmp_path, *ALONE))
    data.setup("validate")
    assert data.env_names == ["test", "shuffled"]
    data = build.build_data(configuration(tmp_path, *ALONE))
    data.setup_questions({"gqa": str(published["gqa"])})
    assert data.env_names == ["gqa"]
    assert data.sets["gqa"].questions[0].text == f"Which colour has the dog?{INSTRUCTION}"
    data.setup("validate")
    assert data.env_names == ["gqa"]


def test_training_refuses_what_it_cannot_score(tmp_path: Path, published: dict[str, Path]) -> None:
    own = f"+data.question_sets={{vizwiz: {published['vizwiz']}}}"
    data = build.build_data(configuration(tmp_path, *ALONE, own))
    with pytest.raises(ConfigError) as error:
        data.setup()
    assert str(error.value) == (
        "data.question_sets: vizwiz has no local score. Leave it out; answer it after training: "
        f"dynmoe-eval run=FOLDER mode=answer question_sets.vizwiz={published['vizwiz']}"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mode=answer", "question_sets.gpa=."], "no question set gpa. Choose one of vqav2, gqa"),
        (["mode=answer", "question_sets.gqa=."], "GQA is not complete below .: questions: no"),
        (
            ["question_sets.gqa=."],
            "question_sets.gqa=.: questions to answer, expected with mode=answer",
        ),
        (["mode=answers"], "mode=answers: expected one of evaluate, answer, submit"),
        (["mode=submit"], "mode=submit: Scenes is no task of GLUE"),
        (["mode=answer", "checkpoint=best"], "checkpoint=best: there is no file best"),
        (
            ["mode=answer", "question_set.gqa=."],
            "unknown argument, expected run=, checkpoint=, mode=",
        ),
        (["mode=answer", "data.root=."], "data.root: this run on Scenes has no such key"),
    ],
)
def test_refuses(
    arguments: Sequence[str],
    message: str,
    trained: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f"run={trained.path}", *arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_refuses_what_is_no_such_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path).path
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "selected.ckpt").touch()
    OmegaConf.save(tiny_config(), folder / "config.yaml", resolve=True)
    for path, message in (
        (folder, "mode=answer: RotatedDigits has no questions to answer"),
        (tmp_path / "gone", "expected a folder with a config.yaml, found none"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, f"run={path}", "mode=answer")
        assert message in capsys.readouterr().err
    assert not (folder / "answers").exists()

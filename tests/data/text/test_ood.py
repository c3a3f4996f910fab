"""Proves how the published out-of-distribution sets are read, and which fit which task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynmoe.data.text.ood import OOD, read_ood
from dynmoe.data.text.tasks import TASKS
from dynmoe.errors import DataError

SNLI = "gold_label\tsentence1_parse\tsentence1\tsentence2\n"
SNLI += "neutral\t(x)\ta\tb\n-\t(x)\tc\td\ncontradiction\t(x)\te\tf\nentailment\t(x)\tg\th\n"
HANS = "gold_label\tsentence1\tsentence2\theuristic\n"
HANS += "non-entailment\ta\tb\tlexical_overlap\nentailment\tc\td\tsubsequence\n"
SICK = "pair_ID\tsentence_A\tsentence_B\tentailment_label\tSemEval_set\n"
SICK += "1\ta\tb\tNEUTRAL\tTRAIN\n2\tc\td\tNEUTRAL\tTEST\n3\te\tf\tENTAILMENT\tTEST\n"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\n1\t3\t4\tc\td\t0\n"
TWITTER = "a\tb\t(2, 6)\turl\nc\td\t(3, 6)\turl\ne\tf\t(5, 6)\turl\ng\th\t(4,6)\turl\n"


def put(root: Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)


@pytest.mark.parametrize(
    ("name", "task", "file", "text", "first", "label"),
    [
        ("scitail", "rte", "scitail_1.0_test.tsv", "a\tb\tneutral\nc\td\tentails\n", "ac", [1, 0]),
        ("hans", "rte", "heuristics_evaluation_set.txt", HANS, "ac", [1, 0]),
        ("snli", "rte", "snli_1.0_test.txt", SNLI, "aeg", [1, 1, 0]),
        ("snli", "mnli", "snli_1.0_test.txt", SNLI, "aeg", [1, 2, 0]),
        ("sick", "mnli", "SICK.txt", SICK, "ce", [1, 0]),
        ("sick", "rte", "SICK.txt", SICK, "ce", [1, 0]),
        ("qqp", "mrpc", "QQP/dev.tsv", QQP, "ac", [1, 0]),
        ("twitter", "mrpc", "Twitter_URL_Corpus_test.txt", TWITTER, "aeg", [0, 1, 1]),
        ("twitter", "qqp", "Twitter_URL_Corpus_test.txt", TWITTER, "aeg", [0, 1, 1]),
    ],
)
@pytest.mark.parametrize("folder", ["", "{}_1.0"])
def test_published_files(
    tmp_path: Path, folder: str, name: str, task: str, file: str, text: str, first: str, label
) -> None:
    put(tmp_path, str(Path(folder.format(name)) / Path(file)) if "/" not in file else file, text)
    found = read_ood(name, str(tmp_path), TASKS[task])
    assert (found.first, found.label.tolist()) == (list(first), label)


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"gold_label": label, "sentence1": "a", "sentence2": "b", "pairID": "1"}
        for label in ("-", "neutral", "entailment")
    ]
    put(tmp_path, "snli/snli_1.0_test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read_ood("snli", str(tmp_path), TASKS["mnli"])
    assert (found.label.tolist(), found.index.tolist()) == ([1, 0], [1, 2])


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_a_file_of_ones_own(tmp_path: Path, suffix: str) -> None:
    tsv = "label\tquestion\tsentence\nnot_entailment\tq\ts\n0\tr\tt\n"
    rows = [dict(label="not_entailment", question="q", sentence="s")]
    rows += [dict(label=0, question="r", sentence="t")]
    text = tsv if suffix == ".tsv" else "".join(json.dumps(row) + "\n" for row in rows)
    put(tmp_path, f"wiki{suffix}", text)
    found = read_ood("wiki", str(tmp_path), TASKS["qnli"])
    assert (found.first, found.second) == (["q", "r"], ["s", "t"])
    assert found.label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        (
            "hans",
            "mnli",
            "data.ood: hans fits rte, not mnli: its class not_entailment is none of mnli's. For "
            "mnli take snli, sick or a file with columns premise, hypothesis, label.",
        ),
        ("snli", "qnli", "data.ood: snli fits mnli and rte, not qnli: its labels mean something"),
        ("snli", "cola", "For cola take a file with columns sentence, label."),
        ("hans", "rte", "data.ood_root: no file heuristics_evaluation_set.txt or "),
        ("hnas", "rte", "data.ood: hnas is neither one of scitail, hans, snli, sick, qqp, twitter"),
    ],
)
def test_refusals(tmp_path: Path, name: str, task: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_ood(name, str(tmp_path), TASKS[task])
    assert message in str(error.value)


def test_no_root() -> None:
    with pytest.raises(DataError, match=r"data.ood_root: not given. Give the folder that holds"):
        read_ood("hans", None, TASKS["rte"])


@pytest.mark.parametrize("name", OOD)
def test_labels_are_those_of_the_tasks(name: str) -> None:
    for task in OOD[name].tasks:
        for classes in OOD[name].labels.values():
            assert not classes or set(classes) & set(TASKS[task].labels)

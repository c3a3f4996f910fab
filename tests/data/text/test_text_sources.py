"""Proves that all sources of GLUE give the same examples, and how they report what is wrong."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.sources import LAYOUTS, MNLI_SPLITS, Sets, read_sets
from dynmoe.data.text.tasks import LABELLED, TASKS, TESTS
from dynmoe.errors import DataError

MNLI_NAMES = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")


def lines(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_rte(folder: Path, label: str = "entailment", suffix: str = ".tsv") -> None:
    header = "index\tsentence1\tsentence2\tlabel"
    rows = ('0\ta "quote\tb\tnot_entailment', f"1\tc\td\t{label}")
    write(folder / f"train{suffix}", lines(header, *rows))
    write(folder / f"dev{suffix}", lines(header, "0\te\tf\tentailment"))
    write(folder / f"test{suffix}", lines("index\tsentence1\tsentence2", "0\tg\th"))


def rte_tables() -> dict[str, dict[str, list[object]]]:
    """What the hub holds of the same files."""
    keys = ("sentence1", "sentence2", "label", "idx")
    return {
        "train": dict(zip(keys, (['a "quote', "c"], ["b", "d"], [1, 0], [0, 1]), strict=True)),
        "validation": dict(zip(keys, (["e"], ["f"], [0], [0]), strict=True)),
        "test": dict(zip(keys, (["g"], ["h"], [-1], [0]), strict=True)),
    }


def write_parquet(folder: Path, tables: dict[str, dict[str, list[object]]]) -> None:
    folder.mkdir(parents=True)
    for split, table in tables.items():
        file = folder / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), file)


def equal(one: TextSet, other: TextSet) -> bool:
    return one.digest == other.digest and np.array_equal(one.index, other.index)


@pytest.mark.parametrize("folder", ["RTE", "rte", ""])
@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_tsv(tmp_path: Path, folder: str, suffix: str) -> None:
    write_rte(tmp_path / folder, suffix=suffix)
    sets, warnings = read_sets(TASKS["rte"], "tsv", str(tmp_path))
    assert sets.keys() == {"train", "dev", "test"}
    assert (sets["train"].first, sets["train"].second) == (['a "quote', "c"], ["b", "d"])
    assert [each.label.tolist() for each in sets.values()] == [[1, 0], [0], [-1]]
    assert warnings[0] == "RTE train: expected 2,490 rows, found 2"


def test_parquet_and_hub_give_the_examples_of_tsv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rte(tmp_path / "tsv")
    write_parquet(tmp_path / "parquet" / "rte", rte_tables())
    hub = {split: datasets.Dataset.from_dict(table) for split, table in rte_tables().items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: datasets.DatasetDict(hub))
    wanted = read_sets(TASKS["rte"], "tsv", str(tmp_path / "tsv"))
    found: dict[str, Sets] = {
        "parquet": read_sets(TASKS["rte"], "parquet", str(tmp_path / "parquet")),
        "hub": read_sets(TASKS["rte"], "hub", None),
    }
    for sets, warnings in found.values():
        assert sets.keys() == wanted.sets.keys()
        assert all(equal(sets[name], wanted.sets[name]) for name in sets)
        assert warnings == wanted.warnings


def test_what_is_not_asked_for_is_neither_read_nor_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rte(tmp_path)
    (tmp_path / "test.tsv").write_text("damaged")
    assert read_sets(TASKS["rte"], "tsv", str(tmp_path), LABELLED).sets.keys() == {"train", "dev"}
    with pytest.raises(DataError, match="no column sentence1"):
        read_sets(TASKS["rte"], "tsv", str(tmp_path), TESTS)

    table = {"premise": ["a"], "hypothesis": ["b"], "label": [0], "idx": [0]}
    hub = {split: datasets.Dataset.from_dict(table) for split in MNLI_SPLITS.values()}
    fetched = []

    def load(path: str, name: str) -> datasets.DatasetDict:
        fetched.append(name)
        return datasets.DatasetDict(hub if name == "mnli" else {"test": hub["train"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_sets(TASKS["mnli"], "hub", None, LABELLED)
    assert fetched == ["mnli"]
    assert read_sets(TASKS["mnli"], "hub", None).sets["ax"].first == ["a"]


def test_parquet_of_single_files_without_index_drops_rows_with_nulls(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        table = pyarrow.table({"sentence": ["a", None, "b"], "label": [0, 1, 1]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    sets = read_sets(TASKS["sst2"], "parquet", str(tmp_path)).sets
    assert (sets["dev"].first, sets["dev"].index.tolist()) == (["a", "b"], [0, 2])
    assert sets["train"].left_out == {"rows with missing fields": 1}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "mnli"])
def test_official_layouts(tmp_path: Path, name: str) -> None:
    layout, task = LAYOUTS[name], TASKS[name]
    header = layout.header or ("index", *layout.texts, layout.label)
    values = {"label": "1" if name not in ("qnli", "rte") else "not_entailment", "score": "1"}
    values |= {"Quality": "1", "is_duplicate": "1"}
    row = "\t".join(values.get(column, f"some {column}") for column in header)
    for split in ("train", "dev"):
        names = [] if layout.header else ["\t".join(header)]
        write(tmp_path / task.title / f"{split}.tsv", lines(*names, row))
    test = ("index", *layout.texts)
    write(tmp_path / task.title / "test.tsv", lines("\t".join(test), "\t".join(test)))
    sets = read_sets(task, "tsv", str(tmp_path)).sets
    assert sets["train"].first == [f"some {layout.texts[0]}"]
    assert (sets["train"].second is None) == (len(task.columns) == 1)
    assert sets["dev"].label.tolist() == [1]
    assert np.isnan(sets["test"].label[0]) if task.regression else sets["test"].label[0] == -1


def test_cola_with_a_header(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        text = lines("source\tlabel\toriginal_label\tsentence", "gj04\t0\t*\tHim sleeps.")
        write(tmp_path / f"{split}.tsv.gz", text)
    dev = read_sets(TASKS["cola"], "tsv", str(tmp_path)).sets["dev"]
    assert (dev.first, dev.label.tolist()) == (["Him sleeps."], [0])


@pytest.mark.parametrize("ax", ["MNLI/diagnostic/diagnostic.tsv", "diagnostic.tsv", "AX.tsv"])
def test_mnli_has_two_dev_sets_and_the_diagnostic_set(tmp_path: Path, ax: str) -> None:
    header = "index\tsentence1\tsentence2"
    for name in MNLI_NAMES:
        labels = ("", "") if name.startswith("test") else ("\tlabel1\tgold_label", "\tx\tneutral")
        write(
            tmp_path / "MNLI" / f"{name}.tsv",
            lines(header + labels[0], f"0\ta\t{name}" + labels[1]),
        )
    folder = tmp_path / "diagnostic" if ax == "diagnostic.tsv" else tmp_path
    write(folder / ax, lines(header, "0\ta\tax"))
    sets = read_sets(TASKS["mnli"], "tsv", str(tmp_path)).sets
    assert {name: (each.second, each.label.tolist()) for name, each in sets.items()} == {
        "train": (["train"], [1]),
        "dev": (["dev_matched"], [1]),
        "mismatched": (["dev_mismatched"], [1]),
        "test": (["test_matched"], [-1]),
        "test_mismatched": (["test_mismatched"], [-1]),
        "ax": (["ax"], [-1]),
    }


def test_mnli_as_parquet(tmp_path: Path) -> None:
    def table(word: str, label: int) -> dict[str, list[object]]:
        return {"premise": ["a"], "hypothesis": [word], "label": [label], "idx": [0]}

    splits = ("train", "validation_matched", "validation_mismatched", "test_matched")
    write_parquet(tmp_path / "mnli", {split: table(split, 2) for split in splits})
    write_parquet(tmp_path / "ax", {"test": table("ax", -1)})
    sets = read_sets(TASKS["mnli"], "parquet", str(tmp_path)).sets
    assert list(sets) == ["train", "dev", "mismatched", "test", "ax"]
    assert sets["mismatched"].second == ["validation_mismatched"]


def test_mrpc_from_the_original_corpus(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    train = lines(header, "1\t10\t11\ta\tb", "0\t12\t13\tc\td", "1\t14\t15\te\tf")
    write(tmp_path / "msr_paraphrase_train.txt", train.replace("\n", "\r\n"))
    write(tmp_path / "msr_paraphrase_test.txt", lines(header, "0\t16\t17\tg\th"))
    write(tmp_path / "mrpc_dev_ids.tsv", lines("12\t13", "90\t91"))
    sets = read_sets(TASKS["mrpc"], "tsv", str(tmp_path)).sets
    assert (sets["train"].first, sets["train"].index.tolist()) == (["a", "e"], [0, 2])
    assert (sets["dev"].second, sets["dev"].index.tolist()) == (["d"], [1])
    assert sets["test"].label.tolist() == [0]
    (tmp_path / "mrpc_dev_ids.tsv").unlink()
    with pytest.raises(DataError, match=r"no file \S+mrpc_dev_ids.tsv or mrpc_dev_ids.tsv.gz"):
        read_sets(TASKS["mrpc"], "tsv", str(tmp_path))


def test_empty_texts_are_left_out_with_a_count_but_of_test_sets(tmp_path: Path) -> None:
    write_rte(tmp_path)
    for name, rows in {
        "train": "2\t \tb\tentailment\n3\ta\tb\t entailment \n",
        "test": "1\t\th\n",
    }.items():
        with (tmp_path / f"{name}.tsv").open("a") as file:
            file.write(rows)
    sets = read_sets(TASKS["rte"], "tsv", str(tmp_path)).sets
    assert sets["train"].left_out == {"rows with an empty text": 1}
    assert sets["train"].index.tolist() == [0, 1, 3]
    assert len(sets["test"]) == 2


def test_dropped_rows_are_counted(tmp_path: Path) -> None:
    write_rte(tmp_path)
    with (tmp_path / "train.tsv").open("a") as file:
        file.write("2\tbroken\n3\tbroken\n")
    sets = read_sets(TASKS["rte"], "tsv", str(tmp_path)).sets
    assert sets["train"].left_out == {"rows with missing fields": 2}


def test_the_published_sizes_give_no_warning(tmp_path: Path) -> None:
    for split, size in (("train", 635), ("dev", 71)):
        rows = ["index\tsentence1\tsentence2\tlabel", *["0\ta\tb\t1"] * size]
        write(tmp_path / f"{split}.tsv", lines(*rows))
    assert read_sets(TASKS["wnli"], "tsv", str(tmp_path)).warnings == []


def test_all_problems_at_once(tmp_path: Path) -> None:
    write_rte(tmp_path, label="perhaps")
    (tmp_path / "dev.tsv").unlink()
    (tmp_path / "test.tsv").write_text("index\tsentence1\n")
    with pytest.raises(DataError) as error:
        read_sets(TASKS["rte"], "tsv", str(tmp_path))
    assert str(error.value).splitlines() == [
        "RTE cannot be read:",
        f"{tmp_path}/train.tsv: unknown labels 'perhaps'. Expected entailment, 0, not_entailment, "
        "1. Rows of other labels are left out with data.skip_invalid=true.",
        f"data.root: no file {tmp_path}/dev.tsv or dev.tsv.gz. "
        "Give the folder of RTE's files, or one that holds RTE/.",
        f"{tmp_path}/test.tsv: no column sentence2. Found index, sentence1.",
    ]


def test_parquet_problems(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rte", {"train": {"sentence1": ["a"], "label": [0]}})
    (tmp_path / "rte" / "test.parquet").write_text("not parquet")
    with pytest.raises(DataError) as error:
        read_sets(TASKS["rte"], "parquet", str(tmp_path))
    _, column, file, damaged = str(error.value).split("\n", 3)
    assert column.endswith(".parquet: no column sentence2. Found sentence1, label.")
    assert file.startswith(f"data.root: no file {tmp_path}/rte/validation-*.parquet or ")
    assert damaged.startswith(f"{tmp_path}/rte/test.parquet: cannot be read as Parquet: ")


def test_parquet_of_pandas_with_a_missing_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its labels are floats, its missing ones NaN; files may be called in capitals, below ~."""
    for name in ("TRAIN", "Validation-0"):
        labels = pyarrow.array([1.0, float("nan"), 0.0])
        table = pyarrow.table({"sentence": ["a", "b", "c"], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.PARQUET")
    monkeypatch.setenv("HOME", str(tmp_path))
    dev = read_sets(TASKS["sst2"], "parquet", "~").sets["dev"]
    assert (dev.first, dev.label.tolist(), dev.index.tolist()) == (["a", "c"], [1, 0], [0, 2])
    assert dev.left_out == {"rows with missing fields": 1}


def test_parquet_of_lists_and_a_pipe(tmp_path: Path) -> None:
    table = pyarrow.table({"sentence": [["a"]], "label": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    os.mkfifo(tmp_path / "validation.parquet")
    with pytest.raises(DataError) as error:
        read_sets(TASKS["sst2"], "parquet", str(tmp_path))
    assert "row 0, sentence: expected text or a number, found ['a']" in str(error.value)
    assert "it is a pipe or a device" in str(error.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(path: str, name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as error:
        read_sets(TASKS["rte"], "hub", None)
    assert str(error.value) == (
        "data.source: hub: nyu-mll/glue (rte) could not be downloaded: no route\n"
        "Without network use data.source=tsv data.root=<folder of the official files>."
    )


@pytest.mark.parametrize(
    ("task", "source", "root", "message"),
    [
        ("rte", "tsv", None, "data.root: not given. Give the folder of RTE's files"),
        ("rte", "parquet", "nowhere", "data.root: no folder nowhere. Give the folder"),
        ("rte", "embedded", None, "data.source: embedded does not hold RTE."),
        ("glosses", "tsv", None, "data.source: tsv does not hold Glosses."),
    ],
)
def test_wrong_sources(task: str, source, root: str | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_sets(TASKS[task], source, root)
    assert str(error.value).startswith(message)

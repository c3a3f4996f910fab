"""Commands with words that are wrong or odd, and data files that are damaged: refused in words."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forks import call
from kills import Report, without_figures
from tiny_families import Family, families

from dynmoe.data.lm.documents import folder_corpus
from dynmoe.data.text.sources import read_sets
from dynmoe.data.text.tasks import TASKS
from dynmoe.data.vl.readers import read_llava, vqa_questions, vqa_table
from dynmoe.errors import UserError

Draw = random.Random

VALUES = (
    *("null", "true", "-1", "0", "1", "2", "1e400", "nan", "inf", "-inf", "0.5", "1e-30", "007"),
    *(
        "''",
        "[]",
        "{}",
        "{a: 1}",
        "[1,2]",
        "[[1]]",
        "[null]",
        "{0: 1}",
        "[1,",
        "}",
        "a b",
        "'",
        '"',
    ),
    *("${seed}", "${no.such}", "${", "99999999999999999999", "x" * 300, "é", "/", "../..", "~"),
    *('"', "/dev/null", "/no/such/place", "{_target_: torch.nn.Linear}", "{_target_: 1}", "1,2"),
    *("range(3)", "choice(1,2)", "-0", "0x10", "1_000", "yes", "???", "{_partial_: null}"),
)
STRANGE = (
    *("=", "==", "key", "task", "~task", "+task=glue", "++seed=1", "-m", "--", "--cfg", "+a.b=1"),
    *("~seed", "seed=1 seed=2", "seed =1", "hydra.mode=RUN", "@x=1", "moe@x=dense", "task=vl,glue"),
)


def keys_of(family: Family) -> list[str]:
    """The keys of a command's whole configuration."""
    from hydra import compose, initialize_config_module

    from dynmoe.config.runs import flat

    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        return sorted(flat(compose("config", list(family.arguments))))


def commands(work: Path, rounds: range, seed: int, names: Sequence[str], report: Report) -> None:
    """Give tiny commands that are changed in one to three words."""
    known = families(work / "data")
    chosen = [known[name] for name in names or ("vision", "language", "lm", "vl")]
    keys = {family.name: keys_of(family) for family in chosen}
    for number in rounds:
        draw = Draw(f"{seed} commands {number}")
        if number % 50 == 49:
            report.say(f"{number + 1} rounds: {dict(report.counts)}")
        family = draw.choice(chosen)
        arguments = [*family.arguments, f"paths.outputs={work / 'outputs'}"]
        changed = [_word(draw, keys[family.name]) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        for word in changed:
            arguments.insert(draw.randint(0, len(arguments)), word)
        ended = call("run", arguments, work, inside=without_figures)
        report.counts["fuzzed commands"] += 1
        report.counts[f"fuzzed commands: status {ended.status}"] += 1
        what = f"{family.name} {number}, {' '.join(changed)}"
        report.check_end(ended, what)
        if ended.status not in (0, 2):
            report.fault("other ends", f"{what}: {ended.status}\n{ended.output[-1500:]}")
        shutil.rmtree(work / "outputs", ignore_errors=True)


def _word(draw: Draw, keys: list[str]) -> str:
    if draw.random() < 0.15:
        return draw.choice(STRANGE)
    key = draw.choice(keys)
    if draw.random() < 0.2:  # a node in the place of a value, a part of a key, a slip
        parts = key.split(".")
        key = draw.choice(
            (".".join(parts[:-1]) or key, f"{key}.more", key[:-1], f"+{key}", f"~{key}")
        )
    return f"{key}={draw.choice(VALUES)}"


# Data.

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
JSON_ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    "",
    " ",
    "x",
    [],
    {},
    [None],
    {"a": 1},
    "<image>",
)


def data_files(work: Path, rounds: range, seed: int, names: Sequence[str], report: Report) -> None:
    """Damage data files by bytes, by lines and by values, and read them."""
    logging.disable(logging.WARNING)
    kinds = _kinds()
    for number in rounds:
        draw = Draw(f"{seed} data {number}")
        kind = draw.choice(sorted(kinds))
        folder = work / "files"
        folder.mkdir(parents=True)
        file, read = kinds[kind](folder)
        told = [_harm(file, draw) for _ in range(draw.choice((1, 1, 2, 3)))]
        what = f"{kind} {number}, {'; '.join(told)}"
        report.counts["fuzzed data files"] += 1
        try:
            with _limit(30), contextlib.redirect_stderr(io.StringIO()):
                read()
            report.counts["fuzzed data files: read"] += 1
        except UserError:
            report.counts["fuzzed data files: refused"] += 1
        except TimeoutError:
            report.fault("hangs", f"{what}: {file.read_bytes()[:600]!r}")
        except Exception:
            trace = traceback.format_exc()
            report.fault("tracebacks", f"{what}:\n{trace[-1500:]}\n{file.read_bytes()[:600]!r}")
        shutil.rmtree(folder)
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


Read = Callable[[], object]


def _kinds() -> dict[str, Callable[[Path], tuple[Path, Read]]]:
    """By kind: write a whole file into a folder; returns it, and how it is read."""
    from PIL import Image

    def images(folder: Path) -> str:
        place = folder / "images"
        place.mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (4, 4)).save(place / name)
        return str(place)

    def llava(folder: Path) -> tuple[Path, Read]:
        entries = [{"id": str(i), "image": "a.png", "conversations": TURNS} for i in range(6)]
        file = written(folder / "chat.json", json.dumps(entries))
        place = images(folder)
        return file, lambda: list(read_llava("chat", [str(file)], place))

    def messages(folder: Path) -> tuple[Path, Read]:
        parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]
        lines = [json.dumps({"id": i, "messages": turns}) for i in range(6)]
        file = written(folder / "chat.jsonl", "\n".join(lines) + "\n")
        place = images(folder)
        return file, lambda: list(read_llava("chat", [str(file)], place))

    rows = [
        {"id": i, "question": "what?", "image": "a.png", "answer": "cat", "kind": "k"}
        for i in range(6)
    ]

    def table(suffix: str, text: str) -> Callable[[Path], tuple[Path, Read]]:
        def make(folder: Path) -> tuple[Path, Read]:
            file, place = written(folder / f"vqa.{suffix}", text), images(folder)

            def read() -> object:
                found = list(vqa_table("vqa", str(file), place, ""))
                return found, vqa_questions("vqa", str(file), place, "").questions

            return file, read

        return make

    header = ",".join(rows[0])
    csv = "\n".join([header, *(",".join(map(str, row.values())) for row in rows)]) + "\n"

    def glue(folder: Path) -> tuple[Path, Read]:
        from tiny_texts import write_rte

        write_rte(folder)
        file = folder / "RTE" / "train.tsv"
        return file, lambda: read_sets(TASKS["rte"], "tsv", str(folder), ["train", "dev"])

    def corpus(suffix: str) -> Callable[[Path], tuple[Path, Read]]:
        def make(folder: Path) -> tuple[Path, Read]:
            lines = [f"document {i} of some words" for i in range(20)]
            if suffix == "jsonl":
                lines = [json.dumps({"text": line}) for line in lines]
            file = written(folder / f"corpus.{suffix}", "\n".join(lines) + "\n")
            return file, lambda: folder_corpus(folder, **CORPUS)

        return make

    return {
        **{"llava": llava, "messages": messages, "glue": glue},
        "json table": table("json", json.dumps(rows)),
        "jsonl table": table("jsonl", "\n".join(map(json.dumps, rows)) + "\n"),
        "csv table": table("csv", csv),
        "tsv table": table("tsv", csv.replace(",", "\t")),
        **{f"corpus {suffix}": corpus(suffix) for suffix in ("txt", "jsonl")},
    }


ODD_BYTES = (
    *(b'"', b"'", b"\n", b"\r", b",", b"\t", b"\\", b"{", b"["),
    *(b"\xff", b"\xef\xbb\xbf", b"1e999"),
)

CORPUS: dict[str, Any] = {
    **{"text_key": "text", "unit": "line", "validation": 0.2, "test": 0.2, "trial_seed": 0},
}


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def _harm(file: Path, draw: Draw) -> str:
    """Damage a file by bytes, by lines, or, where it is JSON, in its values."""
    content = file.read_bytes()
    if draw.random() < 0.6 and file.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError, RecursionError):
            return _harm_values(file, draw)
    at = draw.randrange(max(1, len(content)))
    how = draw.choice(("cut", "flip", "insert", "lines", "random", "nul"))
    if how == "cut":
        content = content[:at]
    elif how == "flip" and content:
        content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    elif how == "insert":
        content = content[:at] + draw.choice(ODD_BYTES) + content[at:]
    elif how == "lines":
        lines = content.splitlines(keepends=True)
        draw.shuffle(lines)
        content = b"".join(lines[: draw.randint(0, len(lines))])
    elif how == "random":
        content = draw.randbytes(draw.randrange(50))
    elif how == "nul":
        content = content[:at] + b"\0" * 5 + content[at:]
    file.write_bytes(content)
    return how


def _harm_values(file: Path, draw: Draw) -> str:
    text = file.read_text(errors="strict")
    by_line = file.suffix == ".jsonl"
    value = [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(value)
    if not places:
        return "as it was"
    node, key = draw.choice(places)
    how = draw.choice(("value", "value", "delete", "rename"))
    if how == "value":
        node[key] = draw.choice(JSON_ODD)
    elif how == "delete":
        del node[key]
    elif isinstance(node, dict):
        node[draw.choice(("", "x", "image", "answers", "images", "question "))] = node.pop(key)
    dumped = "\n".join(map(json.dumps, value)) if by_line else json.dumps(value)
    file.write_text(dumped)
    return f"{how} of {key}"

"""Arguments that several commands of ``dynmoe-bench`` have, and kinds of numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

Subparsers = Any  # argparse's own type of add_subparsers() is private


def listed(cases: dict[str, str]) -> str:
    return "\n".join(f"  {name:17}{text}" for name, text in cases.items())


def add_timing(p: argparse.ArgumentParser, rounds: int = 15) -> None:
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--threads", type=positive, metavar="N", help="default: PyTorch's")
    text = f"samples of each case (default: {rounds})"
    p.add_argument("--rounds", type=positive, default=rounds, metavar="N", help=text)


def add_runs(p: argparse.ArgumentParser) -> None:
    text = "trained runs instead: of a sweep, outputs/<name>, or a single one"
    p.add_argument("--runs", type=Path, metavar="FOLDER", help=text)


def add_dtype(p: argparse.ArgumentParser, default: str) -> None:
    text = f"amp: fp32 weights under bf16 autocast (default: {default})"
    p.add_argument("--dtype", choices=["fp32", "amp"], default=default, help=text)


def add_k(p: argparse.ArgumentParser, default: list[float]) -> None:
    text = f"mean experts per token in training (default: {' '.join(f'{k:g}' for k in default)})"
    p.add_argument("--k", nargs="+", type=float, default=default, metavar="K", help=text)


def add_json(p: argparse.ArgumentParser, command: str) -> None:
    text = f"default: outputs/bench/{command}-<date-time>.json"
    p.add_argument("--json", type=Path, metavar="FILE", help=text)


def add_baseline(p: argparse.ArgumentParser) -> None:
    text = "compare with the --json file of another run"
    p.add_argument("--baseline", type=Path, metavar="FILE", help=text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 0 or more")
    return int(text)


def seconds(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected seconds, more than 0")

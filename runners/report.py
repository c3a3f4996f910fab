"""``dynmoe-report``: the report of many runs, from their records alone. PyTorch is not loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dynmoe import process
from dynmoe.errors import UserError
from dynmoe.records import RecordError
from dynmoe.report.run import Run
from dynmoe.report.runs import Collection, read_runs
from dynmoe.report.tables import to_rich

DESCRIPTION = """Reads records and writes one report of all runs in the given folders into the
folder report/ of the first: report.html, report.md, tables as CSV and LaTeX, figures as PNG and
SVG. FOLDER is the folder of a sweep, outputs/<name>, or of a run, outputs/<name>/<run>. Two run
folders are compared with each other on the console instead."""
NO_OUT = "--out: expected with a report of sweeps, found with {}; leave it out"


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit 0, or 2 with a message that names what is wrong."""
    with process.command("dynmoe-report", "The same command begins again."):
        args = _arguments(arguments)
        try:
            _write(args)
        except OSError as error:  # a file of a run, or of --out
            place = f"{error.filename}: " if error.filename else ""
            text = f"{place}{error.strerror or error}. Mend that, or leave the folder out"
            raise UserError(text) from None


def _write(args: argparse.Namespace) -> None:
    if args.domainbed is not None:
        if args.out is not None:
            raise UserError(NO_OUT.format("--domainbed, whose tables go into its folder"))
        from dynmoe.report import domainbed

        print(domainbed.write(args.domainbed), end="")
    elif len(args.folders) == 2 and all((each / "run.json").exists() for each in args.folders):
        if args.out is not None:
            raise UserError(NO_OUT.format("two runs, which are compared on the console"))
        if args.by_loss:
            raise UserError("--by-loss: two runs are compared by all their measures; leave it out")
        _compare(*args.folders)
    else:
        name = "report_by_loss" if args.by_loss else "report"
        _report(args.folders, args.out or args.folders[0] / name, args.by_loss)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; argparse alone would ask for a folder before it names an option that there is not."""
    parser = _parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not args.folders and args.domainbed is None:
        parser.error("expected FOLDER, of a sweep or a run, or --domainbed FOLDER")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynmoe-report", description=DESCRIPTION)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", default=[])
    what.add_argument(
        "--domainbed",
        type=Path,
        metavar="FOLDER",
        help="print DomainBed's own result tables of the records in FOLDER, and save them there",
    )
    parser.add_argument(
        "--by-loss",
        action="store_true",
        help="select and report by mean loss (negative log-likelihood) in the place of the score: "
        "it shows differences that an accuracy is too coarse for",
    )
    parser.add_argument("--version", action="store_true", help="print the version and the commit")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the report goes")
    return parser


def _report(folders: Sequence[Path], out: Path, by_loss: bool) -> None:
    collection = read_runs(folders, by_loss)
    _warn(collection.warnings, Console(stderr=True))
    if not collection.runs:
        raise _nothing_finished(collection)

    from dynmoe.report import page
    from dynmoe.report.claim_tables import statements

    page.write(collection, out)
    console = Console()
    for sentence in statements(collection):
        console.print(Text(sentence))
    if collection.absent:
        console.print(Text("\n".join(["\nWithout a result:", *_absent(collection)])))
    page_file = out / "report.html"  # printed without wrapping, to be copied
    number = len(collection.runs)
    print(f"\n{number} run{'s' * (number != 1)} reported:\n{page_file}")


def _warn(warnings: Sequence[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text(f"warning: {warning}", "yellow"))


def _compare(a: Path, b: Path) -> None:
    if a.resolve() == b.resolve():
        raise RecordError(f"{a}: expected two runs, found the same one twice")
    first, second = _run(a), _run(b)

    from dynmoe.report.summary import compare

    result = compare(first, second)
    console = Console()
    _warn(result.warnings, console)
    for sentence in result.sentences:
        console.print(Text(sentence))
    for table in result.tables:
        console.print(to_rich(table))


def _run(folder: Path) -> Run:
    """Read a finished run alone, so that a run and its repeat under other versions both count."""
    collection = read_runs([folder])
    runs = [*collection.runs, *collection.others]
    if not runs:
        raise _nothing_finished(collection)
    return runs[0]


def _absent(collection: Collection) -> list[str]:
    return [
        f"  {entry.name}: {entry.state}{f', {entry.why}' if entry.why else ''}"
        for entry in collection.absent
    ]


def _nothing_finished(collection: Collection) -> RecordError:
    folders = ", ".join(map(str, collection.folders))
    reasons = [*_absent(collection), *(f"  {warning}" for warning in collection.warnings)]
    return RecordError("\n".join([f"{folders}: expected a finished run, found none", *reasons]))


if __name__ == "__main__":
    main()

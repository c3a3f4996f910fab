"""A report as a document, independent of its forms.

`write` shows one document as a page of HTML that needs no other file, as Markdown that links its
figures, and writes every table and figure into separate files.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from dynmoe.records import replace_file
from dynmoe.report.drawing import save
from dynmoe.report.tables import Strong, Table, to_csv, to_latex, to_markdown

# Signs that Markdown reads as markup within a line.
MARKUP = re.compile(r"([\\`*|<\[\]])")

# Table cells with more letters are prose, and break anywhere; others only before a bracket.
LONG = 45
BRACKET = re.compile(r" (?=[(\[])")


@dataclass(frozen=True)
class Picture:
    """A figure; `alt` describes it, `caption` explains how to read it."""

    name: str
    """Name of its files, unique in the document."""
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class Sheet:
    """A table with the name of its files, unique in the document."""

    name: str
    table: Table


@dataclass(frozen=True)
class Items:
    """A list with bullets."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Commands, shown as they are."""

    text: str


# A paragraph is text; a `Strong` one is a finding.
Block = str | Items | Code | Sheet | Picture


@dataclass(frozen=True)
class Section:
    name: str
    """Target of links, unique in the document."""
    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Document:
    title: str
    blocks: Sequence[Block]
    sections: Sequence[Section]


def write(document: Document, out: Path) -> list[Path]:
    """Write `report.html`, `report.md`, `tables/` and `figures/` into the folder `out`."""
    written = []

    def text(name: str, content: str) -> Path:
        replace_file(out / name, content)
        return out / name

    for block in _walk(document):
        if isinstance(block, Sheet):
            written.append(text(f"tables/{block.name}.csv", to_csv(block.table)))
            written.append(text(f"tables/{block.name}.tex", to_latex(block.table)))
        elif isinstance(block, Picture):
            for form in ("png", "svg"):
                written.append(save(block.figure, out / "figures" / f"{block.name}.{form}"))
    vectors = {path.stem: path.read_bytes() for path in written if path.suffix == ".svg"}
    pages = {"report.html": to_html(document, vectors), "report.md": to_text(document)}
    return [*(text(name, content) for name, content in pages.items()), *written]


def to_html(document: Document, vectors: dict[str, bytes]) -> str:
    """Return one page that needs no other file; `vectors` are the pictures as SVG, by name."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests |= {
        kind.__name__.lower(): lambda block, kind=kind: isinstance(block, kind)
        for kind in (Strong, Items, Code, Sheet, Picture)
    }
    environment.tests["long"] = lambda cell: len(cell) > LONG
    environment.filters["parts"] = BRACKET.split
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    source = files("dynmoe.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(document=document, vectors=vectors)


def to_text(document: Document) -> str:
    """Return Markdown; figures are linked relative to it."""
    contents = "\n".join(_contents(document.sections))
    parts = [f"# {_plain(document.title)}", *map(_block, document.blocks), contents]
    for section in document.sections:
        parts += _section(section, "##")
    return "\n\n".join(part for part in parts if part) + "\n"


def _contents(sections: Sequence[Section], indent: str = "") -> Iterator[str]:
    for section in sections:
        yield f"{indent}- [{_plain(section.title)}](#{section.name})"
        yield from _contents(section.sections, indent + "  ")


def _section(section: Section, mark: str) -> Iterator[str]:
    yield f'<a id="{section.name}"></a>'
    yield f"{mark} {_plain(section.title)}"
    yield from map(_block, section.blocks)
    for part in section.sections:
        yield from _section(part, mark + "#")


def _block(block: Block) -> str:
    match block:
        case Strong():
            return f"**{_plain(block)}**"
        case str():
            return _plain(block)
        case Items(lines):
            return "\n".join(f"- {_plain(line)}" for line in lines)
        case Code(text):
            fence = "`" * max([3, *(1 + len(each) for each in re.findall("`+", text))])
            return f"{fence}\n{text}\n{fence}"
        case Sheet(name, table):
            files = f"[CSV](tables/{name}.csv), [LaTeX](tables/{name}.tex)"
            note = f"{_plain(table.foot)} " if table.foot else ""
            columns, *rows = (tuple(map(_plain, row)) for row in (table.columns, *table.rows))
            cells = to_markdown(replace(table, columns=columns, rows=tuple(rows)))
            return f"**{_plain(table.title)}**\n\n{cells}\n\n{note}{files}"
        case Picture(name, _, alt, caption):
            files = f"[PNG](figures/{name}.png), [SVG](figures/{name}.svg)"
            return f"![{_plain(alt)}](figures/{name}.png)\n\n{_plain(caption)} {files}"


def _plain(text: str) -> str:
    """Escape text for Markdown; a `Strong` one stays strong."""
    return type(text)(MARKUP.sub(r"\\\1", text))


def _walk(part: Document | Section) -> Iterator[Block]:
    """Yield all blocks, in reading order."""
    yield from part.blocks
    for section in part.sections:
        yield from _walk(section)

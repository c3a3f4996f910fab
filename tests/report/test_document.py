"""A document is shown as HTML that needs no other file and as Markdown whose links resolve."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dynmoe.report.document import Code, Document, Items, Picture, Section, Sheet, write
from dynmoe.report.tables import Strong, Table, format_mean, format_points

TABLE = Table("A & B <i>", ("setting", "acc"), (("a|b_c", Strong("1 < 2")), ("*d*", "3")), "note >")


class Page(HTMLParser):
    """What a reader sees: elements with their attributes, texts, and cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def picture(name: str = "line") -> Picture:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return Picture(name, figure, 'A "line"', "Up <is> better.")


@pytest.fixture
def document() -> Document:
    inner = Section("inner", "Inner [x]", [Sheet("inner_table", TABLE)])
    outer = Section(
        "outer", "Outer", [picture(), Items(["one", "<two>"]), Code("run a=*")], [inner]
    )
    return Document("Title & more", [Strong("It `beats` <all>."), "Plain."], [outer])


def test_files_of_a_document(document: Document, tmp_path: Path) -> None:
    written = write(document, tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "report.html",
        "report.md",
        "figures/line.png",
        "figures/line.svg",
        "tables/inner_table.csv",
        "tables/inner_table.tex",
    ]
    assert all(path.stat().st_size for path in written)


def test_the_page_holds_all_it_shows_and_escapes_it(document: Document, tmp_path: Path) -> None:
    write(document, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "http" not in text and "<script" not in text
    sources = [values["src"] for tag, values in page.elements if tag == "img"]
    assert [str(source)[:26] for source in sources] == ["data:image/svg+xml;base64,"]
    assert [values["alt"] for tag, values in page.elements if tag == "img"] == ['A "line"']
    seen = "".join(page.texts)
    for part in ("Title & more", "It `beats` <all>.", "Up <is> better.", "<two>", "note >"):
        assert part in seen
    assert page.rows == [["setting", "acc"], ["a|b_c", "1 < 2"], ["*d*", "3"]]
    anchors = {values.get("id") for _, values in page.elements}
    links = [str(values["href"]) for tag, values in page.elements if tag == "a"]
    assert links == ["#outer", "#inner"] and {link[1:] for link in links} <= anchors


def test_markdown_of_a_document(document: Document, tmp_path: Path) -> None:
    write(document, tmp_path)
    assert (
        (tmp_path / "report.md").read_text()
        == r"""# Title & more

**It \`beats\` \<all>.**

Plain.

- [Outer](#outer)
  - [Inner \[x\]](#inner)

<a id="outer"></a>

## Outer

![A "line"](figures/line.png)

Up \<is> better. [PNG](figures/line.png), [SVG](figures/line.svg)

- one
- \<two>

```
run a=*
```

<a id="inner"></a>

### Inner \[x\]

**A & B \<i>**

| setting | acc |
| --- | ---: |
| a\|b_c | **1 \< 2** |
| \*d\* | 3 |

note > [CSV](tables/inner_table.csv), [LaTeX](tables/inner_table.tex)
"""
    )
    for link in links(tmp_path / "report.md"):
        assert (tmp_path / link).is_file()


def test_csv_has_the_cells_as_they_are(document: Document, tmp_path: Path) -> None:
    write(document, tmp_path)
    with (tmp_path / "tables" / "inner_table.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["setting", "acc"], ["a|b_c", "1 < 2"], ["*d*", "3"]]


def test_the_same_document_is_the_same_bytes(document: Document, tmp_path: Path) -> None:
    first = write(document, tmp_path / "a")
    second = write(document, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def links(markdown: Path) -> list[str]:
    """Files that the text links."""
    return re.findall(r"\]\(([^)#]+)\)", markdown.read_text())


def test_a_table_of_words_stands_on_the_left(tmp_path: Path) -> None:
    words = Table("Words", ("what", "how"), (("backbone", "a ViT"),), in_words=True)
    write(Document("Title", [Sheet("words", words)], []), tmp_path)
    assert '<table class="words">' in (tmp_path / "report.html").read_text()
    assert "| --- | --- |" in (tmp_path / "report.md").read_text()
    assert r"\begin{tabular}{ll}" in (tmp_path / "tables" / "words.tex").read_text()


def test_a_figure_stays_legible_on_a_phone(document: Document, tmp_path: Path) -> None:
    write(document, tmp_path)
    assert 'style="width: 192px; min-width: 153px"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("accuracies", "cell"),
    [
        ([0.1, 0.2, 0.3], "20.0 +/- 4.7"),
        ([0.5], "50.0"),
        ([], "X"),
        # 48.25 and 23.75: the order of DomainBed's operations decides the digit.
        ([0.405, 0.735, 0.3075], "48.3 +/- 10.6"),
        ([0.235, 0.24, 0.2375], "23.7 +/- 0.1"),
    ],
)
def test_format_mean(accuracies: list[float], cell: str) -> None:
    assert format_mean(accuracies) == cell


def test_format_points() -> None:
    cells = [format_points(difference) for difference in (0.0234, -0.0234, 0.0, -0.0001, -1e-5)]
    assert cells == ["+2.3", "−2.3", "0.0", "−0.01", "0.0"]

#!/usr/bin/env bash
# A figure with a layout engine is drawn twice for each file that is saved, even after the layout was switched off.
#
# savefig of a figure with layout="constrained" (or "tight", "compressed") walks through all artists twice: once to find
# out sizes, with a renderer that writes nothing, and once for the file. One expects the first walk to end with
# set_layout_engine("none") after the layout has been found, e.g. before the same figure is saved as PNG and as SVG. It
# does not: where a colour bar or a constrained layout was there, a placeholder engine stays, and placeholders count as
# engines. print_png of an Agg canvas, which does not ask for a layout, draws once, and the bytes are those of savefig.
#
# Seen with matplotlib 3.11.2 and Python 3.11, 2026-11-29. Exits with 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" matplotlib==3.11.2
PYTHONPATH="$folder" python3 - <<'PYTHON'
import io
import sys

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

drawn = 0


class Counted(Line2D):
    def draw(self, renderer) -> None:
        global drawn
        drawn += 1
        super().draw(renderer)


def figure(layout: str | None) -> Figure:
    made = Figure(layout=layout)
    axes = made.add_subplot()
    axes.add_line(Counted([0, 1], [0, 1]))
    axes.set_xlabel("a label")
    return made


def draws(save) -> tuple[int, bytes]:
    global drawn
    drawn, file = 0, io.BytesIO()
    save(file)
    return drawn, file.getvalue()


plain, _ = draws(lambda file: figure(None).savefig(file))
laid_out = figure("constrained")
engine, by_savefig = draws(laid_out.savefig)
laid_out.set_layout_engine("none")
switched_off, again = draws(laid_out.savefig)
canvas, by_canvas = draws(FigureCanvasAgg(laid_out).print_png)
print("draws of a line for one file: without a layout", plain)
print("with layout='constrained':", engine)
print("after set_layout_engine('none'):", switched_off, type(laid_out.get_layout_engine()).__name__)
print("by the canvas:", canvas, "same bytes:", by_canvas == again)
as_described = (plain, engine, switched_off, canvas) == (1, 2, 2, 1) and by_canvas == again
sys.exit(0 if as_described else 1)
PYTHON

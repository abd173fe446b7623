"""Figures as SVG: text stays text, and the same numbers give the same bytes.

matplotlib takes half a second to import, so it is imported where something is drawn.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def canvas(width: float, height: float, columns: int = 1, **subplots) -> tuple["Figure", list]:
    """An empty figure in inches, and its axes side by side. subplots: further options of Figure.subplots."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    [row] = figure.subplots(1, columns, squeeze=False, **subplots)
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(row)


def save(figure: "Figure", file: Path | io.StringIO) -> None:
    """Write the figure as SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanomed"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def svg(figure: "Figure") -> str:
    """The figure's <svg> element, for a page of HTML."""
    out = io.StringIO()
    save(figure, out)
    return out.getvalue()[out.getvalue().index("<svg") :]

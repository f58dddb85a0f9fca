"""Charts of the page: specifications that plotly's script draws in the reader's browser."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recon.report.groups import Group, Row
from recon.report.looks import LOOKS, REFERENCE, Look

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon", "x", "bowtie")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Rows of one scope share its colour; their markers and lines differ."""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        title: Its heading.
        data: Traces, as `plotly.graph_objects` takes them.
        layout: Axes and the like; colours of text, paper and grid follow the page's theme.
        caption: How to read it, and the fields of the reports that it shows.
        height: Pixels.
        is_wide: Whether it takes the page's width.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    caption: str
    height: int = 380
    is_wide: bool = False

    @property
    def json(self) -> str:
        """The specification, checked by plotly, for a script element of the page."""
        from plotly.graph_objects import Figure  # half a second that only a page should take

        text = Figure({"data": self.data, "layout": {"template": "none", **self.layout}}).to_json()
        assert isinstance(text, str)
        return text.replace("</", "<\\/")


def look_of(row: Row) -> Look:
    """The colour and marker of a row's scope."""
    return LOOKS.get(row.scope, REFERENCE)


def styled(group: Group, row: Row) -> tuple[str, str]:
    """The marker and the dash of a row: those of its scope, and others for further rows of that scope."""
    place = [other.label for other in group.rows if other.scope == row.scope].index(row.label)
    own = look_of(row).symbol
    symbols = [own, *(symbol for symbol in SYMBOLS if symbol != own)]
    return symbols[place % len(symbols)], DASHES[place % len(DASHES)]


def axis(title: str, log: Iterable[float | None] = (), **more: Any) -> dict[str, Any]:
    """An axis; a logarithmic one, of the values `log`, has ticks at 1, 2 and 5, over several decades at 1."""
    values = [value for value in log if value is not None and value > 0]
    if values:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        digits = (1, 2, 5) if high - low <= 3 else (1,)
        ticks = [float(f"{digit}e{power}") for power in range(low - 1, high + 1) for digit in digits]
        more = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.10g}" for tick in ticks], **more}
    return {"title": {"text": title}, "automargin": True, **more}


def y_of(data: Iterable[dict[str, Any]]) -> list[float | None]:
    """All values of some traces."""
    return [value for trace in data for value in trace["y"]]

"""The style that all pictures share: colours and markers, title and footnotes, files.

Pictures use matplotlib's object-oriented interface alone: no pyplot, hence no global figures, no window, and no state
left behind in the process that draws.
"""

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from recon.basics.files import atomic_write
from recon.report.groups import Group, group_cells
from recon.report.schema import Results

WIDTH = 9.6
"""Inches of every picture."""

PNG_DPI = 150

GREY, DARK = "#9a9a9a", "#333333"


@dataclass(frozen=True)
class Look:
    """How a scope is drawn: Okabe and Ito's colour-blind-safe colours, a darker ink for its label."""

    color: str
    ink: str
    marker: str
    size: float

    @property
    def extent(self) -> float:
        """Width and height in points; a diamond is a square of `size` on its tip."""
        return self.size * 2**0.5 if self.marker == "D" else self.size


# larger scopes have larger markers and are drawn first: coinciding points all stay visible
LOOKS = {
    "full": Look("#CC79A7", "#8f3f6d", "^", 11.0),
    "block": Look("#009E73", "#00664a", "D", 7.5),
    "submodule": Look("#0072B2", "#00507d", "s", 7.0),
    "matrix": Look("#D55E00", "#9c4500", "o", 6.0),
}


def frame(figure: Figure, group: Group, split: str, notes: list[str], height: float) -> None:
    """Title, footnotes, and the room that is left to the panels of a figure `WIDTH` wide and `height` inches high."""
    num_seeds = len(group.seeds)
    seeds = f"{num_seeds} seeds (mean ± standard deviation)" if num_seeds > 1 else "1 seed"
    text = f"{group.text}, " if group.text else ""
    facts = f"{text}criterion {group.criterion}, pattern {group.pattern}, {split} split, {seeds}"
    title = textwrap.wrap(group.model, 90)
    subtitle = textwrap.wrap(facts, 130)
    footnotes = [line for note in notes for line in textwrap.wrap(note, 150)]

    title_inches, line_inches, foot_inches = 0.2 * len(title), 0.17 * len(subtitle), 0.145 * len(footnotes)
    top = 0.12 + title_inches + line_inches + 0.08
    figure.subplots_adjust(
        left=0.8 / WIDTH,
        right=1 - 0.2 / WIDTH,
        bottom=(0.58 + foot_inches) / height,
        top=1 - top / height,
        wspace=0.08,
    )
    figure.text(0.8 / WIDTH, 1 - 0.1 / height, "\n".join(title), size=11, weight="bold", va="top", color=DARK)
    y = 1 - (0.12 + title_inches) / height
    figure.text(0.8 / WIDTH, y, "\n".join(subtitle), size=9, va="top", color=DARK)
    figure.text(0.8 / WIDTH, 0.08 / height, "\n".join(footnotes), size=7.5, va="bottom", color="#666666")


@contextmanager
def plain_style() -> Iterator[None]:
    """Matplotlib as shipped, whatever the user's matplotlibrc says; SVG text is text and ids are fixed."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "recon", "font.size": 9.0})
        yield


def save(figure: Figure, directory: Path, stem: str) -> list[Path]:
    """Write `figure` to `stem`.png and `stem`.svg, without a date: equal figures make equal files."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        paths.append(directory / f"{stem}.{kind}")
        with atomic_write(paths[-1]) as temporary:
            figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)
    return paths


def draw_groups(results: Results, directory: Path, kind: str, draw: Callable[[Group], Figure | None]) -> list[Path]:
    """Write one picture of a `kind` for each comparable group of which `draw` makes one; return the files."""
    groups = group_cells(results)
    written = []
    for group, stem in zip(groups, stems(kind, groups), strict=True):
        with plain_style():
            if (figure := draw(group)) is not None:
                written += save(figure, directory, stem)
    return written


def stems(kind: str, groups: list[Group]) -> list[str]:
    """File names of pictures of one `kind` without suffix, one per group and all different."""
    if len(groups) == 1:
        return [kind]
    names: list[str] = []
    for group in groups:
        words = f"{group.model} {group.text} {group.criterion} {group.pattern}".lower()
        stem = f"{kind}-" + re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")
        num_same = sum(re.fullmatch(re.escape(stem) + r"(-\d+)?", other) is not None for other in names)
        names.append(f"{stem}-{num_same + 1}" if num_same else stem)
    return names

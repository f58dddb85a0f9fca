"""The style that all pictures share: colours and markers, title and footnotes, files.

Pictures use matplotlib's object-oriented interface alone: no pyplot, hence no global figures, no window, and no state
left behind in the process that draws.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recon.basics.files import atomic_write
from recon.report.groups import Group, Row, group_cells
from recon.report.looks import DARK, LOOKS
from recon.report.schema import Results

WIDTH = 9.6
"""Inches of every picture."""

PNG_DPI = 150

HEIGHT, MOST_NAMES = 4.8, 16
"""Inches of a picture, and names that find room in its legend; more make it higher."""

NAME_INCHES = 0.21

LONGEST_NAME = 60
"""Characters of a name in a legend; the table has all of it."""

MARKERS = ("o", "s", "D", "^", "P", "*", "p", "h", "X", "v", "<", ">")
"""Rows of one scope share its colour; their markers differ."""


def height_of(num_names: int) -> float:
    """Inches of a picture whose legend has so many names."""
    return HEIGHT + max(0, num_names - MOST_NAMES) * NAME_INCHES


def markers_of(rows: Iterable[Row]) -> dict[str, str]:
    """Label of each row -> its marker: that of the scope, others for further rows of the scope."""
    found: dict[str, str] = {}
    places: Counter[str] = Counter()
    for row in rows:
        own = LOOKS[row.scope].marker if row.scope in LOOKS else ""
        all_markers = [own, *(marker for marker in MARKERS if marker != own)]
        found[row.label] = all_markers[places[row.scope] % len(all_markers)]
        places[row.scope] += 1
    return found


def legend(figure: Figure, axes: Sequence[Axes], behind: Mapping[str, str] | None = None) -> None:
    """Name what is drawn, once, to the right of the axes, which make room for it.

    Args:
        figure: The picture, with its panels in place.
        axes: The panels.
        behind: Label of each line -> what the legend has behind it, in that order; nothing, in order, if None.
    """
    pairs = [zip(*one.get_legend_handles_labels(), strict=True) for one in axes]
    handles = {label: handle for one in pairs for handle, label in one}
    shown = dict.fromkeys(handles, "") if behind is None else behind
    found = figure.legend(
        [handles[label] for label in shown],
        [f"{textwrap.shorten(label, LONGEST_NAME)}{text}" for label, text in shown.items()],
        loc="upper right",
        bbox_to_anchor=(1 - 0.1 / WIDTH, figure.subplotpars.top + 0.1 / figure.get_figheight()),
        frameon=False,
        fontsize=8.5,
    )
    figure.draw_without_rendering()  # measures the text
    width = found.get_window_extent().width / figure.bbox.width
    figure.subplots_adjust(right=1 - width - 0.25 / WIDTH)


def frame(figure: Figure, group: Group, split: str, notes: list[str], height: float) -> None:
    """`framed` for the picture of one group, which the title and the line below name."""
    text = f"{group.text}, " if group.text else ""
    facts = f"{text}criterion {group.criterion}, pattern {group.pattern}, {split} split, {said_of_seeds(group.seeds)}"
    framed(figure, group.model, facts, notes, height)


def said_of_seeds(seeds: Sequence[int]) -> str:
    """How many seeds a picture shows."""
    return f"{len(seeds)} seeds (mean ± standard deviation)" if len(seeds) > 1 else "1 seed"


def framed(figure: Figure, name: str, facts: str, notes: Sequence[str], height: float) -> None:
    """Title, footnotes, and the room that is left to the panels of a figure `WIDTH` wide and `height` inches high."""
    title = textwrap.wrap(name, 90)
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

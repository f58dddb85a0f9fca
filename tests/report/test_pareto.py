import functools
import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from recon.report import Report, Results, draw_pareto
from recon.report.front import pareto_front
from recon.report.groups import group_cells
from recon.report.looks import LOOKS
from recon.report.plots.pareto import draw_group
from recon.report.plots.style import plain_style

# perplexity, seconds, MiB
REALISTIC = {
    "dense": (10.13, 0.0, 500.0),
    "pruned": (16.33, 0.0, 500.0),
    "matrix": (12.74, 6.0, 620.0),
    "submodule": (11.58, 33.0, 660.0),
    "block": (11.55, 35.0, 664.0),
    "full": (13.17, 30.0, 820.0),
}
RECOVERED = ("matrix", "submodule", "block", "full")


def cell(scope: str, perplexity: float | None, seconds: float, mib: float, **changes: Any) -> Report:
    values: dict[str, Any] = {
        "model": "distilbert/distilgpt2",
        "criterion": "wanda",
        "pattern": "2:4",
        "seed": 0,
    }
    values |= {"perplexity": perplexity, "seconds": seconds, "peak_host_bytes": int(mib * 2**20)}
    return Report(scope=scope, **(values | changes))


def cells(rows: dict[str, tuple[float, float, float]] | None = None, **changes: Any) -> list[Report]:
    return [cell(scope, *numbers, **changes) for scope, numbers in (REALISTIC | (rows or {})).items()]


HARD = {
    "realistic": cells(),
    "all points coincide": cells(dict.fromkeys(RECOVERED, (12.0, 30.0, 600.0))),
    "ten labels on one spot": cells(dict.fromkeys(RECOVERED, (12.0, 30.0, 600.0)))
    + [cell("block", 12.0, 30.0, 600.0, label=f"block x{n}") for n in (2, 3, 4, 6, 8, 12)],
    "one outlier": cells({"full": (62.0, 900.0, 24_000.0)}),
    "a diverged outlier": cells({"full": (48_112.0, 31.0, 820.0)}),
    "within 0.01": cells({name: (12.0 + 0.003 * i, 30.0 + i, 600.0 + i) for i, name in enumerate(RECOVERED)}),
    "on the lines": cells({"matrix": (10.13, 6.0, 620.0), "full": (16.33, 30.0, 820.0)}),
    "everything equal": cells(dict.fromkeys(REALISTIC, (12.0, 30.0, 600.0))),
    "pruned far away": cells({"pruned": (512.0, 0.0, 500.0)}),
    "zero seconds": cells({"matrix": (12.74, 0.0, 620.0)}),
    "windows of many sizes": cells()
    + [cell("block", 11.55 + 0.001 * n, 35.0 + n / 5, 664.0 + n, label=f"block x{n}") for n in range(2, 13)],
    "five decades of seconds": cells({"matrix": (12.74, 0.5, 620.0), "full": (13.0, 50_000.0, 80_000.0)}),
    "three seeds": [
        cell(scope, ppl + 0.1 * seed, seconds * (1 + 0.1 * seed), mib + 5 * seed, seed=seed)
        for seed in range(3)
        for scope, (ppl, seconds, mib) in REALISTIC.items()
    ],
    "one point, no reference": [cell("matrix", 12.74, 6.0, 620.0)],
    "long names": cells(model="/scratch/" + "a-very-long-directory/" * 9, pattern="unstructured 50 % per row"),
}


def drawn(results: list[Report]) -> Figure:
    (group,) = group_cells(Results(results))
    with plain_style():
        figure = draw_group(group)
        assert figure is not None
        FigureCanvasAgg(figure).draw()
    return figure


@functools.cache
def picture(case: str) -> Figure:
    return drawn(HARD[case])


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that the picture shows: titles, notes, ticks, axis and point labels."""
    found = []
    for artist in figure.findobj(Text):
        assert isinstance(artist, Text)
        if artist.get_text().strip() and artist.get_visible():
            found.append((artist.get_text(), Text.get_window_extent(artist)))
    return [(text, box) for text, box in found if _is_shown(figure, text, box)]


def _is_shown(figure: Figure, text: str, box: Bbox) -> bool:
    """Ticks beyond the limits exist as artists but are never drawn; neither are the right panel's y ticks."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                for label in (tick.label1, tick.label2):
                    if label.get_text() == text and Text.get_window_extent(label).bounds == box.bounds:
                        return label.get_visible() and low <= tick.get_loc() <= high
    return True


def names(figure: Figure) -> list[str]:
    """The entries of the legend."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("case", HARD)
def test_no_text_overlaps_any_other(case: str) -> None:
    figure = picture(case)
    for (one, box), (other, other_box) in itertools.combinations(texts(figure), 2):
        assert not box.overlaps(other_box), f"{one!r} overlaps {other!r}"
    for text, box in texts(figure):
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text


@pytest.mark.parametrize("case", HARD)
def test_every_point_and_line_is_named_once_and_no_two_look_alike(case: str) -> None:
    figure = picture(case)
    expected = {report.label for report in HARD[case] if report.scope in LOOKS}
    assert expected <= set(names(figure))
    for reference in ("dense", "pruned"):
        wanted = any(report.scope == reference for report in HARD[case])
        assert sum(name.startswith(reference) for name in names(figure)) == wanted
    assert len(names(figure)) == len(set(names(figure)))
    (legend,) = figure.legends
    for axes in figure.axes:
        assert axes.bbox.x1 < legend.get_window_extent().x0
        points = [line for line in axes.lines if line.get_marker() not in ("None", "", "|", "_")]
        assert len(points) == len(expected)
        assert len({(line.get_color(), str(line.get_marker())) for line in points}) == len(expected)


def test_the_overlap_check_can_fail() -> None:
    figure = drawn(HARD["realistic"])
    one, other = figure.texts[:2]
    one.set_position(other.get_position())
    boxes = [box for _, box in texts(figure)]
    assert any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(("seconds", "scale"), [(120.0, "linear"), (120.1, "log")])
def test_a_range_beyond_20_is_logarithmic(seconds: float, scale: str) -> None:
    figure = drawn(cells({"full": (13.17, seconds, 820.0)}))
    assert figure.axes[0].get_xscale() == "linear"
    assert figure.axes[1].get_xscale() == scale


def test_seeds_become_one_point_with_error_bars() -> None:
    figure = picture("three seeds")
    assert "3 seeds (mean ± standard deviation)" in " ".join(text for text, _ in texts(figure))
    (line,) = [line for line in figure.axes[1].lines if line.get_marker() == LOOKS["matrix"].marker]
    assert line.get_xdata()[0] == pytest.approx(6.6)
    bars = [bar.get_segments()[0] for bar in figure.axes[1].collections]
    widths = [end[0] - start[0] for start, end in bars if start[0] < 6.6 < end[0] and start[1] == end[1]]
    assert widths == [pytest.approx(2 * 0.6)]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(6.0, 12.74), (33.0, 11.58), (35.0, 11.55), (30.0, 13.17), (33.0, 11.58), (40.0, 11.55)]
    assert pareto_front(points) == [(6.0, 12.74), (33.0, 11.58), (35.0, 11.55)]
    assert pareto_front([]) == []
    for point in set(points):
        beaten = any(all(b <= a for a, b in zip(point, other, strict=True)) for other in points if other != point)
        assert beaten == (point not in pareto_front(points))


def test_device_peaks_are_preferred_and_their_absence_noted() -> None:
    results = cells({}, peak_device_bytes=2**30)
    results[2] = results[2].replace(peak_device_bytes=None)
    figure = drawn(results)
    assert figure.axes[0].get_xlabel() == "peak device memory, allocated (MiB)"
    assert len(figure.axes[0].containers) == len(figure.axes[1].containers) - 1
    assert "Without a measured peak device memory, allocated: matrix" in " ".join(text for text, _ in texts(figure))
    assert drawn(cells()).axes[0].get_xlabel() == "peak host memory (MiB)"


def test_failed_cells_are_left_out_and_named() -> None:
    failed = cell("block", None, 0.0, 0.0, label="block x4", status="failed", error="out of memory", run_dir="runs/x")
    figure = drawn([*cells(), failed])
    assert "block x4" not in names(figure)
    footnotes = " ".join(text for text, _ in texts(figure))
    assert "Left out: block x4 (seed 0) failed in runs/x: out of memory" in footnotes


def test_the_title_says_what_is_compared() -> None:
    shown = " ".join(text for text, _ in texts(drawn(cells(protocol={"split": "validation"}))))
    for fact in ("distilbert/distilgpt2", "criterion wanda", "pattern 2:4", "validation split", "1 seed"):
        assert fact in shown


def test_references_are_lines_even_without_cells_of_their_own() -> None:
    rows = [report for report in cells(dense_perplexity=10.0, pruned_perplexity=16.0) if report.scope in LOOKS]
    assert {"dense 10.00", "pruned 16.00"} <= set(names(drawn(rows)))


def test_one_picture_a_group_and_no_name_twice(tmp_path: Path) -> None:
    assert [path.name for path in draw_pareto(Results(cells()), tmp_path)] == ["pareto.png", "pareto.svg"]
    groups = [*cells(), *cells(pattern="2-4"), *cells(criterion="magnitude")]
    groups.append(cell("dense", 10.0, 0.0, 1.0, model="nothing recovered"))
    written = draw_pareto(Results(groups), tmp_path)
    stem = "pareto-distilbert-distilgpt2"
    assert [path.name for path in written if path.suffix == ".png"] == [
        f"{stem}-wanda-2-4.png",
        f"{stem}-wanda-2-4-2.png",
        f"{stem}-magnitude-2-4.png",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written} | {
        "pareto.png",
        "pareto.svg",
    }


def test_files_are_deterministic_and_svg_text_is_text(tmp_path: Path) -> None:
    first = draw_pareto(Results(cells()), tmp_path / "a")
    second = draw_pareto(Results(cells()), str(tmp_path / "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    svg = first[1].read_text(encoding="utf-8")
    words = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]
    assert {"matrix", "submodule", "block", "full", "pruned 16.33"} <= set(words)
    assert not re.search(r"<dc:date>", svg)


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    assert draw_pareto(Results([cell("dense", 10.0, 0.0, 500.0)]), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    # dict.copy: looking up the backend by key would import pyplot
    before = dict.copy(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    draw_pareto(Results(cells()), tmp_path)
    assert (dict.copy(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules) == before

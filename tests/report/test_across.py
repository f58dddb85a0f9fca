"""Tables and the picture over all groups of a comparison."""

import math
from pathlib import Path

import pytest

from recon.report import Results, draw_across, markdown_table
from recon.report.across import across_sections, differing, lines_along
from recon.report.groups import group_cells
from recon.report.page.build import page_of
from recon.report.plots.across import MOST_PANELS, above_dense
from recon.report.plots.across import draw_across as drawn
from recon.report.plots.style import plain_style
from tests.report.test_report import failed, report

PREDICTION = {"setting": {}, "categories": {}, "host": {}, "flops": 2 * 10**9, "seconds": None}

LOSSES = {"matrix": (14.0, 15.0), "block": (11.0, 11.5)}


def study(patterns: tuple[str, ...] = ("2:4", "60%", "70%"), criteria: tuple[str, ...] = ("wanda", "alps")) -> Results:
    return Results(
        [
            report(scope, pattern=pattern, criterion=criterion, seed=seed, perplexity=perplexity + number)
            for criterion in criteria
            for number, pattern in enumerate(patterns)
            for seed in (0, 1)
            for scope, perplexity in [("dense", 9.0), *((name, LOSSES[name][seed]) for name in LOSSES)]
        ],
        name="study",
    )


def test_the_axis_with_most_places_comes_first() -> None:
    groups = group_cells(study())
    assert differing(groups) == ["pattern", "criterion"]
    assert [(line.name, list(line.groups)) for line in lines_along("pattern", groups)] == [
        ("wanda", ["2:4", "60%", "70%"]),
        ("alps", ["2:4", "60%", "70%"]),
    ]
    assert [line.name for line in lines_along("criterion", groups)] == ["2:4", "60%", "70%"]


def test_each_group_is_a_row_of_each_table() -> None:
    perplexity, best = across_sections(group_cells(study()))
    assert perplexity.header == ["pattern", "criterion", "dense", "matrix", "block"]
    assert perplexity.rows[1] == ["60%", "wanda", "10.00", "15.50 ± 0.71", "12.25 ± 0.35"]
    assert len(perplexity.rows) == len(best.rows) == 6
    assert best.rows[0][:5] == ["2:4", "wanda", "block", "matrix", f"{math.log(14 * 15 / 11 / 11.5) / 2:+.4f}"]


def test_operations_have_a_table_where_they_are_known() -> None:
    results = study()
    results.cells[:] = [cell.replace(prediction=PREDICTION) for cell in results.cells]
    operations = across_sections(group_cells(results))[1]
    assert (operations.title, operations.header[2:]) == ("GFLOP of all groups", ["matrix", "block"])
    assert operations.rows[0][2:] == ["2.00", "2.00"]


def test_a_single_group_and_runs_put_together_have_none() -> None:
    one = study(("2:4",), ("wanda",))
    assert across_sections(group_cells(one)) == []
    assert "of all groups" not in markdown_table(one)
    assert "of all groups" in markdown_table(study())
    assert "of all groups" not in markdown_table(study(), together=True)


def test_a_failed_recovery_is_missing() -> None:
    results = study()
    kept = [cell for cell in results.cells if (cell.scope, cell.pattern) != ("block", "60%")]
    results.cells[:] = [*kept, failed("block", pattern="60%", seed=0)]
    rows = {tuple(row[:2]): row for row in across_sections(group_cells(results))[0].rows}
    assert rows["60%", "wanda"][-1] == "-"


def test_the_page_has_the_tables(tmp_path: Path) -> None:
    assert "test perplexity of all groups" in page_of(study(), tmp_path / "page.html")


def test_a_point_is_the_loss_above_the_dense_model() -> None:
    group = group_cells(study())[1]
    found = above_dense(group.rows[-1], group)
    assert found is not None
    assert found.mean == pytest.approx((math.log(12.0 / 10) + math.log(12.5 / 10)) / 2)
    assert above_dense(group.rows[0], group) is None


def test_the_picture_has_a_panel_for_each_line_and_a_curve_for_each_row(tmp_path: Path) -> None:
    with plain_style():
        figure = drawn(group_cells(study()))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["wanda", "alps"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2:4", "60%", "70%"]
        assert axes.get_legend_handles_labels()[1] == ["matrix", "block"]
    curve = figure.axes[0].get_legend_handles_labels()[0][1][0]
    assert curve.get_ydata()[0] == pytest.approx((math.log(11 / 9) + math.log(11.5 / 9)) / 2)
    first = [file.read_bytes() for file in draw_across(study(), tmp_path / "a")]
    assert first == [file.read_bytes() for file in draw_across(study(), tmp_path / "b")]
    assert len(first) == 2


@pytest.mark.parametrize("case", ["one group", "no dense model", "too many panels"])
def test_no_picture_where_there_is_nothing_to_draw(case: str) -> None:
    results = study(("2:4",), ("wanda",)) if case == "one group" else study()
    if case == "no dense model":
        results.cells[:] = [cell for cell in results.cells if cell.scope != "dense"]
    if case == "too many panels":
        few = tuple(f"criterion {number}" for number in range(MOST_PANELS + 1))
        results = study(tuple(f"{number}%" for number in range(MOST_PANELS + 2)), few)
    assert drawn(group_cells(results)) is None

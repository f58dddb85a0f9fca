"""The page's table of results: each number with its value in full and the file that it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

from recon.report.columns import Column, columns_of, number_of
from recon.report.estimates import estimate
from recon.report.groups import Group, Row
from recon.report.page.sources import Source
from recon.report.sampling import perplexity_error
from recon.report.sections import MISSING, format_number


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        text: As shown.
        value: The mean over seeds in full; None if there is none.
        quantity: What it is the mean of, in reports.
        title: Where it comes from.
        error: Its standard error over sequences, of tasks over documents, as shown; empty if unknown.
    """

    text: str
    value: float | None
    quantity: str
    title: str
    error: str = ""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    label: str
    scope: str
    sources: Sequence[Source]
    cells: Sequence[Cell]
    status: str


def lines_of(group: Group, sources: dict[int, Source]) -> list[Line]:
    """The rows of a group.

    Args:
        group: The rows.
        sources: Identity of each report -> its files.
    """
    columns = columns_of(group.cells)
    return [_line(row, columns, [sources[id(cell)] for cell in row.cells]) for row in group.rows]


def _line(row: Row, columns: Sequence[Column], sources: Sequence[Source]) -> Line:
    num = len(row.of_seeds)
    status = f"{num} of {len(row.cells)}" if num < len(row.cells) else str(len(row.measured))
    return Line(row.label, row.scope, sources, [_cell(row, column, sources) for column in columns], status)


def _cell(row: Row, column: Column, sources: Sequence[Source]) -> Cell:
    value = column.estimate(row)
    if value is None:
        return Cell(MISSING, None, column.quantity, "")
    measured = [source.report for source in sources if source.cell.status == "ok"]
    title = f"{'mean of ' if len(measured) > 1 else ''}{column.quantity} in {', '.join(dict.fromkeys(measured))}"
    error = _error(row, column)
    shown = "" if error is None else format_number(error, column.decimals)
    return Cell(column.shown(row), value.mean, column.quantity, title, shown)


def _error(row: Row, column: Column) -> float | None:
    """The standard error by the choice of what was tested, which more seeds do not make smaller."""
    if column.quantity == "perplexity":
        return perplexity_error(row)
    found = estimate(number_of(cell, column.quantity, "stderr") for cell in row.measured)
    return None if found is None else found.mean * column.scale

"""The page's table of results: each number with its value in full and the file that it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from recon.report.estimates import estimate
from recon.report.groups import Group, Row
from recon.report.page.sources import Source
from recon.report.sampling import perplexity_error
from recon.report.schema import Report
from recon.report.sections import format_number, show
from recon.report.tasks import task_column


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        title: Its header.
        quantity: Attribute of `Report`; one with a standard error has `value` and `stderr`.
        scale: Factor to the unit of the header.
        decimals: As shown.
        spreads: Whether the deviation over seeds is shown.
        is_cost: Whether models as they are have none.
    """

    title: str
    quantity: str
    scale: float = 1.0
    decimals: int = 1
    spreads: bool = False
    is_cost: bool = False


COLUMNS = (
    Column("perplexity", "perplexity", decimals=2, spreads=True),
    Column("recovered (%)", "recovered", 100.0, spreads=True),
    Column("tasks (%)", "task_mean", 100.0, spreads=True),
    Column("sparsity (%)", "sparsity", 100.0),
    Column("model sparsity (%)", "model_sparsity", 100.0),
    Column("disk (MiB)", "disk_bytes", 2**-20),
    Column("peak device (MiB)", "tracked_device_bytes", 2**-20),
    Column("peak allocated (MiB)", "peak_device_bytes", 2**-20),
    Column("peak host (MiB)", "peak_host_bytes", 2**-20, decimals=0),
    Column("seconds", "seconds", is_cost=True),
    Column("training tokens", "train_tokens", decimals=0, is_cost=True),
)


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


def columns_of(group: Group) -> list[Column]:
    """The columns that a cell of the group has a number for."""
    found = [one for one in COLUMNS if any(_number(cell, one.quantity) is not None for cell in group.cells)]
    named = task_column(group.cells)
    return [replace(one, title=named[0]) if named and one.quantity == "task_mean" else one for one in found]


def lines_of(group: Group, sources: dict[int, Source]) -> list[Line]:
    """The rows of a group.

    Args:
        group: The rows.
        sources: Identity of each report -> its files.
    """
    columns = columns_of(group)
    return [_line(row, columns, [sources[id(cell)] for cell in row.cells]) for row in group.rows]


def _line(row: Row, columns: Sequence[Column], sources: Sequence[Source]) -> Line:
    num = len(row.measured)
    status = f"{num} of {len(row.cells)}" if num < len(row.cells) else str(num)
    return Line(row.label, row.scope, sources, [_cell(row, column, sources) for column in columns], status)


def _cell(row: Row, column: Column, sources: Sequence[Source]) -> Cell:
    value = estimate(_number(cell, column.quantity) for cell in row.measured)
    is_free = column.is_cost and not row.is_recovery and not (value and value.mean)
    if value is None or is_free:
        return Cell("-", None, column.quantity, "")
    measured = [source.report for source in sources if source.cell.status == "ok"]
    title = f"{'mean of ' if len(measured) > 1 else ''}{column.quantity} in {', '.join(dict.fromkeys(measured))}"
    error = _error(row, column)
    text = show(value, scale=column.scale, decimals=column.decimals, spread=column.spreads)
    shown = "" if error is None else format_number(error, column.decimals)
    return Cell(text, value.mean, column.quantity, title, shown)


def _error(row: Row, column: Column) -> float | None:
    """The standard error by the choice of what was tested, which more seeds do not make smaller."""
    if column.quantity == "perplexity":
        return perplexity_error(row)
    found = estimate(_number(cell, column.quantity, "stderr") for cell in row.measured)
    return None if found is None else found.mean * column.scale


def _number(cell: Report, quantity: str, key: str = "value") -> float | int | None:
    found = getattr(cell, quantity)
    if isinstance(found, Mapping):
        return found[key]
    return found if key == "value" else None

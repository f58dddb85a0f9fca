"""The table of scores on tasks, and their column in the table of results."""

from collections.abc import Callable, Sequence
from typing import Any

from recon.report.estimates import Estimate, estimate
from recon.report.groups import Group, Row
from recon.report.schema import Report
from recon.report.sections import MISSING, Section, show
from recon.report.task_scores import main_of, protocol_of

Column = tuple[str, Callable[[Row], str]]


def tasks_section(group: Group) -> Section | None:
    """The scores of each row on each task, with the distance to the dense model; None if no task was asked."""
    rows = [row for row in group.rows if any(cell.tasks for cell in row.measured)]
    names = _names(rows)
    if not names:
        return None
    columns = [_column_of(name, rows) for name in names] + ([("mean (%)", _mean_with_delta)] if len(names) > 1 else [])
    lines = [[row.label, *(shown(row) for _, shown in columns)] for row in rows]
    return Section("tasks", ["scope", *(title for title, _ in columns)], lines, _notes(rows, names))


def task_title(cells: Sequence[Report]) -> str:
    """The header of the results' column for the one task, or for the mean of several; empty if no task was asked."""
    scores = [cell.tasks for cell in cells if cell.tasks]
    names = list(dict.fromkeys(name for tasks in scores for name in tasks))
    if len(names) == 1:
        return f"{names[0]} {scores[0][names[0]]['main']} (%)"
    return f"mean of {len(names)} tasks (%)" if names else ""


def task_mean(row: Row) -> str:
    """The score of a row on its tasks, as `tasks_section` has it."""
    return _shown(row, lambda cell: cell.task_mean or {})


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for cell in row.measured for name in cell.tasks))


def _column_of(name: str, rows: Sequence[Row]) -> Column:
    main = next(cell.tasks[name]["main"] for row in rows for cell in row.measured if name in cell.tasks)

    def numbers(cell: Report) -> dict[str, Any]:
        value, stderr = main_of(cell.tasks[name]) if name in cell.tasks else (None, None)
        return {"value": value, "stderr": stderr, "delta": cell.task_deltas.get(name)}

    return f"{name} {main} (%)", lambda row: _shown(row, numbers) + _delta(row, numbers)


def _mean_with_delta(row: Row) -> str:
    return task_mean(row) + _delta(row, lambda cell: cell.task_mean or {})


def _shown(row: Row, numbers: Callable[[Report], dict[str, Any]]) -> str:
    """Mean over seeds ± standard error over documents, which more seeds do not make smaller: all are asked the same."""
    value, stderr = (estimate(numbers(cell).get(key) for cell in row.measured) for key in ("value", "stderr"))
    if value is None:
        return MISSING
    return show(Estimate(value.mean, None if stderr is None else stderr.mean), scale=100.0, spread=True)


def _delta(row: Row, numbers: Callable[[Report], dict[str, Any]]) -> str:
    """The distance to the dense model behind a score; nothing for the dense model itself."""
    delta = estimate(numbers(cell).get("delta") for cell in row.measured)
    return "" if delta is None or row.scope == "dense" else f" ({delta.mean * 100:+.1f})"


def _notes(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    scores = {name: [cell.tasks[name] for row in rows for cell in row.measured if name in cell.tasks] for name in names}
    sizes = ", ".join(
        f"{name} {one[0]['num_documents']:,} documents, {one[0]['num_fewshot'] or 0}-shot"
        for name, one in scores.items()
    )
    notes = [f"± standard error over documents, in brackets the distance to the dense model; {sizes}"]
    for name, found in scores.items():
        if any(protocol_of(one) != protocol_of(found[0]) for one in found):
            notes.append(f"The scores on {name} are not comparable: they were measured differently, see report.json")
    return notes

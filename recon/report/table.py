"""Results as a table: the terminal's and markdown's are two renderings of the same strings."""

import os
from collections.abc import Callable
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from recon.report.across import across_sections
from recon.report.columns import columns_of
from recon.report.drift import curves, drift_section, protocol
from recon.report.groups import Group, Row, group_cells
from recon.report.memory import memory_section
from recon.report.paired import paired_section, ranking_note
from recon.report.prediction import prediction_section
from recon.report.sampling import sampling_note, sampling_section
from recon.report.schema import Results
from recon.report.sections import WIDEST, Section, show
from recon.report.tasks import task_mean, tasks_section
from recon.report.tuning import tuning_section

PIPE_WIDTH = 100
"""Characters of a line where there is no terminal."""


def table_sections(results: Results, verbose: bool = False, together: bool = False) -> list[Section]:
    """One section per model, text, criterion and pattern, all with the same columns, and more of its measurements.

    Args:
        results: The cells.
        verbose: Add the memory of each process, and predicted beside measured needs. The drift of a single row is a
            note, and with `verbose` a table as the drift of several is.
        together: One section for all groups, with a column for each of model, text, criterion and pattern that differ.

    Returns:
        The sections. Sparsity of the whole model, size on disk and memory on the device have a column only if a cell
        has them. Over several seeds, perplexity and recovery are mean ± sample standard deviation, all other numbers
        means.
        Scores on tasks have a column, too, and a table, with their standard error over documents.
        The last column counts the seeds if there are several, or names failed rows if there are some, and is left out
        otherwise. The points tried to choose options follow a model's first group. Tables over all groups are last.
    """
    groups = group_cells(results)
    columns = _columns(results)
    sections, tuned = [], set()  # the options of a model are chosen once, on its first group
    if together and len(groups) > 1:
        sections.append(_of_all(groups, columns))
    for group in groups:
        more = further_sections(group, verbose, tuned)
        notes = (
            group.failures
            + group.remarks
            + sampling_note(group)
            + ranking_note(group)
            + ([] if verbose else _drift_note(group))
        )
        if together and len(groups) > 1:
            sections += [replace(section, title=f"{title_of(group)}: {section.title}") for section in more if verbose]
            continue
        header = ["scope", f"{group.split} perplexity", *(name for name, _ in columns[1:])]
        rows = [[row.label, *(shown(row) for _, shown in columns)] for row in group.rows]
        sections += [Section(title_of(group), header, rows, notes), *more]
    return sections if together else [*sections, *across_sections(groups)]


def _columns(results: Results) -> list[tuple[str, Callable[[Row], str]]]:
    """Header and content of each column of numbers; the first is perplexity, whose header names a group's split."""
    cells = results.cells
    columns = [(one.title, task_mean if one.quantity == "task_mean" else one.shown) for one in columns_of(cells)]
    if any(len(row.cells) > 1 for group in group_cells(results) for row in group.rows):
        columns.append(("seeds", _seeds))
    elif any(cell.status == "failed" for cell in cells):
        columns.append(("status", lambda row: "ok" if row.measured else "failed"))
    return columns


def _seeds(row: Row) -> str:
    num, num_ok = len(row.cells), len(row.of_seeds)
    return str(len(row.measured)) if num_ok == num else f"{num_ok}/{num} ok"


def title_of(group: Group) -> str:
    """The names that a group stands for, in a line."""
    return ", ".join(_said(group.model, group.text, group.criterion, group.pattern))


def _said(*names: str) -> list[str]:
    """The names that say something."""
    return [name for name in names if name not in ("", "none")]


def _of_all(groups: list[Group], columns: list[tuple[str, Callable[[Row], str]]]) -> Section:
    """The rows of all groups, in the order of scopes within each."""
    told = ("model", "text", "criterion", "pattern")
    names = [name for name in told if len({getattr(one, name) for one in groups}) > 1]
    same = [getattr(groups[0], name) for name in told if name not in names]
    splits = "/".join(dict.fromkeys(group.split for group in groups))
    rows = [
        [
            row.label,
            *("" if row.scope == "dense" and name != "model" else getattr(group, name) for name in names),
            *(shown(row) for _, shown in columns),
        ]
        for group in groups
        for row in group.rows
    ]
    together = Group("", "", "", "", [row for group in groups for row in group.rows])
    header = ["scope", *names, f"{splits} perplexity", *(name for name, _ in columns[1:])]
    title = ", ".join(_said(*same)) or "all runs"
    return Section(title, header, rows, together.failures + together.remarks, num_text=1 + len(names))


def further_sections(group: Group, verbose: bool, tuned: set[str]) -> list[Section]:
    """The tables that follow the results of a group; `tuned` are the models whose choices have been shown."""
    found = [sampling_section(group), memory_section(group), prediction_section(group)] if verbose else []
    found += [paired_section(group), tasks_section(group)]
    if verbose or len(curves(group)) > 1:
        found.append(drift_section(group))
    if group.model not in tuned and (tuning := tuning_section(group)) is not None:
        found.append(tuning)
        tuned.add(group.model)
    return [section for section in found if section is not None]


def _drift_note(group: Group) -> list[str]:
    if len(measured := curves(group)) != 1 or measured[0].kl is None:
        return []
    (curve,) = measured
    kl = show(curve.kl, decimals=4, spread=True)
    return [f"{curve.label}: KL from the dense model {kl} nats per token, on {protocol(group)}"]


def table_console() -> Console:
    """A console for tables: as wide as the terminal; in a pipe or a file 100 columns, unless COLUMNS says otherwise."""
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, soft_wrap=True, width=PIPE_WIDTH)


def print_table(results: Results, console: Console, verbose: bool = False, together: bool = False) -> None:
    """Print the results, a section per model, text, criterion and pattern.

    Only text and notes are wrapped: where the numbers need more than the console's width, the table is wider than the
    console.

    Args:
        results: The cells.
        console: Where to print.
        verbose: As `table_sections` has it; likewise `together`.
        together: See there.
    """
    for i, section in enumerate(table_sections(results, verbose, together)):
        if i > 0:
            console.print()
        print_section(section, console)


def print_section(section: Section, console: Console) -> None:
    """Print one table with its title and notes; where its numbers need more width than the console has, it is wider."""
    table = Table(box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
    for j, name in enumerate(section.header):
        title = _encodable(name.replace(" ", "\n"), console)
        if j == 0:
            table.add_column(title, overflow="fold", vertical="bottom", min_width=len("submodule"))
        elif j < section.num_text:
            table.add_column(title, overflow="fold", vertical="bottom", min_width=len("criterion"))
        else:
            table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    for row in section.rows:
        table.add_row(*(Text(_encodable(cell, console)) for cell in row))
    console.print(Text(section.title, style="bold"))
    needed = Measurement.get(console, console.options.update_width(WIDEST), table).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)
    for note in section.notes:
        console.print(Text(note))


def markdown_table(results: Results, verbose: bool = False, together: bool = False) -> str:
    """The results as markdown, ending in a newline; `verbose` and `together` as `table_sections` has them."""
    blocks = []
    for section in table_sections(results, verbose, together):
        rule = [":--"] * section.num_text + ["--:"] * (len(section.header) - section.num_text)
        lines = [_markdown_row(row) for row in (section.header, rule, *section.rows)]
        blocks += [f"**{section.title}**", "\n".join(lines)]
        blocks += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n\n".join(blocks) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _encodable(text: str, console: Console) -> str:
    return text.replace("±", "+-") if console.options.ascii_only else text

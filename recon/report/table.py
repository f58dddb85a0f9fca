"""Results as a table: the terminal's and markdown's are two renderings of the same strings."""

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from recon.report.drift import drift_section
from recon.report.groups import Group, Row, group_cells
from recon.report.memory import memory_section
from recon.report.prediction import prediction_section
from recon.report.schema import Results
from recon.report.sections import Section, show
from recon.report.tuning import tuning_section

WIDEST = 1000
"""Characters: no table needs more."""


def table_sections(results: Results) -> list[Section]:
    """One section per model, criterion and pattern, all with the same columns; after each, what more there is of it.

    That is its memory by process, what was predicted of it, and its drift.
    What was tried to choose options follows a model's first group.

    Peak device memory has a column only if some cell has it. Over several seeds, perplexity and recovery
    are mean ± sample standard deviation, all other numbers means. The last column counts the seeds if
    there are several, or says which rows failed if some did, and is left out otherwise.
    """
    groups = group_cells(results)
    cells = results.cells
    has_device = any(cell.peak_device_bytes is not None for cell in cells)
    has_seeds = any(len(row.cells) > 1 for group in groups for row in group.rows)
    has_failed = any(cell.status == "failed" for cell in cells)
    unit, divisor = _token_unit(max((cell.train_tokens for cell in cells), default=0))

    def header(group: Group) -> list[str]:
        names = ["scope", f"{group.split} perplexity", "recovered (%)", "sparsity (%)", "peak host (MiB)"]
        names += ["peak device (MiB)"] if has_device else []
        names += ["seconds", f"train tokens{unit}"]
        return names + (["seeds"] if has_seeds else ["status"] if has_failed else [])

    def strings(row: Row) -> list[str]:
        cells = [
            row.label,
            show(row.estimate("perplexity"), spread=True, decimals=2),
            show(row.estimate("recovered"), scale=100.0, spread=True),
            show(row.estimate("sparsity"), scale=100.0),
            show(row.estimate("peak_host_bytes"), scale=2**-20, decimals=0),
        ]
        cells += [show(row.estimate("peak_device_bytes"), scale=2**-20, decimals=0)] if has_device else []
        cells += [
            show(row.estimate("seconds")),
            show(row.estimate("train_tokens"), scale=1 / divisor, decimals=1 if divisor == 10**6 else 0),
        ]
        num, num_ok = len(row.cells), len(row.measured)
        if has_seeds:
            cells.append(str(num) if num_ok == num else f"{num_ok}/{num} ok")
        elif has_failed:
            cells.append("ok" if num_ok else "failed")
        return cells

    sections = []
    tuned: set[str] = set()  # the options of a model are chosen once, on its first group
    for group in groups:
        title = f"{group.model}, {group.criterion}, {group.pattern}"
        rows = [strings(row) for row in group.rows]
        sections.append(Section(title, header(group), rows, notes=group.failures + group.remarks))
        sections += [
            more
            for more in (memory_section(group), prediction_section(group), drift_section(group))
            if more is not None
        ]
        if group.model not in tuned and (tuning := tuning_section(group)) is not None:
            sections.append(tuning)
            tuned.add(group.model)
    return sections


def print_table(results: Results, console: Console) -> None:
    """Print the results, a section per model, criterion and pattern.

    Only labels and notes are wrapped: where the numbers need more than the console's width, the table is
    wider than the console.
    """
    for i, section in enumerate(table_sections(results)):
        table = Table(box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
        for j, name in enumerate(section.header):
            title = _encodable(name.replace(" ", "\n"), console)
            if j == 0:
                table.add_column(title, overflow="fold", vertical="bottom", min_width=len("submodule"))
            else:
                table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
        for row in section.rows:
            table.add_row(*(Text(_encodable(cell, console)) for cell in row))
        if i > 0:
            console.print()
        console.print(Text(section.title, style="bold"))
        needed = Measurement.get(console, console.options.update_width(WIDEST), table).minimum
        if needed > console.width:
            table.width = needed
        console.print(table, crop=False)
        for note in section.notes:
            console.print(Text(note))


def markdown_table(results: Results) -> str:
    """The results as markdown, a table per model, criterion and pattern, ending in a newline."""
    blocks = []
    for section in table_sections(results):
        rule = [":--"] + ["--:"] * (len(section.header) - 1)
        lines = [_markdown_row(row) for row in (section.header, rule, *section.rows)]
        blocks += [f"**{section.title}**", "\n".join(lines)]
        blocks += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n\n".join(blocks) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _encodable(text: str, console: Console) -> str:
    return text.replace("±", "+-") if console.options.ascii_only else text


def _token_unit(most: int) -> tuple[str, int]:
    """One unit for the whole column, so that its numbers compare at a glance and stay narrow."""
    if most < 10**5:
        return "", 1
    return (" (k)", 10**3) if most < 10**8 else (" (M)", 10**6)

"""`recon report`: print the results of a run or comparison again, or where the memory of a run went."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from recon.basics.run_paths import RunPaths
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.report import Results, markdown_table, print_table
from recon.report.memory_phases import phases_section, sides_of
from recon.report.sections import Section

PIPE_WIDTH = 110
"""Characters of a line where there is no terminal."""


def main(args: list[str]) -> int:
    """Load, print."""
    parser = ArgumentParser(
        prog="recon report", exit_on_error=False, description="Print the results of a run or comparison again."
    )
    parser.add_argument(
        "path", type=str, nargs="+", help="Run or comparison directories, or their results.json or report.json."
    )
    parser.add_argument("--markdown", type=bool, default=False, help="Print a table for a markdown page instead.")
    parser.add_argument(
        "--memory",
        type=bool,
        default=False,
        help="Print what the bytes of a run were, phase by phase, instead, and draw memory.png beside its memory.json.",
    )
    with usage():
        config = parser.parse_args(arrange("report", args))
    if config.memory:
        for path in config.path:
            _memory(Path(path))
        return 0
    loaded = [Results.load(path) for path in config.path]
    results = loaded[0] if len(loaded) == 1 else Results([cell for one in loaded for cell in one.cells])
    if config.markdown:
        print(markdown_table(results))
    else:
        print_table(results, Console(highlight=False))
    return 0


def _memory(path: Path) -> None:
    """Print and draw the `memory.json` of a run."""
    from recon.report.plots.memory import draw_memory  # matplotlib costs a second that only this should pay

    content = _load(path)
    phases, device = content["phases"], content.get("device", "cpu")
    sides = sides_of(phases)
    if not sides:
        raise ValueError(
            f"`recon report --memory` needs a run whose live tensors were tracked, got {path}, whose memory.json has "
            f"no categories; run it again with callbacks.MemoryProfiler and its by_category: true"
        )
    console = Console(highlight=False)
    if not console.is_terminal:  # nine columns of numbers need more than the eighty characters of a pipe
        console = Console(highlight=False, width=PIPE_WIDTH)
    for side in sides:
        section = phases_section(phases, side, device)
        console.print(section.title, style="italic")
        console.print(_table(section))
        for note in section.notes:
            console.print(note, style="dim")
        console.print()
    for file in draw_memory(phases, device, str(path), path):
        console.print(str(file), soft_wrap=True)


def _load(path: Path) -> dict[str, Any]:
    file = RunPaths(path).memory()
    if not file.is_file():
        raise ValueError(
            f"`recon report --memory` needs the directory of a run with {file.name}, which MemoryProfiler writes, got "
            f"{path}; name one, such as a cell's directory within a comparison"
        )
    return json.loads(file.read_text())


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    first, *rest = section.header
    table.add_column(first, overflow="fold")
    for header in rest:
        table.add_column(header, justify="right", no_wrap=True)
    for row in section.rows:
        table.add_row(*row)
    return table

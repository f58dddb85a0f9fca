"""`recon report`: results of any set of runs and comparisons as a table or a page, or a run's memory by phase."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from recon.basics.manifest import require_unchanged
from recon.basics.run_paths import RunPaths
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.report import collect, markdown_table, print_table, table_console
from recon.report.memory_phases import phases_section, sides_of
from recon.report.parts import load_memory
from recon.report.sections import Section


def build_parser() -> ArgumentParser:
    """The parser of `recon report`."""
    parser = ArgumentParser(
        prog="recon report",
        exit_on_error=False,
        description="Print the results of runs and comparisons; those of several in one table.",
    )
    parser.add_argument(
        "paths", type=str, nargs="+", help="Directories of runs or comparisons, results.json or report.json files."
    )
    parser.add_argument("--markdown", type=bool, default=False, help="Print a table for a markdown page instead.")
    parser.add_argument("--verbose", type=bool, default=False, help="Add tables of memory, predictions and drift.")
    parser.add_argument(
        "--memory",
        type=bool,
        default=False,
        help="Print the live tensors of each run, phase by phase, instead, and draw memory.png beside its memory.json.",
    )
    parser.add_argument(
        "--html",
        type=bool,
        default=False,
        help="Write page.html instead, one file with all that is known: beside the results, or here for several.",
    )
    return parser


def main(args: list[str]) -> int:
    """Load, print or write."""
    with usage():
        config = build_parser().parse_args(arrange("report", args))
    if config.memory:
        for path in config.paths:
            _memory(Path(path))
        return 0
    results, together = collect(config.paths), len(config.paths) > 1
    if config.html:
        from recon.report.page.build import NAME, write_page  # plotly costs half a second that only this should pay

        place = Path(config.paths[0]) if len(config.paths) == 1 else Path()
        file = write_page(results, (place if place.is_dir() else place.parent) / NAME)
        table_console().print(str(file), soft_wrap=True)
    elif config.markdown:
        print(markdown_table(results, config.verbose, together))
    else:
        print_table(results, table_console(), config.verbose, together)
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
    console: Console = table_console()
    for side in sides:
        section = phases_section(phases, side, device)
        console.print(section.title, style="italic")
        console.print(table_of(section))
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
    require_unchanged(file, "copy it again, or repeat the run")
    return load_memory(file)


def table_of(section: Section) -> Table:
    """A section as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for index, header in enumerate(section.header):
        if index < section.num_text:
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for row in section.rows:
        table.add_row(*row)
    return table

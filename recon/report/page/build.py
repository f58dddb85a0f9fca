"""The page: everything that is known of some results, in one file without any link to the network.

plotly draws the charts: its wheel (10 MB) has the script inside, of 4.8 MB a page. vega's script has 0.9 MB, but the
wheel that bundles it without a network (vl-convert) has 34 MB, for it brings a JavaScript engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from recon.basics.files import Writer, atomic_write
from recon.report.across import across_sections
from recon.report.columns import columns_of
from recon.report.groups import Group, group_cells
from recon.report.page.chart import Chart
from recon.report.page.front_charts import drift_charts, pareto_charts
from recon.report.page.headline import headline
from recon.report.page.lines import Line, lines_of
from recon.report.page.run_charts import (
    density_charts,
    loss_charts,
    peak_charts,
    phase_chart,
    tuning_charts,
    window_charts,
)
from recon.report.page.sources import Source
from recon.report.paired import ranking_note
from recon.report.schema import Report, Results
from recon.report.sections import Section
from recon.report.table import further_sections, title_of

NAME = "page.html"
"""File of a page in the directory of its results."""

ENVIRONMENT = ("device", "threads", "torch", "date", "strategy", "host")


@dataclass(frozen=True)
class Part:
    """What the page shows of one group.

    Attributes:
        title: Model, criterion and pattern.
        sentences: What the numbers say.
        header: Titles of the table's columns of numbers.
        lines: The table's rows.
        charts: The charts in order.
        phases: Label of a row -> the charts of its memory by phase.
        sections: Further tables.
        failures: Label and seed, directory, reason.
        remarks: What else is to be known.
    """

    title: str
    sentences: list[str]
    header: list[str]
    lines: list[Line]
    charts: list[Chart]
    phases: dict[str, list[Chart]]
    sections: list[Section]
    failures: list[Report]
    remarks: list[str]


def write_page(results: Results, file: Path, writing: Writer = atomic_write) -> Path:
    """Write the page of some results.

    Args:
        results: What was measured.
        file: Where the page goes; directories of runs are linked relative to it.
        writing: Opens the file.

    Returns:
        The file.
    """
    text = page_of(results, file)
    with writing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def page_of(results: Results, file: Path) -> str:
    """The content of a page; see `write_page`."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    sources = {id(cell): Source.of(cell, file) for cell in results.cells}
    tuned: set[str] = set()
    groups = group_cells(results)
    parts = [_part(group, sources, tuned) for group in groups]
    resources = files(__package__ or __name__)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        name=results.name or "Results",
        created=results.created,
        num_runs=len(results.cells),
        across=across_sections(groups),
        parts=parts,
        runs=[_run(source) for source in sources.values() if source.cell.run_dir],
        style=resources.joinpath("page.css").read_text(encoding="utf-8"),
        script=resources.joinpath("page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def _part(group: Group, sources: dict[int, Source], tuned: set[str]) -> Part:
    firsts = [(row.label, sources[id(row.measured[0])]) for row in group.rows if row.measured]
    logged = {label: curves for label, source in firsts if (curves := source.curves)}
    charts = [
        *pareto_charts(group),
        *peak_charts(group),
        *drift_charts(group),
        *loss_charts(group, logged),
        *tuning_charts(group),
        *window_charts(group),
        *density_charts(group),
    ]
    return Part(
        title=title_of(group),
        sentences=headline(group),
        header=[column.title for column in columns_of(group.cells)],
        lines=lines_of(group, sources),
        charts=charts,
        phases={label: found for label, source in firsts if (found := _phases(source))},
        sections=further_sections(group, True, tuned),
        failures=group.failed,
        remarks=group.remarks + ranking_note(group),
    )


def _phases(source: Source) -> list[Chart]:
    """Charts of a run's memory by phase, the device's first."""
    memory = source.memory
    if not memory or source.paths is None:
        return []
    name = f"{source.cell.run_dir}/{source.paths.memory().name}"
    both = [phase_chart(memory["phases"], side, memory.get("device", "cpu"), name) for side in ("device", "host")]
    return [chart for chart in both if chart is not None]


def _run(source: Source) -> dict[str, Any]:
    """What was asked of one run, and where it ran."""
    cell, chosen = source.cell, source.cell.environment
    shown: Callable[[Any], str] = str
    facts = {
        "protocol": ", ".join(f"{key} {value}" for key, value in cell.protocol.items()),
        **{key: shown(chosen[key]) for key in ENVIRONMENT if chosen.get(key) is not None},
    }
    fingerprint = source.fingerprint
    if fingerprint:
        facts["fingerprint"] = f"sha256 {fingerprint['sha256']}"
        facts["versions"] = ", ".join(f"{key} {value}" for key, value in fingerprint["versions"].items())
    return {"source": source, "cell": cell, "facts": facts, "config": source.config}

"""The measurements of runs and their views: tables for the terminal and for markdown, pictures.

A `Report` is one cell of a comparison, `Results` are all of its cells; both are plain JSON on disk. Tables and
pictures read nothing else. Importing this package imports neither torch nor matplotlib.
"""

from recon.report.pictures import draw_drift, draw_pareto
from recon.report.runs import collect, with_references
from recon.report.schema import SCOPES, Report, Results
from recon.report.table import markdown_table, print_table, table_console

__all__ = [
    "SCOPES",
    "Report",
    "Results",
    "collect",
    "draw_drift",
    "draw_pareto",
    "markdown_table",
    "print_table",
    "table_console",
    "with_references",
]

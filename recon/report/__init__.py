"""The measurements of runs and their views: tables for the terminal and for markdown, pictures.

A `Report` is one cell of a comparison, `Results` are all of its cells; both are plain JSON on disk. Tables and
pictures read nothing else. Importing this package imports neither torch nor matplotlib, and pydantic only with the
first name that is asked of it: callbacks take constants from its modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recon.report.pictures import draw_across, draw_drift, draw_page, draw_pareto, log_pictures
    from recon.report.runs import collect, with_references
    from recon.report.schema import SCOPES, Report, Results
    from recon.report.table import markdown_table, print_table, table_console

__all__ = [
    "SCOPES",
    "Report",
    "Results",
    "collect",
    "draw_across",
    "draw_drift",
    "draw_page",
    "draw_pareto",
    "log_pictures",
    "markdown_table",
    "print_table",
    "table_console",
    "with_references",
]

_HOMES = {
    **dict.fromkeys(("draw_across", "draw_drift", "draw_page", "draw_pareto", "log_pictures"), "pictures"),
    **dict.fromkeys(("collect", "with_references"), "runs"),
    **dict.fromkeys(("SCOPES", "Report", "Results"), "schema"),
    **dict.fromkeys(("markdown_table", "print_table", "table_console"), "table"),
}
"""Public name -> its module."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"recon.report.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a run measured, and the views of it: a table for the terminal, one for markdown, pictures.

A `Report` is one cell of a comparison, `Results` are all of its cells; both are plain JSON on disk. The
tables and the pictures read nothing else. Importing this package imports neither torch nor matplotlib.
"""

from recon.report.pictures import draw_drift, draw_pareto
from recon.report.schema import SCOPES, Report, Results
from recon.report.table import markdown_table, print_table

__all__ = ["SCOPES", "Report", "Results", "draw_drift", "draw_pareto", "markdown_table", "print_table"]

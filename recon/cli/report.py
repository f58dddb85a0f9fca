"""`recon report`: print the results of a run or comparison again."""

from jsonargparse import ArgumentParser
from rich.console import Console

from recon.report import Results, markdown_table, print_table


def main(args: list[str]) -> int:
    """Load, print."""
    parser = ArgumentParser(
        prog="recon report", exit_on_error=False, description="Print the results of a run or comparison again."
    )
    parser.add_argument("path", type=str, help="A run or comparison directory, or a results.json or report.json.")
    parser.add_argument("--markdown", type=bool, default=False, help="Print a table for a markdown page instead.")
    config = parser.parse_args(args)
    results = Results.load(config.path)
    if config.markdown:
        print(markdown_table(results))
    else:
        print_table(results, Console(highlight=False))
    return 0

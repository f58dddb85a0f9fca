"""The rates that `lr: auto` chooses beside fixed ones, from the results of comparisons/rates.

recon compare -c comparisons/rates
python -m tests.benchmarks.chosen_rates runs/rates
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from recon.report import Report, Results

LIMIT = 0.01
"""Relative perplexity above that of the best fixed rate that is still as good."""


@dataclass(frozen=True)
class Row:
    """A scope on a model under a pattern.

    Args:
        model: Name of the model.
        pattern: Of its masks.
        scope: The scope.
        auto: The recovery whose rates choose themselves.
        fixed: Recoveries by their rates.
    """

    model: str
    pattern: str
    scope: str
    auto: Report
    fixed: dict[float, Report]

    @property
    def best(self) -> float:
        """The fixed rate with the lowest perplexity."""
        return min(self.fixed, key=lambda lr: _perplexity(self.fixed[lr]))

    @property
    def range(self) -> float:
        """Relative perplexity of the worst fixed rate above that of the best."""
        return max(map(_perplexity, self.fixed.values())) / _perplexity(self.fixed[self.best]) - 1

    @property
    def excess(self) -> float:
        """Relative perplexity of `auto` above that of the best fixed rate."""
        return _perplexity(self.auto) / _perplexity(self.fixed[self.best]) - 1


def rows_of(results: Results) -> list[Row]:
    """The rows of all recoveries, in the order of the results; those that did not run are left out."""
    found: dict[tuple[str, str, str], dict[str, Report]] = {}
    for cell in results.cells:
        if cell.label.startswith(f"{cell.scope} ") and cell.perplexity is not None:
            rates = found.setdefault((cell.model, cell.pattern, cell.scope), {})
            rates[cell.label.removeprefix(f"{cell.scope} ")] = cell
    return [
        Row(*key, rates["auto"], {float(rate): cell for rate, cell in rates.items() if rate != "auto"})
        for key, rates in found.items()
        if "auto" in rates and len(rates) > 1
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line per row, and how many are within the limit."""
    lines = [
        "| model | pattern | scope | rates of auto | perplexity | best fixed rate | perplexity | auto above it (%) "
        "| worst of the six above it (%) |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        rates = ", ".join(f"{kind} {choice['lr']:.1e}" for kind, choice in row.auto.rates.items())
        best = _perplexity(row.fixed[row.best])
        lines.append(
            f"| {row.model} | {row.pattern} | {row.scope} | {rates} | {_perplexity(row.auto):.2f} | {row.best:.1e} "
            f"| {best:.2f} | {100 * row.excess:+.2f} | {100 * row.range:.1f} |"
        )
    within = sum(row.excess <= LIMIT for row in rows)
    return "\n".join([*lines, "", f"{within} of {len(rows)} within {100 * LIMIT:.0f} %."])


def _perplexity(report: Report) -> float:
    assert report.perplexity is not None
    return report.perplexity


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.chosen_rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", help="of the comparison")
    print(table(rows_of(Results.load(parser.parse_args().directory))))

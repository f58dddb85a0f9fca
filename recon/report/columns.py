"""The columns of numbers that results have, on the terminal, in markdown and on the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recon.report.estimates import Estimate, estimate
from recon.report.groups import Row
from recon.report.schema import Report
from recon.report.sections import flop_unit, show
from recon.report.tasks import task_title


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        title: Its header.
        quantity: Attribute of `Report`; one with a standard error has `value` and `stderr`.
        scale: Factor to the unit of the header.
        decimals: As shown.
        spreads: Whether the deviation over seeds is shown.
        is_cost: Whether models as they are have none.
        is_optional: Whether it is left out where no cell has the number.
    """

    title: str
    quantity: str
    scale: float = 1.0
    decimals: int = 1
    spreads: bool = False
    is_cost: bool = False
    is_optional: bool = False

    def estimate(self, row: Row) -> Estimate | None:
        """Its number over the seeds of a row; None if there is none, or if a model as it is has cost nothing."""
        found = estimate(number_of(cell, self.quantity) for cell in row.measured)
        is_free = self.is_cost and not row.is_recovery and not (found and found.mean)
        return None if is_free else found

    def shown(self, row: Row) -> str:
        """Its number in a row as text, in the unit of the header."""
        return show(self.estimate(row), scale=self.scale, decimals=self.decimals, spread=self.spreads)


COLUMNS = (
    Column("perplexity", "perplexity", decimals=2, spreads=True),
    Column("recovered (%)", "recovered", 100.0, spreads=True),
    Column("tasks (%)", "task_mean", 100.0, spreads=True, is_optional=True),
    Column("sparsity (%)", "sparsity", 100.0),
    Column("model sparsity (%)", "model_sparsity", 100.0, is_optional=True),
    Column("disk (MiB)", "disk_bytes", 2**-20, is_optional=True),
    Column("peak device (MiB)", "tracked_device_bytes", 2**-20, is_optional=True),
    Column("peak allocated (MiB)", "peak_device_bytes", 2**-20, decimals=0, is_optional=True),
    Column("peak host (MiB)", "peak_host_bytes", 2**-20, decimals=0),
    Column("seconds", "seconds", is_cost=True),
    Column("device seconds", "device_seconds", is_cost=True),
    Column("FLOP", "flops", decimals=2, is_cost=True),
    Column("train tokens", "train_tokens", decimals=0, is_cost=True),
    Column("budget (%)", "budget_share", 100.0, is_optional=True),
)


def columns_of(cells: Sequence[Report]) -> list[Column]:
    """The columns that the cells have numbers for, with one unit for each."""
    most_flops = max((cell.flops or 0 for cell in cells), default=0)
    flop, flops = flop_unit(most_flops)
    tokens = _token_column(max((cell.train_tokens for cell in cells), default=0))
    changes: dict[str, dict[str, Any]] = {
        "task_mean": {"title": task_title(cells)},
        "flops": {"title": flop, "scale": 1 / flops},
        "train_tokens": tokens,
    }
    absent = {
        "device_seconds": all(cell.device_seconds == cell.seconds for cell in cells),
        "flops": most_flops == 0,
    }
    return [
        replace(one, **changes.get(one.quantity, {}))
        for one in COLUMNS
        if not absent.get(one.quantity)
        and not (one.is_optional and all(number_of(cell, one.quantity) is None for cell in cells))
    ]


def number_of(cell: Report, quantity: str, key: str = "value") -> float | int | None:
    """A number of a report; with `key` "stderr" its standard error, None where it has none."""
    found = getattr(cell, quantity)
    if isinstance(found, Mapping):
        return found[key]
    return found if key == "value" else None


def _token_column(most: int) -> dict[str, Any]:
    """One unit for the whole column, so that its numbers compare at a glance and stay narrow."""
    if most < 10**5:
        return {}
    if most < 10**8:
        return {"title": "train tokens (k)", "scale": 1e-3}
    return {"title": "train tokens (M)", "scale": 1e-6, "decimals": 1}

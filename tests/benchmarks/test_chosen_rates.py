"""The table of chosen rates: the best fixed rate is found, and what did not run is left out."""

from typing import Any

import pytest

from recon.report import Report, Results
from tests.benchmarks.chosen_rates import rows_of, table


def cell(scope: str, rate: str, perplexity: float | None, **options: Any) -> Report:
    known = {"scope": scope, "model": "tiny", "criterion": "wanda", "pattern": "2:4", "seed": 0}
    return Report(**known, label=f"{scope} {rate}", perplexity=perplexity, **options)


def test_auto_is_compared_with_the_best_rate_that_ran() -> None:
    rates = {"block": {"lr": 0.003, "steps": 4, "tried": []}}
    cells = [
        cell("dense", "", 10.0),
        cell("block", "auto", 20.3, rates=rates),
        *(cell("block", rate, value) for rate, value in (("1e-3", 21.0), ("4e-3", 20.0), ("8e-3", None))),
        cell("submodule", "auto", 20.1, rates=rates),
        cell("submodule", "2e-3", 20.0),
    ]
    block, submodule = rows_of(Results(cells))
    assert (block.best, list(block.fixed)) == (4e-3, [1e-3, 4e-3])
    assert block.excess == pytest.approx(0.015)
    assert block.range == pytest.approx(0.05)
    text = table([block, submodule])
    assert "| tiny | 2:4 | block | block 3.0e-03 | 20.30 | 4.0e-03 | 20.00 | +1.50 |" in text
    assert text.endswith("1 of 2 within 1 %.")


def test_a_scope_without_fixed_rates_has_no_row() -> None:
    assert rows_of(Results([cell("block", "auto", 20.0)])) == []

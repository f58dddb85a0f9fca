"""Sampling error of perplexities, against a bootstrap that resamples."""

import math
from typing import Any

import numpy as np
import pytest

from recon.report import Report, Results, markdown_table
from recon.report.groups import group_cells
from recon.report.sampling import difference, loss_of, perplexity_error, standard_error
from tests.report.test_report import report

NUM, TOKENS = 40, 15
HARD = np.random.default_rng(0).gamma(4.0, 10.0, NUM)
"""Losses of the sequences, which differ much more from each other than models do."""


def row(scope: str, add: float, seed: int = 0, **changes: Any) -> Report:
    noise = np.random.default_rng(len(scope) + 100 * seed).normal(0, 0.3, NUM)
    losses = [round(float(one), 4) for one in HARD + add + noise]
    protocol = {"split": "test", "num_sequences": NUM, "seq_len": TOKENS + 1, "tokens_scored": NUM * TOKENS}
    perplexity = math.exp(sum(losses) / (NUM * TOKENS))
    return report(scope, seed=seed, losses={"model": losses}, protocol=protocol, perplexity=perplexity, **changes)


def test_the_closed_form_is_what_resampling_tends_to() -> None:
    drawn = np.random.default_rng(1).choice(HARD, (20_000, NUM)).mean(1)
    assert standard_error(HARD.tolist()) == pytest.approx(float(drawn.std()), rel=0.02)


def test_pairs_are_compared_sequence_by_sequence_and_seed_by_seed() -> None:
    cells = [row(scope, add, seed) for seed in (0, 1) for scope, add in (("dense", 0), ("submodule", 2), ("block", 1))]
    cells.append(row("submodule", 9.0, seed=2))  # without a partner
    (group,) = group_cells(Results(cells))
    dense, submodule, block = group.rows
    found, alone = difference(submodule, block), loss_of(block)
    assert found is not None
    assert alone is not None
    of = {(cell.scope, cell.seed): np.array(cell.losses["model"]) / TOKENS for cell in cells}
    each = [of["submodule", seed] - of["block", seed] for seed in (0, 1)]
    assert found.mean == pytest.approx(float(np.mean(each)))
    assert found.error == pytest.approx(standard_error(np.mean(each, axis=0).tolist()))
    assert found.std == pytest.approx(float(np.std([one.mean() for one in each], ddof=1)))
    assert found.error < 0.05 * alone.error
    perplexity = block.estimate("perplexity")
    assert perplexity is not None
    assert perplexity_error(block) == pytest.approx(perplexity.mean * alone.error)
    text = markdown_table(Results(cells), verbose=True)
    assert f"submodule minus block is {found.text} nats per token" in text
    assert f"| {loss_of(dense).mean:.4f} ± {loss_of(dense).error:.4f} |" in text  # pyright: ignore


def test_nothing_is_said_of_what_was_not_measured_alike() -> None:
    (group,) = group_cells(Results([row("submodule", 2), row("block", 1), report("matrix")]))
    matrix, submodule, block = group.rows
    other = group_cells(Results([row("block", 1).replace(protocol={"tokens_scored": 600, "split": "validation"})]))
    assert difference(submodule, other[0].rows[0]) is None
    assert difference(submodule, matrix) is loss_of(matrix) is perplexity_error(matrix) is None
    assert "sampling" not in markdown_table(Results([report("matrix")]), verbose=True)
    assert difference(submodule, block) is not None

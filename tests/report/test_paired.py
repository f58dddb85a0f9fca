"""Differences over seeds, budgets and operations in tables, on the page and in results.json."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from recon.report import Report, Results, markdown_table
from recon.report.columns import columns_of
from recon.report.groups import group_cells
from recon.report.page.build import page_of
from recon.report.paired import Paired, differences, paired, paired_section, ranking_note
from recon.report.sampling import difference, loss_of, standard_error
from tests.report.test_report import report

FULL, BLOCK = (9.0, 9.2, 9.1), (10.0, 10.1, 10.3)


def rows(**perplexities: tuple[float, ...]) -> Results:
    return Results(
        [
            report(scope, seed=seed, perplexity=value, run_dir=f"runs/{scope}-{seed}")
            for scope, values in perplexities.items()
            for seed, value in enumerate(values)
        ]
    )


def test_the_interval_is_students_of_differences_of_losses() -> None:
    (group,) = group_cells(rows(block=BLOCK, full=FULL))
    one = paired(*group.rows)
    assert one is not None
    assert one.interval is not None
    test = stats.ttest_rel([math.log(value) for value in BLOCK], [math.log(value) for value in FULL])
    expected = test.confidence_interval(0.95)  # pyright: ignore[reportAttributeAccessIssue]
    assert one.interval == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert one.is_resolved
    assert Paired([-1.0, 3.0], [0, 1]).interval == pytest.approx((1 - 2 * 12.7062047, 1 + 2 * 12.7062047), rel=1e-8)
    assert Paired([0.5], [0]).interval is None


def test_only_seeds_and_protocols_in_common_are_paired() -> None:
    results = rows(block=BLOCK, full=FULL[:2])
    results.cells[1] = results.cells[1].replace(protocol={"split": "validation"})
    (found,) = differences(results)
    assert (found["row"], found["minus"], found["seeds"]) == ("full", "block", [0])
    assert found["mean"] == pytest.approx(math.log(9 / 10))
    assert found["low"] is found["high"] is None
    results.cells[0] = results.cells[0].replace(status="failed", error="out of memory")
    assert differences(results) == []


def test_each_recovery_is_compared_with_the_best() -> None:
    results = rows(dense=(5.0, 5.0, 5.0), matrix=(12.0, 12.5, 12.1), block=BLOCK, full=FULL)
    (group,) = group_cells(results)
    section = paired_section(group)
    assert section is not None
    assert section.header[1] == "minus full (nats/token)"
    assert [line[0] for line in section.rows] == ["matrix", "block"]
    assert section.rows[1][1:] == ["+0.1075", "+0.0693 to +0.1457", "0, 1, 2"]
    assert "+0.0693 to +0.1457" in markdown_table(results)
    assert len(differences(results)) == 3  # of each two
    assert paired_section(group_cells(rows(block=(10.0,), full=(9.0,)))[0]) is None


@pytest.mark.parametrize(
    ("full", "said"),
    [
        (FULL, None),
        ((9.0, 10.3, 10.4), "order of full and block is within noise: their difference, -0.1"),
        ((9.0,), "order of full and block rests on one seed: with seeds such as [0, 1, 2]"),
    ],
)
def test_a_ranking_within_noise_is_said(full: tuple[float, ...], said: str | None, tmp_path: Path) -> None:
    results = rows(dense=(5.0,), block=BLOCK[: len(full)], full=full)
    notes = ranking_note(group_cells(results)[0])
    assert len(notes) == (said is not None)
    assert (said or "") in " ".join(notes)
    for text in (markdown_table(results), page_of(results, tmp_path / "page.html")):
        assert ("is within noise" in text or "rests on one seed" in text) == (said is not None)


def test_one_run_of_the_dense_model_is_no_three_seeds() -> None:
    results = rows(dense=(5.0, 5.0, 5.0), pruned=(20.0, 20.0, 20.0))
    cells = [cell.replace(run_dir="runs/dense") if cell.scope == "dense" else cell for cell in results.cells]
    text = markdown_table(Results(cells))
    dense, pruned = (
        next(line for line in text.splitlines() if line.startswith(f"| {one}")) for one in ("dense", "pruned")
    )
    assert "| 5.00 |" in dense
    assert dense.split("|")[-2].strip() == "1"
    assert "| 20.00 ± 0.00 |" in pruned
    assert pruned.split("|")[-2].strip() == "3"
    failed = [cell.replace(status="failed", error="no room") for cell in cells]
    assert markdown_table(Results(failed)).count("dense (seed 0) failed") == 1
    assert "dense (seed 1)" not in markdown_table(Results(failed))


def costly(scope: str, flops: int, **changes: Any) -> Report:
    prediction = {"setting": {}, "categories": {}, "host": {}, "flops": flops, "seconds": None}
    return report(scope, prediction=prediction, seconds=10.0, **changes)


def test_operations_and_device_seconds_have_columns() -> None:
    alone = Results([costly("block", 2 * 10**12), costly("full", 5 * 10**11)])
    assert "| TFLOP |" in markdown_table(alone)
    assert "device seconds" not in markdown_table(alone)
    assert "| 0.50 |" in markdown_table(alone)
    several = Results([costly("block", 3 * 10**9), costly("full", 10**9, environment={"processes": 4})])
    text = markdown_table(several)
    assert "| seconds | device seconds | GFLOP |" in text
    assert "| 10.0 | 40.0 | 1.00 |" in text
    (group,) = group_cells(several)
    assert {"device seconds", "GFLOP"} < {column.title for column in columns_of(group.cells)}
    held = several.cells[1].to_dict()
    assert (held["flops"], held["device_seconds"]) == (10**9, 40.0)
    assert Report.from_dict(held) == several.cells[1]


def test_what_was_held_equal_is_told() -> None:
    budget = {"quantity": "flops", "limit": 2e12, "of": "full", "planned": 2e12, "options": {}}
    less = {**budget, "planned": 1.5e12, "options": {"model.epochs": 3}}
    text = markdown_table(
        Results([costly("block", 15 * 10**11, budget=less), costly("full", 2 * 10**12, budget=budget)])
    )
    assert "Budget: 2.00 TFLOP at most, as planned for full: block model.epochs=3" in text
    assert "| budget (%) |" in text
    assert "| 75.0 |" in text
    with pytest.raises(ValueError, match="`budget` is not as recon writes it"):
        costly("full", 1, budget={"limit": 1.0})


def test_differences_are_kept_in_results_json(tmp_path: Path) -> None:
    results = rows(block=BLOCK, full=FULL)
    results.differences.extend(differences(results))
    results.save(tmp_path / "results.json")
    (held,) = json.loads((tmp_path / "results.json").read_text())["differences"]
    assert set(held) == {"model", "text", "criterion", "pattern", "row", "minus", "seeds", "mean", "low", "high"}
    assert Results.load(tmp_path / "results.json") == results


def test_errors_of_two_samples_are_independent() -> None:
    values = {0: [1.0, 3.0, 2.0, 6.0], 1: [2.0, 2.5, 4.0, 7.0]}
    cells = [
        report(scope, seed=seed, losses={"model": [scale * one for one in losses]}, protocol=protocol(seed))
        for seed, losses in values.items()
        for scope, scale in (("block", 1.0), ("full", 2.0))
    ]
    (group,) = group_cells(Results(cells))
    loss, distance = loss_of(group.rows[0]), difference(group.rows[1], group.rows[0])
    assert loss is not None
    assert distance is not None
    expected = math.hypot(*(standard_error(one) for one in values.values())) / 2
    assert loss.error == distance.error == pytest.approx(expected)
    assert (loss.mean, loss.num_sequences) == (pytest.approx(27.5 / 8), 8)
    assert "not comparable" not in markdown_table(Results(cells))


def protocol(seed: int) -> dict[str, Any]:
    """Of four sequences with one scored token each, those of a seed."""
    known = {"split": "test", "num_sequences": 4, "seq_len": 2, "tokens_scored": 4}
    return known | ({"sample": seed} if seed else {})

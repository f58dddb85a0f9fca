"""Runs beside their predictions."""

from typing import Any

from recon.profiling.entries import CATEGORIES
from recon.report import Report, Results
from recon.report.groups import group_cells
from recon.report.prediction import SHARDED, prediction_section
from recon.report.sections import MISSING


def report_of(found: dict[str, Any], **options: Any) -> Report:
    return Report(scope="submodule", model="m", criterion="c", pattern="p", seed=0, prediction=found, **options)


MIB = 2**20


def predicted(scope: str = "submodule", world_size: int = 1, **options: Any) -> dict[str, Any]:
    """What stands in a report of a run that was to hold 6 MiB on the device, 2 MiB on the host."""
    planned = {"world_size": world_size, "num_nodes": 1, "sharding": "none", **options}
    categories = dict.fromkeys(CATEGORIES, 0) | {"weights": 4 * MIB, "optimizer": 2 * MIB}
    host = dict.fromkeys(CATEGORIES, 0) | {"calibration": 2 * MIB}
    return {"setting": planned, "categories": categories, "host": host, "flops": 10**9, "seconds": None}


def ranks_of(*weights: int) -> list[dict[str, Any]]:
    """Processes whose devices hold so many MiB of weights, and whose hosts 1 MiB of activations."""
    return [{"tracked": {"device": {"weights": one * MIB}, "host": {"calibration": MIB}}} for one in weights]


def section_of(*cells: Report) -> Any:
    (group,) = group_cells(Results(list(cells)))
    return prediction_section(group)


def test_a_run_is_held_against_its_prediction_by_category() -> None:
    section = section_of(report_of(predicted(), seconds=2.0, ranks=ranks_of(5), run_dir="there"))
    assert section.rows == [
        ["device: weights", "4.0", "5.0", "0.80"],
        ["device: optimizer", "2.0", "0.0", MISSING],
        ["device, peak", "6.0", "5.0", "1.20"],
        ["host, peak", "2.0", "1.0", "2.00"],
        ["seconds", MISSING, "2.0", MISSING],
    ]
    assert section.notes == ["5.0e+08 FLOP/s: `recon plan --flop_rate there` predicts seconds at this rate"]


def test_several_runs_are_held_against_their_predictions_in_total() -> None:
    two = predicted(world_size=2, sharding="zero2")
    section = section_of(
        report_of(predicted(), label="one", ranks=ranks_of(5)),
        report_of(two, label="two processes", ranks=ranks_of(3, 4)),  # the larger device; the hosts of both
        report_of({"reason": "nothing is known"}, label="none"),
        report_of({}, label="not planned"),
    )
    assert section.rows == [
        ["one", "6.0", "5.0", "1.20", "2.0", "1.0", "2.00"],
        ["two processes", "6.0", "4.0", "1.50", "2.0", "2.0", "1.00"],
    ]
    assert section.notes == ["none: no prediction, for nothing is known", SHARDED]


def test_without_a_prediction_there_is_no_section() -> None:
    assert section_of(report_of({}, ranks=ranks_of(5))) is None
    section = section_of(report_of({"reason": "nothing is known"}))
    assert section.notes == ["submodule: no prediction, for nothing is known"]

"""Reports and `memory.json` that are damaged or of another version: one message names file and value."""

import json
from pathlib import Path
from typing import Any

import pytest

from recon.cli import main
from recon.report import Report

MEASURED = {
    "phase": "train",
    "seconds": 0.5,
    "host_bytes": 3,
    "device_allocated_bytes": None,
    "categories": {"device": {"weights": 2**20}},
    "moment": {"device": {"stage": "in a step"}},
}
MEMORY = {"device": "cpu", "baseline_host_bytes": 1, "phases": [MEASURED]}


def with_phase(**changes: Any) -> dict[str, Any]:
    return MEMORY | {"phases": [{name: one for name, one in (MEASURED | changes).items() if one is not ...}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no JSON", "Expecting value"),
        ("", "Expecting value"),
        ("[]", "holds a list in place of a dict"),
        ("3", "holds a int"),
        ("{}", "`phases`: Field required"),
        (MEMORY | {"phases": None}, "`phases`: must be a valid list, got 'None'"),
        (MEMORY | {"phases": ["a"]}, "`phases.0`: must be a valid dictionary"),
        (MEMORY | {"device": 7}, "`device`: must be a valid string"),
        (with_phase(seconds=...), "`phases.0.seconds`: Field required"),
        (with_phase(categories=[]), "`phases.0.categories`: must be a valid dictionary"),
        (
            with_phase(categories={"host": {"weights": "x"}}),
            "`phases.0.categories.host.weights`: must be a valid integer",
        ),
        (with_phase(moment=...), "moment of each peak, got none at `phases.0.moment.device`"),
    ],
)
def test_odd_memory_files(content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["report", "--memory=true", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert str(file) in error
    assert "run again with callbacks.MemoryProfiler" in error


def test_a_memory_file_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "memory.json").write_text(json.dumps(MEMORY))
    assert main(["report", "--memory=true", str(tmp_path)]) == 0
    assert "in a step" in capsys.readouterr().out


REPORT = {"scope": "block", "model": "m", "criterion": "c", "pattern": "p", "seed": 0}


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("ranks", [{"peak_host_bytes": "x"}], "0.peak_host_bytes"),
        ("ranks", [{"tracked": {"host": 3}}], "0.tracked.host"),
        ("references", {"dense": {"x": 1}}, "dense.x"),
        ("references", {"other": {}}, "other"),
        ("drift", {"hidden": "x"}, "hidden"),
        ("prediction", {"setting": 3}, "setting"),
        ("tuning", [{"options": {}}], "0.perplexity"),
    ],
)
def test_dictionaries_of_a_report_that_no_table_can_read(field: str, value: Any, place: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(REPORT | {field: value}))
    with pytest.raises(ValueError, match=rf"report\.json is no valid report: `{field}` .*{place}.*; name another"):
        Report.load(file)

"""`recon plan`, and rates: measured, or those of a run."""

import json
from typing import Any

import pytest
import torch

from recon.cli import main
from recon.models.loading import ModelSource
from recon.planner import PlanOptions, Shape, predict, speed
from recon.report import Report
from tests.benchmarks.flop_rate import Operations
from tests.support.families import FAMILIES
from tests.support.scope_fixtures import IGNORED
from tests.support.shapes import PLANNED as LLAMA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]

COMMAND = ["plan", "-c", "scopes/submodule", "--data.seq_len", "16", "--model.name", "random", "--model.shape"]
SMALL = json.dumps({**LLAMA, **{key: value for key, value in FAMILIES["llama"].items() if key == "hidden_size"}})


@pytest.mark.slow
def test_the_command_prints_a_row_a_scope(capsys: Any) -> None:
    few = ["--model.batch_size", "1", "--data.batch_size", "1"]  # which leaves no smaller ones to try
    assert main([*COMMAND, SMALL, *few, "--device_memory", "1MiB", "--flop_rate", "1e9"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [name for name in rows if name in ("matrix", "submodule", "block", "full")][:4] == [
        "matrix",
        "submodule",
        "block",
        "full",
    ]
    assert " no " in out


def test_the_command_prints_json(capsys: Any) -> None:
    options = ["--json", "true", "--scopes", "[full]", "--trainer.devices", "2", "-c", "strategies/zero2"]
    assert main([*COMMAND, SMALL, *options]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    (row,) = found["scopes"]
    assert (row["scope"], row["setting"]["sharding"], row["setting"]["world_size"]) == ("full", "zero2", 2)
    assert sum(row["categories"].values()) == row["peak_bytes"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device_memory", "24"], "one of the units"),
        (["--scopes", "[everything]"], "got everything"),
        (["--data.num_validation", "null"], "data.num_validation, got null"),
        (["--trainer.devices", "auto"], "a number of trainer.devices"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], said: str, capsys: Any) -> None:
    assert main([*COMMAND, SMALL, *options]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("scope", ["matrix", "submodule", "block", "full"])
def test_rates_are_those_of_the_work_that_is_measured(scope: Any, monkeypatch: Any) -> None:
    """By a clock that ticks once per operation: whatever is measured has to take as long as its FLOPs say."""

    def ticks(work: Any, device: torch.device, clock: Any) -> float:
        with Operations() as operations:
            work()
        return operations.total / 2**30

    monkeypatch.setattr(speed, "_seconds", ticks)
    monkeypatch.setattr(speed, "SECONDS", 2**25 / 2**30)  # batches are made smaller, too
    loss = "cross_entropy" if scope == "full" else "normalised"
    source = ModelSource("random", LLAMA)
    options = PlanOptions(scope, 8, 32, 16, 4, loss=loss, device="cpu")
    found = speed.measured_speeds(source, options, torch.device("cpu"))
    work = predict(Shape(source), options).flops_by_kind
    assert found.keys() >= {kind for kind, flops in work.items() if flops}
    for kind in {"solve", "start"} & found.keys():
        assert 0.8 * 2**30 <= found.pop(kind) <= 2**30  # besides its iterations there are residuals
    assert found == dict.fromkeys(found, 2**30)


def test_rates_are_measured(llama: Shape) -> None:
    options = PlanOptions("block", 2, 16, 8, 4, device="cpu")
    rates = speed.measured_speeds(ModelSource("random", LLAMA), options, torch.device("cpu"))
    found = predict(llama, options, rates)
    assert all(one > 0 for one in rates.values())
    assert found.seconds == pytest.approx(sum(flops / rates[kind] for kind, flops in found.flops_by_kind.items()))


def test_the_command_measures_rates(capsys: Any) -> None:
    row = row_of([*COMMAND, SMALL, *FEW, "--scopes", "[block]", "--flop_rate", "measure"], capsys)
    assert row["flop_rate"].keys() == {"walk", "gram", "solve", "start", "training", "held out"}
    assert row["seconds"] == pytest.approx(sum(row["work"][kind] / one for kind, one in row["flop_rate"].items()))


FEW = ["--data.num_sequences", "4", "--data.num_validation", "2", "--model.batch_size", "2", "--trainer.devices", "1"]


def row_of(args: list[str], capsys: Any) -> dict[str, Any]:
    """The last row of a plan as JSON."""
    assert main([*args, "--json", "true"]) == 0
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])["scopes"][-1]


def report_of(found: dict[str, Any], **options: Any) -> Report:
    return Report(scope="submodule", model="m", criterion="c", pattern="p", seed=0, prediction=found, **options)


def test_rates_are_those_of_a_run(llama: Shape, tmp_path: Any, capsys: Any) -> None:
    found = predict(llama, PlanOptions("submodule", 2, 16, 8, 4, world_size=2)).as_dict()
    report_of(found, seconds=8.0).save(tmp_path / "report.json")
    command = [*COMMAND, SMALL, *FEW, "--flop_rate", str(tmp_path)]
    row = row_of([*command, "--scopes", "[submodule]"], capsys)
    assert row["flop_rate"] == found["flops"] / 8 / 2  # of one process
    assert row["seconds"] == pytest.approx(row["flops"] / row["flop_rate"])
    row = row_of([*command, "--scopes", "[block]"], capsys)
    assert (row["flop_rate"], row["seconds"]) == (None, None)  # no block scope was run
    report_of({}, seconds=8.0).save(tmp_path / "report.json")
    assert main(command) == 1
    assert "whose report has no FLOPs and seconds" in capsys.readouterr().err

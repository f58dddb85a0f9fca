"""The benchmarks of whole fits run and measure what they promise. How long anything takes is not tested."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import bare_loop, flop_rate, growth, profiler, quality, stream, window_parallel


@pytest.mark.slow
def test_fit_and_bare_loop_end_at_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare_loop, "LR", 1e-4)  # on so few sequences windows end worse with more, and keep their start
    (row,) = bare_loop.measure(tmp_path, quick=True, scopes=("submodule",))["rows"]  # or it raises
    assert row["ratio"] == row["fit"][0] / row["loop"][0]


@pytest.mark.slow
def test_growth_measures_bytes_of_both_sides(tmp_path: Path) -> None:
    result = growth.measure("depth", tmp_path, quick=True, scopes=("block", "full"))
    by_point = {(row["scope"], row["depth"]): row for row in result["rows"]}
    assert by_point.keys() == {(scope, depth) for scope in ("block", "full") for depth in (1, 2)}
    block, full = ([by_point[scope, depth]["device_bytes"] for depth in (1, 2)] for scope in ("block", "full"))
    assert block[1] <= 1.02 * block[0]
    assert full[1] > 1.02 * full[0]
    assert [row["copies"] for row in result["rows"]] == [2, 2, 0, 0]
    assert f"| block | 1 | {by_point['block', 1]['seconds']:.2f} | 1.00 |" in growth.table(result)


def test_a_straight_line_is_found() -> None:
    line = growth.straight_line([6.0, 12.0, 24.0], [2.0 + 0.5 * value for value in (6.0, 12.0, 24.0)])
    assert line["constant"] == pytest.approx(2.0)
    assert line["slope"] == pytest.approx(0.5)
    assert line["deviation"] == pytest.approx(0, abs=1e-9)
    assert growth.straight_line([1.0, 2.0, 4.0], [1.0, 4.0, 16.0])["deviation"] > 0.2


@pytest.mark.slow
def test_quality_has_no_ratio_where_it_is_not_reached(tmp_path: Path) -> None:
    result = quality.measure(tmp_path, quick=True)
    (row,) = result["rows"]
    assert len(row["plain_seconds"]) == len(row["fast_seconds"]) == 1
    for way in ("configured", "fast"):
        assert (row[f"{way}_ratio"] is None) == (row[f"{way}_perplexity"] > row["plain_perplexity"])
    assert f"{row['plain_perplexity']:.3f}" in quality.table(result)


def test_a_ratio_needs_the_quality_of_the_plain_run() -> None:
    row = {"plain_seconds": [8.0, 10.0, 50.0], "fast_seconds": [2.0, 3.0, 4.0], "plain_perplexity": 17.8}
    assert quality.ratio(row | {"fast_perplexity": 17.8}, "fast") == 0.3
    assert quality.ratio(row | {"fast_perplexity": 17.81}, "fast") is None


@pytest.mark.slow
def test_shares_of_the_rate_of_products(tmp_path: Path) -> None:
    result = flop_rate.measure(tmp_path, quick=True, scopes=("block",))
    (row,) = result["rows"]
    assert row["rate"] == row["operations"] / row["seconds"]
    assert 0 < row["share"] < 1
    tokens, blocks, weights = 20 * 32, 6, 4 * 128**2 + 3 * 128 * 384
    trained = 3 * 2 * tokens * blocks * weights  # forward, and two products backward, but for the inputs of the first
    assert trained < row["operations"] < 10 * trained  # exact solutions are most of the rest, with so few tokens


@pytest.mark.slow
def test_the_profiler_is_measured_with_and_without_categories(tmp_path: Path) -> None:
    (row,) = profiler.measure(tmp_path, quick=True, scopes=("matrix",))["rows"]
    assert row["ratio"] == row["with"][0] / row["without"][0]
    memory = json.loads((tmp_path / "matrix-without-0" / "memory.json").read_text())
    assert not any(phase.get("categories") for phase in memory["phases"])


@pytest.mark.slow
def test_two_processes_against_one(tmp_path: Path) -> None:
    given: list[tuple[int, int]] = []

    def run(args: list[str], processes: int, threads: int) -> None:
        given.append((processes, threads))
        position = args.index("--trainer.devices")
        command_line = [*args[: position + 1], "1", *args[position + 2 :]]
        command_line[command_line.index("window_parallel" if processes > 1 else "auto")] = "auto"
        from recon.cli.fit import main

        main(command_line)

    result = window_parallel.measure(tmp_path, quick=True, scopes=("matrix",), run=run)
    assert given == [(1, 1), (2, 1)]
    (row,) = result["rows"]
    assert row["same_weights"]
    assert math.isclose(row["speedup"], row["fit_seconds_1"] / row["fit_seconds_2"])


@pytest.mark.slow
def test_a_stream_is_resumed_and_shared(tmp_path: Path) -> None:
    result = stream.measure(tmp_path, quick=True, fits=False)  # or it raises
    assert result["tokens"] == 64 * stream.SEQ_LEN
    assert "| tokens | 65,536 |" in stream.table(result)


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(path: Path, options: Any) -> dict[str, Any]:
        return {"goal": 1.0, "rows": []}

    monkeypatch.setitem(command.BENCHMARKS, "bare_loop", (measure, lambda result: "a table"))
    command.main(["--only", "bare_loop", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("## bare_loop\n\na table\n")
    assert "`python -m tests.benchmarks --only bare_loop" in printed
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["bare_loop"] == {"goal": 1.0, "rows": []}
    assert record["seed"] == 0

"""The benchmarks run and print what they promise. How long anything takes is not tested."""

import json
from pathlib import Path

import pytest
import torch

from recon.pruning.criteria import __all__ as criteria_names
from recon.solvers import ConjugateGradients, LeastSquares
from tests.benchmarks import criteria as benchmark
from tests.benchmarks import predictions

CRITERIA = {name.lower() for name in criteria_names} - {"criterion", "frequency", "reap"}
"""Those of weights: benchmarks of single matrices have no experts."""


def table(markdown: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of all lines."""
    lines = [line.strip("| ").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_errors_of_the_golden_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    benchmark.main(["--golden", "--threads", "1", "--json", str(tmp_path / "golden.json")])
    printed = capsys.readouterr().out
    unstructured, *_, two_of_four = (table(part) for part in printed.split("\n\n"))
    for errors in (unstructured, two_of_four):
        assert errors.keys() >= CRITERIA
        for name in CRITERIA:
            own_a, exact_a, own_b, exact_b = map(float, errors[name])
            assert exact_a <= own_a
            assert exact_b <= own_b
    # As published. SparseGPT and ALPS choose per matrix there, which is another pattern.
    assert unstructured["wanda"][::2] == ["0.00769", "0.00706"]
    assert unstructured["admm"][::2] == ["0.00316", "0.00238"]
    assert two_of_four["sparsegpt"][::2] == ["0.01859", "0.01817"]

    record = json.loads((tmp_path / "golden.json").read_text())
    assert record["golden"].keys() == benchmark.PATTERNS.keys()
    assert [f"{error:.5f}" for error in record["golden"]["50 % per row"]["wanda"]] == unstructured["wanda"]


def test_times_of_a_small_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    benchmark.main(["--size", "64", "--quick", "--threads", "1", "--json", str(tmp_path / "times.json")])
    printed, progress = capsys.readouterr()
    rows = table(printed)
    assert {label.partition(",")[0] for label in rows} >= CRITERIA
    assert "sparsefw, 20 iterations" in rows
    assert "wanda + exact solve to 1e-04" in progress

    record = json.loads((tmp_path / "times.json").read_text())
    assert (record["size"], record["seed"], record["quick"]) == (64, 0, True)
    assert record["environment"].keys() >= {"device", "threads", "date", "torch"}
    for row in record["rows"]:
        assert row["products"] == row["seconds"] / row["product_seconds"]
        assert f"{row['relative_error']:.5f}" == rows[row["label"]][2]
    by_label = {row["label"]: row for row in record["rows"]}
    exact = by_label["wanda + exact solve to 1e-04"]
    assert exact["projected_gradient"] <= 1e-4
    assert exact["relative_error"] < by_label["wanda + 20 iterations of admm, fixed mask"]["relative_error"]
    assert by_label["wanda"]["projected_gradient"] > 1e-3


def test_quality_is_what_the_solver_reports() -> None:
    dense, gram = benchmark.heavy_tailed_layer(64, seed=1)
    keep = dense.abs() > 0.08
    solution = ConjugateGradients(tolerance=1e-3).solve(LeastSquares(gram, dense), keep)
    error, gradient = benchmark.quality(solution.weight, dense, gram, keep)
    assert error == pytest.approx(solution.relative_error, rel=1e-4)
    assert gradient == pytest.approx(solution.projected_gradient, rel=1e-2)


def test_the_heavy_tailed_layer_is_seeded_and_has_outliers() -> None:
    dense, gram = benchmark.heavy_tailed_layer(256, seed=3)
    assert all(
        torch.equal(*pair) for pair in zip((dense, gram), benchmark.heavy_tailed_layer(256, seed=3), strict=True)
    )
    assert not torch.equal(gram, benchmark.heavy_tailed_layer(256, seed=4)[1])
    norms = gram.diagonal().sqrt().sort().values
    assert norms[-2] > 5 * norms.median()  # two of 256 are outliers


TINY = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.mark.slow
def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    found = predictions.measure(tmp_path, quick=True, shapes={"tiny": TINY}, scopes=("block", "full"))
    printed = [line for line in predictions.table(found).splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[1] for line in printed] == [row["scope"] for row in found["rows"]] == ["block", "full"]
    for row in found["rows"]:
        predicted, measured, ratios = row["predicted"], row["measured"], row["ratios"]
        assert predicted.keys() == {"device_bytes", "host_bytes", "seconds", "cpu_seconds"}
        assert all(ratios[name] == predicted[name] / measured[name] for name in predicted)
        assert ratios["device_bytes"] == pytest.approx(1, abs=found["goal"]["bytes"])
        assert ratios["host_bytes"] == pytest.approx(1, abs=found["goal"]["bytes"])
        assert predicted["seconds"] == pytest.approx(
            sum(flops / row["rates"][kind] for kind, flops in row["work"].items() if flops)
        )

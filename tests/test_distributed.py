"""Full retraining in two processes: the weights of one process, with exact masks, under every strategy."""

from pathlib import Path

import distributed_runs as runs
import pytest
from processes import in_processes

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
PRECISIONS = ("32-true", "bf16-mixed")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    for precision in PRECISIONS:
        in_processes(runs.fit, "auto", precision, 1, directory / precision, world=1)
    return directory


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_one_process_with_exact_masks(
    strategy: str, precision: str, one_process: Path, tmp_path: Path
) -> None:
    largest = in_processes(runs.fit, strategy, precision, 2, tmp_path / "run")
    expected = {"working copy"} | ({"fp32 master copy"} if strategy.startswith("zero") else set())
    for of_rank in largest:
        assert of_rank == dict.fromkeys(expected, 0.0)
    assert runs.largest_pruned(tmp_path / "run") == 0
    tolerance = 1e-6 if precision == "32-true" else 5e-3
    one, two = runs.weights(one_process / precision), runs.weights(tmp_path / "run")
    assert runs.difference(one, two) < tolerance
    assert all(two[name].dtype == weight.dtype for name, weight in one.items())

"""Full retraining in two processes: the weights of one process, with exact masks, and after any interruption the same.

Every run writes to <directory of the module>/<kind>/<name>; the masks, which all share, are in <directory>/masks.
"""

import json
import signal
from pathlib import Path

import distributed_runs as runs
import pytest
from processes import Failed, in_processes

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PRECISIONS = ("32-true", "bf16-mixed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed")
    in_processes(runs.prune_model, directory / "masks", world=1)
    for precision in PRECISIONS:
        in_processes(runs.fit, "auto", precision, 1, directory / "one" / precision, world=1)
    return directory


def finished(directory: Path, strategy: str, precision: str) -> Path:
    """The directory of an uninterrupted run; run now if no test has before."""
    run = directory / ("one" if strategy == "auto" else strategy) / precision
    if not (run / "report.json").exists():
        in_processes(runs.fit, strategy, precision, 2, run)
    return run


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "zero3_offload"])
def test_weights_of_one_process_with_exact_masks(strategy: str, precision: str, directory: Path) -> None:
    run = directory / strategy / precision
    expected = {"working copy"} | ({"fp32 master copy"} if strategy.startswith("zero") else set())
    for largest in in_processes(runs.fit, strategy, precision, 2, run):
        assert largest == dict.fromkeys(expected, 0.0)
    assert runs.largest_pruned(run) == 0
    one, two = runs.weights(directory / "one" / precision), runs.weights(run)
    assert runs.difference(one, two) < (1e-6 if precision == "32-true" else 5e-3)
    assert all(two[name].dtype == weight.dtype for name, weight in one.items())
    frozen = "model.embed_tokens.weight"
    assert (one[frozen] == two[frozen]).all()  # not rounded by 16-bit training
    report = json.loads((run / "report.json").read_text())
    assert report["mask_violations"] == 0
    assert len(report["ranks"]) == report["environment"]["processes"] == 2
    assert report["environment"]["strategy"] == strategy
    assert not (run / "checkpoints").exists()


def test_zeroing_weights_after_each_step_leaves_the_master_copy_to_drift(directory: Path) -> None:
    run = directory / "zero2-advice" / "run"
    with pytest.raises(
        Failed, match=r"pruned weights need to be zero, got .* in the fp32 master copy of `model\.layers\.0"
    ):
        in_processes(runs.train_without_enforcer, "zero2", run)
    assert not (run / "model").exists()


@pytest.mark.parametrize(
    ("strategy", "which"), [("ddp", "all"), ("zero1", "all"), ("zero2", "one"), ("zero3", "all"), ("fsdp2", "one")]
)
def test_a_killed_run_ends_bit_identically(strategy: str, which: str, directory: Path) -> None:
    run = directory / f"{strategy}-killed" / "bf16-mixed"
    often = ("--checkpoint_every_n_steps", "3")
    stop = runs.Stop(signal.SIGKILL, batch=9, only_rank_1=which == "one")  # in step 4 of 8, the first of epoch 2
    with pytest.raises(Failed, match="died with exit code -9"):
        in_processes(runs.fit_and_stop, stop, strategy, "bf16-mixed", 2, run, *often)
    assert not (run / "report.json").exists()
    in_processes(runs.fit, strategy, "bf16-mixed", 2, run, *often)
    assert runs.same(runs.weights(run), runs.weights(finished(directory, strategy, "bf16-mixed")))
    assert json.loads((run / "report.json").read_text())["environment"]["resumed"]


@pytest.mark.parametrize(("strategy", "world"), [("auto", 1), ("zero2", 2), ("fsdp2", 2)])
def test_a_terminated_run_saves_its_last_step_and_ends_bit_identically(
    strategy: str, world: int, directory: Path
) -> None:
    run = directory / f"{strategy}-terminated" / "bf16-mixed"
    with pytest.raises(Failed, match="SIGTERM"):  # while batch 4 is under way, the first of step 2
        in_processes(runs.fit_and_stop, runs.Stop(signal.SIGTERM, 4), strategy, "bf16-mixed", world, run, world=world)
    assert [path.name for path in (run / "checkpoints").glob("*.json")] == ["step-000002.json"]
    in_processes(runs.fit, strategy, "bf16-mixed", world, run, world=world)
    assert runs.same(runs.weights(run), runs.weights(finished(directory, strategy, "bf16-mixed")))

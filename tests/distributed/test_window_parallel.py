"""Windows recovered by several processes, connected or not: the bits of one process, whoever has which window.

Every run writes to a directory beside <directory of the module>/masks, which holds the model and the masks of all.
"""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recon.distributed.part import Share
from tests.support import distributed_runs
from tests.support import parallel_runs as runs
from tests.support.distributed_runs import same, weights
from tests.support.processes import Failed, in_processes
from tests.support.scope_fixtures import untimed
from tests.support.slow import quick, slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parallel")
    in_processes(distributed_runs.prune_model, directory / "masks", world=1)
    runs.keep_masks_of(directory / "masks", "three", "layers.0.", "layers.1.self_attn")
    runs.keep_masks_of(directory / "masks", "one", "layers.1.")
    return directory


def in_one(directory: Path, scope: str, masks: str = "masks") -> Path:
    """The directory of a run in one process; run now if no test has before."""
    run = directory / f"{scope}-{masks}-one"
    if not (run / "report.json").exists():
        in_processes(runs.fit, scope, 1, run, masks, world=1)
    return run


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert_same_result(ours, theirs)
    assert runs.report(ours)["perplexity"] == runs.report(theirs)["perplexity"]
    assert (ours / "fingerprint.json").read_text() == (theirs / "fingerprint.json").read_text()


def assert_same_result(ours: Path, theirs: Path) -> None:
    """The same bits; the perplexity to rounding, as an offloaded model is evaluated block by block."""
    assert same(weights(ours), weights(theirs))
    ours_results, theirs_results = (json.loads((run / "windows.json").read_text()) for run in (ours, theirs))
    assert list(ours_results) == list(theirs_results)
    assert untimed(ours_results) == untimed(theirs_results)
    one, other = runs.report(ours), runs.report(theirs)
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    for name in ("mask_violations", "train_tokens", "sparsity", "label", "scope"):
        assert one[name] == other[name], name


@pytest.mark.parametrize("of", [1, 2, 3, 16])
@pytest.mark.parametrize("num", [0, 1, 5, 32])
def test_shares_are_consecutive_and_even(num: int, of: int) -> None:
    shares = [Share(index, of).select(range(num)) for index in range(of)]
    assert [item for share in shares for item in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert str(Share.parse(f"{of}/{of}")) == f"{of}/{of}"
    assert Share.parse(f"1/{of}").index == 0


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4", "1/0", "1/4 ", "1.0/4"])
def test_parts_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--windows needs one part of several, .* got"):
        Share.parse(text)


TRAINED = {
    ("submodule", "masks"): [["000.attention", "000.mlp"], ["001.attention", "001.mlp"]],
    ("submodule", "three"): [["000.attention"], ["000.mlp", "001.attention"]],  # a share begins within a block
    ("block", "masks"): [["000"], ["001"]],
    ("block", "one"): [[], ["001"]],
    ("matrix", "masks"): [["000"], ["001"]],
}


@pytest.mark.parametrize(("scope", "masks"), quick(TRAINED, ("submodule", "three")))
def test_two_processes_recover_the_bits_of_one(scope: str, masks: str, directory: Path) -> None:
    run = directory / f"{scope}-{masks}-two"
    assert in_processes(runs.fit, scope, 2, run, masks) == TRAINED[scope, masks]
    assert_same_run(run, in_one(directory, scope, masks))
    report = runs.report(run)
    assert (report["environment"]["strategy"], report["environment"]["processes"]) == ("window_parallel", 2)
    assert len(report["ranks"]) == 2
    assert all(rank["peak_host_bytes"] > 0 for rank in report["ranks"])
    assert report["seconds"] > 0


@pytest.mark.slow
def test_groups_of_matrices_and_accumulated_gradients_too(directory: Path) -> None:
    groups = ("--model.windows.groups", '[["*.q_proj","*.k_proj","*.v_proj"],["*.o_proj"],["*.mlp.*"]]')
    more = (*groups, "--model.batch_size", "4", "--trainer.accumulate_grad_batches", "4")
    one, two = directory / "groups-one", directory / "groups-two"
    in_processes(runs.fit, "submodule", 1, one, "three", *more, world=1)
    trained = in_processes(runs.fit, "submodule", 2, two, "three", *more)
    assert [len(names) for names in trained] == [2, 3]  # the second begins with the last group of block 0
    assert_same_run(two, one)


@pytest.mark.parametrize(
    ("scope", "masks", "offload"), [slow("submodule", "three", "disk"), slow("block", "masks", "host")]
)
def test_an_offloaded_model_is_recovered_by_two_processes_too(
    scope: str, masks: str, offload: str, directory: Path
) -> None:
    run = directory / f"{scope}-{masks}-{offload}"
    trained = in_processes(runs.fit, scope, 2, run, masks, "--model.offload", offload)
    assert trained == TRAINED[scope, masks]
    assert_same_result(run, in_one(directory, scope, masks))
    report = runs.report(run)
    assert (report["environment"]["strategy"], report["environment"]["processes"]) == ("window_parallel", 2)


@pytest.mark.slow
def test_jobs_read_a_random_model_from_disk(directory: Path) -> None:
    run, one = directory / "random-jobs", directory / "random-one"
    with ThreadPoolExecutor(2) as pool:  # at once: one of them writes the model, the other waits for it
        ends = [
            pool.submit(in_processes, runs.fit_random, run, "disk", "--windows", f"{part}/2", world=1)
            for part in (1, 2)
        ]
        trained = [end.result()[0] for end in ends]
    assert [len(names) for names in trained] == [3, 3]  # of three groups in each of two blocks
    in_processes(runs.merge, run, world=1)
    in_processes(runs.fit_random, one, "none", world=1)
    assert_same_result(run, one)
    assert not (run / "dense").exists()


@pytest.mark.parametrize(("killed", "kept"), [(0, {"001"}), slow(1, {"000"})])
def test_a_killed_process_loses_its_unfinished_window_alone(killed: int, kept: set[str], directory: Path) -> None:
    run = directory / f"killed-{killed}"
    stop = runs.Stop(signal.SIGKILL, batch=4, only_rank=killed)  # in the second of two epochs
    with pytest.raises(Failed, match="died with exit code -9") as failed:
        in_processes(runs.fit_and_stop, stop, "block", 2, run)
    assert "window_parallel needs all processes until every window is recovered" in str(failed.value)
    windows = {path.stem: path.stat().st_mtime_ns for path in (run / "windows").iterdir()}
    assert windows.keys() == kept
    assert not (run / "report.json").exists()
    if killed == 0:  # however many processes go on
        assert in_processes(runs.fit, "block", 1, run, world=1) == [["000"]]
    else:
        assert in_processes(runs.fit, "block", 2, run) == [[], ["001"]]
    assert all((run / "windows" / f"{name}.safetensors").stat().st_mtime_ns == when for name, when in windows.items())
    assert_same_run(run, in_one(directory, "block"))
    assert runs.report(run)["environment"]["resumed"]


def test_a_job_that_is_told_to_stop_says_so_and_goes_on_from_there(directory: Path) -> None:
    run, part = directory / "stopped", ("--windows", "1/1")
    stop = runs.Stop(signal.SIGTERM, batch=7, only_rank=0)  # in the second window
    with pytest.raises(Failed, match="SIGTERMException: 143"):
        in_processes(runs.fit_and_stop, stop, "block", 1, run, *part, world=1)
    assert in_processes(runs.fit, "block", 1, run, "masks", *part, world=1) == [["001"]]
    assert json.loads((run / "parts" / "001-of-001" / "part.json").read_text())["resumed"]


REFUSED = {
    "recovered inputs": (
        ("submodule", "--model.propagation", "recovered"),
        r"{} needs windows that do not depend on each other, got model.propagation: recovered, .*: dense$",
    ),
    "overlap": (
        ("block", "--model.num_blocks", "2", "--model.stride", "1"),
        r"{} needs windows that do not depend on each other, got model.stride 1 of 2 blocks, .*: null$",
    ),
    "full": (
        ("full",),
        r"(window_parallel gives each process windows of its own, got the full scope|{} needs a scope)",
    ),
}


@pytest.mark.parametrize("how", ["--trainer.strategy", "--windows"])
@pytest.mark.parametrize("why", REFUSED)
def test_windows_that_depend_on_each_other_are_refused(
    why: str, how: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scope, *more), message = REFUSED[why]
    world = 2 if how == "--trainer.strategy" else 1
    more += [] if world == 2 else ["--windows", "1/2"]
    made = directory / "masks"
    args = [*runs.options(scope, world, tmp_path / "run"), *more, "--masks", str(made / "masks.safetensors")]
    assert runs.command("fit", *args, "--model.name", str(made / "source")) == 2
    error = capsys.readouterr().err.strip()
    named = "strategy window_parallel" if world == 2 else "--windows 1/2"
    assert re.search(message.format(named), error), error
    assert not (tmp_path / "run" / "windows").exists()


def test_parts_run_one_process(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = directory / "masks"
    args = [*runs.options("block", 2, tmp_path / "run"), "--windows", "1/2", "--model.name", str(made / "source")]
    assert runs.command("fit", *args, "--masks", str(made / "masks.safetensors")) == 2
    assert "--windows 1/2 recovers its windows in one process, got" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_and_merge_end_as_one_process(directory: Path) -> None:
    run = directory / "jobs"
    parts = [["000.attention"], ["000.mlp"], ["001.attention", "001.mlp"]]
    for number in (3, 1):  # in any order
        (trained,) = in_processes(runs.fit, "submodule", 1, run, "masks", "--windows", f"{number}/3", world=1)
        assert trained == parts[number - 1]
    assert not (run / "report.json").exists()
    assert not (run / "model").exists()
    with pytest.raises(Failed, match=r"merge needs all 4 windows of the run, .* lacks 1, 000\.mlp the first"):
        in_processes(runs.merge, run, world=1)
    in_processes(runs.fit, "submodule", 1, run, "masks", "--windows", "2/3", world=1)
    in_processes(runs.merge, run, world=1)
    assert_same_run(run, in_one(directory, "submodule"))
    report, measured = runs.report(run), [json.loads(file.read_text()) for file in run.glob("parts/*/part.json")]
    assert len(measured) == len(report["ranks"]) == 3
    assert report["seconds"] == max(part["seconds"] for part in measured)
    assert (report["environment"]["strategy"], report["environment"]["processes"]) == ("jobs", 3)
    assert report["peak_host_bytes"] == max(part["peaks"]["peak_host_bytes"] for part in measured)


@pytest.mark.slow
def test_jobs_that_start_together_choose_masks_once(directory: Path) -> None:
    run = directory / "together"
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(in_processes, runs.fit_without_masks, run, "--windows", f"{number}/2", world=1)
            for number in (1, 2)
        ]
        said = [end.result()[0] for end in ends]
    assert sorted("prune  block" in lines for lines in said) == [False, True]
    in_processes(runs.merge, run, world=1)
    one = directory / "alone"
    in_processes(runs.fit_without_masks, one, world=1)
    assert_same_run(run, one)


def test_merge_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.command("merge", str(tmp_path)) == 1
    assert f"merge needs the directory of a run that has recovered windows, got {tmp_path}" in capsys.readouterr().err

"""Several workers: devices and threads of each, cells at the same time, killed and stopped processes.

A shell script stands for the program of a cell: it copies a report to the cell's directory, its last argument.
"""

import logging
import os
import sys
import threading
import time

import pytest
import torch

from recon.basics.children import Children, Stopped
from recon.basics.manifest import Manifest
from recon.basics.refusals import UsageError
from recon.cli import main
from recon.experiment.comparison import cells as passes
from recon.experiment.comparison import pool
from recon.experiment.comparison.cell import Cell
from recon.experiment.comparison.cells import Cells
from recon.experiment.comparison.pool import Processes
from recon.experiment.comparison.workers import workers_of
from recon.report import Report

PATIENCE = 60.0


@pytest.fixture
def bare(monkeypatch):
    """An environment that bounds neither devices nor threads, on eight cores."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}


@pytest.mark.usefixtures("bare")
def test_workers_share_the_cores():
    assert workers_of(1) == [{}]
    assert workers_of(1, 3) == [threads(3)]
    assert workers_of(3) == [threads(2)] * 3
    assert workers_of(16) == [threads(1)] * 16
    assert workers_of(2, 1) == [threads(1)] * 2


@pytest.mark.usefixtures("bare")
def test_threads_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert workers_of(2) == [{}, {}]
    assert workers_of(2, 1) == [threads(1)] * 2


@pytest.mark.usefixtures("bare")
def test_each_worker_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers_of("gpus", 1) == [{"CUDA_VISIBLE_DEVICES": name} | threads(1) for name in ("0", "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5ebe9f43,-1,7")  # devices behind -1 are invisible
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in workers_of("gpus")] == ["3", "GPU-5ebe9f43"]


@pytest.mark.usefixtures("bare")
def test_gpus_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=r"needs at least one visible GPU, got none \(torch sees no CUDA device here"):
        workers_of("gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=r"got none \(CUDA_VISIBLE_DEVICES is ''\)"):
        workers_of("gpus")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers=0"], "--workers must be at least 1, or gpus or slurm, got 0"),
        (["--workers", "gpu"], "--workers needs a whole number or gpus or slurm, got gpu"),
        (["--workers=2", "--threads=0"], "--threads must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(options, said, tmp_path, capsys):
    assert main(["compare", "-c", "comparisons/smoke", "--directory", str(tmp_path / "runs"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes cells from lines of shell, which run before the report is copied; `$cell` is their directory."""
    report = Report(scope="full", model="m", criterion="wanda", pattern="2:4", seed=0, perplexity=3.0)
    report.save(tmp_path / "made" / "report.json", Manifest(tmp_path / "made").writing)

    def cells(script: str, *names: str) -> list[Cell]:
        program = tmp_path / "program.sh"
        program.write_text(
            f'#!/bin/sh\nfor cell; do :; done\n{script}\nstatus=$?\ncp "{tmp_path}"/made/* "$cell"\nexit $status\n'
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return [Cell(name, ["test", "--run_dir", str(tmp_path / name)], tmp_path / name) for name in names]

    return cells


def run_all(wanted: list[Cell], workers: list[dict[str, str]]) -> list[Report | str | None]:
    """Run cells until all are known."""
    with Cells(len(wanted), Processes(workers)) as cells:
        while True:
            cells.begin_pass()
            known = [cells.get(cell) for cell in wanted]
            if cells.are_known:
                return known
            cells.wait()


def test_two_cells_run_at_the_same_time_each_with_the_variables_of_its_worker(make, tmp_path, caplog):
    """The first two wait for each other, the third for both."""
    caplog.set_level(logging.INFO, "recon")
    meet = 'for other in a b; do while [ ! -e "$cell/../$other/here" ]; do sleep 0.05; done; done'
    wanted = make(f'echo "$CUDA_VISIBLE_DEVICES" | tee "$cell/here"\n{meet}', "a", "b", "c")
    known = run_all(wanted, [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}])
    assert [report.perplexity for report in known if isinstance(report, Report)] == [3.0] * 3
    assert [(tmp_path / name / "here").read_text() for name in "ab"] == ["5\n", "7\n"]
    assert {"[1/3 a] 5", "[2/3 b] 7"} <= set(caplog.messages)
    assert caplog.messages[-1].startswith("[3/3 c] ")


def test_the_cell_of_a_killed_process_is_taken_again(make, tmp_path, caplog):
    wanted = make('echo start >>"$cell/starts"\n[ "$(wc -l <"$cell/starts")" = 2 ] || kill -9 $$', "a", "b")
    assert all(isinstance(known, Report) for known in run_all(wanted, [{}, {}]))
    assert [(tmp_path / name / "starts").read_text() for name in "ab"] == ["start\n" * 2] * 2
    assert sum("its process was killed by SIGKILL; it is started again" in line for line in caplog.messages) == 2


def test_a_cell_that_is_always_killed_fails_and_stops_nothing(make, tmp_path):
    wanted = make('echo start >>"$cell/starts"\n[ "$(basename "$cell")" = b ] || kill -9 $$', "a", "b")
    failed, ended = run_all(wanted, [{}])
    assert failed == f"killed by SIGKILL twice, see {tmp_path / 'a' / 'output.txt'}"
    assert isinstance(ended, Report)
    assert (tmp_path / "a" / "starts").read_text() == "start\n" * 2


def test_a_cell_that_fails_is_not_tried_again(make, tmp_path):
    (failed,) = run_all(make('echo start >>"$cell/starts"\nexit 3', "a"), [{}])
    assert failed == f"exit status 3, see {tmp_path / 'a' / 'output.txt'}"
    assert (tmp_path / "a" / "starts").read_text() == "start\n"


def test_an_error_ends_the_cells_under_way(make, tmp_path, caplog):
    """Without a word of failed cells, and without a second start."""
    wanted = make('echo $$ >>"$cell/pid"\nexec sleep 600', "a", "b")
    files = [tmp_path / name / "pid" for name in "ab"]

    def interrupted() -> None:
        with Cells(2, Processes([{}, {}])) as cells:
            assert [cells.get(cell) for cell in wanted] == [None, None]
            end = time.monotonic() + PATIENCE
            while not all(file.exists() and file.read_text() for file in files):
                assert time.monotonic() < end
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for file in files:
        (pid,) = file.read_text().split()
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert caplog.messages == []


def test_nothing_starts_after_a_stop():
    children = Children()
    children.stop()
    with pytest.raises(Stopped), children.started(["true"], {}):
        pass


def test_a_cell_of_another_process_is_waited_for(make, monkeypatch, caplog):
    """The other one holds its lock until this one has looked twice; then nobody has run it, and this one does."""
    monkeypatch.setattr(passes, "PAUSE", 0.01)
    caplog.set_level(logging.INFO, "recon")
    ours, theirs = make("true", "a", "b")
    looks, is_free = [], pool.is_free

    def free_after_two_looks(cell: Cell) -> bool:
        looks.append(cell)
        return is_free(cell) and (cell != theirs or looks.count(theirs) > 2)

    monkeypatch.setattr(pool, "is_free", free_after_two_looks)
    assert all(isinstance(known, Report) for known in run_all([theirs, ours], [{}]))
    assert looks.count(ours) == 1
    assert looks.count(theirs) == 3
    assert caplog.messages.count("wait for b, which another process runs") == 1


def test_threads_do_not_outlive_the_cells(make):
    before = threading.active_count()
    run_all(make("true", "a"), [{}, {}])
    assert threading.active_count() == before

"""Processes that a run or a comparison has started end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.slow import quick

DATA = ["--data.num_sequences", "4", "--data.seq_len", "16", "--data.num_validation", "2", "--data.num_test", "2"]
PATIENCE = 60.0  # seconds; a machine under load takes ten to import torch


def children_of(pid: int) -> list[int]:
    """Living processes that `pid` has started, threads of it left out."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, what: str):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


def recon_children(pid: int) -> list[int]:
    """Children that run recon: what asks the system for its cores is none."""
    return [child for child in children_of(pid) if "recon" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
@pytest.mark.parametrize("number", quick([signal.SIGKILL, signal.SIGTERM], signal.SIGKILL))
def test_processes_of_a_run_end_with_the_first(number: signal.Signals, tmp_path: Path) -> None:
    fit = ["fit", "-c", "scopes/full", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    command = [*fit, "--trainer.devices", "2", "--run_dir", str(tmp_path / "run"), *DATA]
    parent = subprocess.Popen([sys.executable, "-m", "recon", *command], stdout=subprocess.DEVNULL)
    try:
        children = wait_for(lambda: recon_children(parent.pid), "the second process")
        parent.send_signal(number)  # before the fit: the child may not have imported torch yet
        parent.wait(PATIENCE)
        wait_for(lambda: not any(alive(child) for child in children), "the second process to end")
    finally:
        for pid in (*recon_children(parent.pid), parent.pid) if parent.poll() is None else ():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
@pytest.mark.parametrize("number", quick([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], signal.SIGKILL))
def test_the_cells_of_a_comparison_end_with_it(number: signal.Signals, tmp_path: Path) -> None:
    command = ["compare", "-c", "comparisons/smoke", "--directory", str(tmp_path), "--workers", "2", "--threads", "1"]
    parent = subprocess.Popen([sys.executable, "-m", "recon", *command], stdout=subprocess.DEVNULL)
    try:
        cells = wait_for(lambda: len(found := recon_children(parent.pid)) == 2 and found, "two cells")
        time.sleep(0.5)
        parent.send_signal(number)
        assert parent.wait(PATIENCE) == (130 if number == signal.SIGINT else -number)
        wait_for(lambda: not any(alive(cell) for cell in cells), "the cells to end")
    finally:
        parent.kill()

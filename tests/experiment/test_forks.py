"""Cells as forks of a process that has imported recon."""

import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from recon.basics.children import Stopped
from recon.cli import main
from recon.experiment.comparison import forks
from recon.experiment.comparison.forks import Forks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`--warm true` is refused elsewhere")

PATIENCE = 30.0
WHO = "import os; print(os.getppid(), os.environ['WORKER'], flush=True)"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forks]:
    monkeypatch.setattr(forks, "SERVER", "tests.experiment.light_server")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    children = Forks()
    yield children
    children.stop()


def run(children: Forks, code: str, worker: str = "1") -> tuple[list[str], int]:
    """Run code in a fork: its lines, and its exit status."""
    environment = {**os.environ, "WORKER": worker}
    with children.started([sys.executable, "-m", "recon", code], environment) as process:
        assert process.stdout is not None
        lines = [line.rstrip() for line in process.stdout]
    return lines, process.returncode


def test_forks_of_a_worker_share_a_process_and_have_its_variables(children: Forks) -> None:
    (first,), status = run(children, WHO)
    (second,), _ = run(children, WHO)
    (other,), _ = run(children, WHO, worker="2")
    assert status == 0
    assert first == second
    assert first.split()[1:] == ["1"]
    assert other.split()[1:] == ["2"]
    assert other.split()[0] != first.split()[0]


def test_forks_at_the_same_time_have_processes_of_their_own(children: Forks) -> None:
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: run(children, f"{WHO}; import time; time.sleep(1)"), range(2)))
    assert len({lines[0].split()[0] for lines, _ in both}) == 2


def test_output_errors_and_status_come_back(children: Forks) -> None:
    lines, status = run(children, "print('a'); print('fails', file=sys.stderr)")
    assert (sorted(lines), status) == (["a", "fails"], 3)
    lines, status = run(children, "1 / 0")
    assert (lines[-1], status) == ("ZeroDivisionError: division by zero", 1)
    assert run(
        children, "assert sys.argv[0] == 'recon'; assert sys.modules['__main__'].__spec__.name == 'recon.__main__'"
    ) == ([], 0)


def test_a_killed_fork_tells_the_signal_and_harms_no_other(children: Forks) -> None:
    (before,), _ = run(children, WHO)
    assert run(children, "import os; os.kill(os.getpid(), 9)") == ([], -signal.SIGKILL)
    assert run(children, WHO)[0] == [before]


def test_a_fork_whose_process_ends_fails_and_the_next_has_another(children: Forks) -> None:
    (before,), _ = run(children, WHO)
    lines, status = run(children, "import os, time; os.kill(os.getppid(), 9); time.sleep(60)")
    assert (lines, status) == ([], 1)
    (after,), status = run(children, WHO)
    assert status == 0
    assert after != before


@pytest.mark.parametrize("seconds_of_imports", ["0", "600"])
def test_a_stop_ends_all_forks_whether_they_run_or_wait_for_imports(children: Forks, seconds_of_imports: str) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    environment = {**os.environ, "SECONDS_OF_IMPORTS": seconds_of_imports}
    entered: queue.Queue[int | None] = queue.Queue()

    def until_stopped(worker: int) -> bool:
        try:
            with children.started([sys.executable, "-m", "recon", code], {**environment, "WORKER": str(worker)}) as one:
                assert one.stdout is not None
                entered.put(int(one.stdout.readline()) if seconds_of_imports == "0" else None)
                one.stdout.read()
        except Stopped:
            return True
        return False

    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(until_stopped, worker) for worker in range(2)]
        forks = [entered.get(timeout=PATIENCE) for _ in ends]
        children.stop()
        assert [end.result(PATIENCE) for end in ends] == [True, True]
    end_of_wait = time.monotonic() + PATIENCE  # the system may need a moment to forget them
    while any(fork is not None and Path(f"/proc/{fork}").exists() for fork in forks):
        assert time.monotonic() < end_of_wait
        time.sleep(0.01)


def test_an_end_lets_forks_do_what_they_do_at_sigterm(children: Forks) -> None:
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(5)))
print("ready", flush=True)
time.sleep(600)
"""
    with (
        suppress(Stopped),
        children.started([sys.executable, "-m", "recon", code], {**os.environ}) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children.end(PATIENCE)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 5


def test_other_programs_are_no_forks(children: Forks) -> None:
    with children.started(["sh", "-c", "echo $PPID"], {**os.environ}) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == os.getpid()


def test_jobs_of_a_cluster_are_not_forked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--workers", "slurm", "--warm", "true", "--directory", str(tmp_path / "runs")]
    assert main(["compare", "-c", "comparisons/smoke", *options]) == 2
    assert "--warm true needs cells on this machine, and Linux; leave it out" in capsys.readouterr().err

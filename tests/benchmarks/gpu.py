"""The acceptance of recon on a GPU: GPU tests, then a table of rows, each in a process and with a limit of its own.

    bash launch/gpu.sh                                  all of it, in nine minutes
    bash launch/gpu.sh --only '7 B'                     rows whose name has this in it
    bash launch/gpu.sh --wheels wheels                  with packages that the machine lacks
    bash launch/gpu.sh --device cpu --tiny              the same way on a CPU, with models of nothing

Writes gpu.json, gpu.md and gpu.log into `$OUT` or runs/gpu, after each row. The exit status is 0 if all that this
machine has the packages for has run and passed; 1 if something failed, was stopped or had no time left.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import gpu_packages, gpu_process, gpu_table
from .gpu_rows import Row, rows

ROOT = Path(__file__).parents[2]
MARK = "mark.gpu"
SECONDS_OF_TESTS = 90.0
TOLERANCE = 0.10
"""Of the tracked peak against the allocator's."""

GOOD, ABSENT = "passed", "skipped"
"""Outcomes that do not count as failures; `ABSENT` is that of a row whose packages are missing."""


def main(arguments: list[str] | None = None) -> int:
    """Check the machine, run all rows, write the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="bash launch/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute")
    parser.add_argument("--tiny", action="store_true", help="models of nothing: tests the way, measures nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows with this in their name")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"), help="for the results")
    parser.add_argument("--scratch", type=Path, help="for runs, which are deleted; 20 GB with all rows")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    if problem := _problem(options.device):
        print(problem)
        return 1
    if options.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    acceptance = Acceptance(options, " ".join(["bash launch/gpu.sh", *given]))
    return acceptance.run()


def _problem(device: str) -> str:
    """What this machine lacks, in one line; empty if nothing."""
    if lacking := gpu_packages.missing(gpu_packages.LIBRARY):
        return f"launch/gpu.sh needs {', '.join(lacking)}; {gpu_packages.cure(lacking)}"
    if outdated := gpu_packages.outdated():
        return f"launch/gpu.sh needs {'; '.join(outdated)}"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return f"launch/gpu.sh needs a CUDA device, torch {torch.__version__} finds none; try --device cpu --tiny"
    return ""


@dataclass
class Acceptance:
    """All measurements and their record.

    Args:
        options: Of the command.
        command: As it was given.
    """

    options: argparse.Namespace
    command: str
    found: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.log = self.options.out / "gpu.log"
        self.log.write_text("")
        chosen = [row for row in rows(self.options.tiny) if self._is_asked(row.name)]
        self.rows = [row for row in chosen if not gpu_packages.missing(row.packages)]
        self.without = [row for row in chosen if row not in self.rows]

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return 60 * self.options.minutes - (time.monotonic() - self.began)

    @property
    def passed(self) -> bool:
        """Whether nothing failed so far, of at least one row that ran."""
        outcomes = {row["outcome"] for row in self.found}
        return GOOD in outcomes and outcomes <= {GOOD, ABSENT}

    def run(self) -> int:
        """Run tests and rows, and write after each; the exit status."""
        for row in self.without:
            lacking = gpu_packages.missing(row.packages)
            self._note(row.name, row.kind, ABSENT, f"needs {', '.join(lacking)}; {gpu_packages.cure(lacking)}")
        if self._is_asked("GPU tests"):
            self._test()
        try:
            where = gpu_process.context(self.options.device, "tests.benchmarks.gpu_fit")
        except gpu_process.Died as error:
            self._note("processes", "fit", "failed", str(error))
            self.rows = []
        while self.rows:
            row = self.rows.pop(0)
            weights = sum(one.weight for one in self.rows) + row.weight
            limit = self.left * row.weight / weights
            if limit < row.least:
                reason = f"no time: {limit:.0f} s of {row.least:.0f} that it needs are left"
                self._note(row.name, row.kind, "no time", reason)
            else:
                self._measure(row, where, limit)
        print(f"\n{gpu_table.tables(self._record())}")
        return 0 if self.passed else 1

    def _is_asked(self, name: str) -> bool:
        return any(text in name for text in self.options.only)

    def _measure(self, row: Row, where: Any, limit: float) -> None:
        directory = Path(tempfile.mkdtemp(prefix="recon-gpu-", dir=self.options.scratch))
        outcome, reason, result = GOOD, "", {}
        with self.log.open("a") as file:
            file.write(f"\n== {row.name}\n")
        began = time.monotonic()
        try:
            result = gpu_process.run(where, measure, (row, self.options.device, directory), limit, self.log)
        except (gpu_process.Stopped, gpu_process.Died) as error:
            outcome = "stopped" if isinstance(error, gpu_process.Stopped) else "failed"
            reason, result = str(error), _what_is_left(directory)
            if result["windows_done"]:
                reason += f", after {result['windows_done']} of {row.num_windows} windows"
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self.rates = result.pop("rates", self.rates)
        self.environment = result.pop("environment", self.environment)
        result |= {"num_windows": row.num_windows, "wall_seconds": time.monotonic() - began}
        if outcome == GOOD and result.get("flops") and self.rates:
            result["share"] = result["flops"] / result["seconds"] / self.rates["bf16"]
        if row.is_compared and outcome == GOOD and (reason := _off(result)):
            outcome = "off"
        self._note(row.name, row.kind, outcome, reason, **result)

    def _test(self) -> None:
        """Run the GPU tests in a process of their own."""
        name, kind = "GPU tests", "tests"
        if self.options.device != "cuda":
            return self._note(name, kind, ABSENT, "need a CUDA device")
        if gpu_packages.missing(("pytest",)):
            return self._note(name, kind, ABSENT, f"need pytest; {gpu_packages.cure(['pytest'])}")
        files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in file.read_text()]
        # A warning of a library in a version that was never met is not a failure; without xdist there is no -n.
        line = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-q"]
        line += ["--continue-on-collection-errors", *([] if gpu_packages.missing(("xdist",)) else ["-n", "0"])]
        began = time.monotonic()
        with self.log.open("a") as file:
            file.write("\n== GPU tests\n")
            file.flush()
            try:
                code = subprocess.run(
                    [*line, *files], cwd=ROOT, stdout=file, stderr=file, timeout=min(SECONDS_OF_TESTS, self.left)
                ).returncode
            except subprocess.TimeoutExpired as error:
                return self._note(name, kind, "stopped", f"stopped after {error.timeout:.0f} s")
        last = self.log.read_text().rstrip().rpartition("\n")[2]
        outcome = GOOD if code == 0 and " passed" in last else "failed"  # not if all were skipped
        self._note(name, kind, outcome, last.strip("= "), wall_seconds=time.monotonic() - began)

    def _note(self, name: str, kind: str, outcome: str, reason: str, **result: Any) -> None:
        self.found.append({"name": name, "kind": kind, "outcome": outcome, "reason": reason, **result})
        print(f"{name}: {outcome}{f', {reason}' if reason else ''}", flush=True)
        record = self._record()
        (self.options.out / "gpu.json").write_text(json.dumps(record, indent=1))
        (self.options.out / "gpu.md").write_text(gpu_table.tables(record))

    def _record(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "seconds": time.monotonic() - self.began,
            "verdict": "passed" if self.passed and not self.rows else "not passed",
            "environment": self.environment,
            "rates": self.rates,
            "rows": self.found,
        }


def measure(row: Row, device: str, directory: Path) -> dict[str, Any]:
    """As `gpu_fit.measure`, in a process that imports it only now."""
    from .gpu_fit import measure

    return measure(row, device, directory)


def _what_is_left(directory: Path) -> dict[str, Any]:
    """The facts of a row that did not end."""
    from .gpu_fit import facts

    return facts(directory)


def _off(result: dict[str, Any]) -> str:
    """Say how far the tracked peak is from the allocator's, if that is too far."""
    tracked, allocated = result.get("tracked_bytes"), result.get("allocated_bytes")
    if not tracked or not allocated or abs(tracked / allocated - 1) <= TOLERANCE:
        return ""
    return f"the tracked peak is {tracked / allocated:.3f} of the allocated one, not within {TOLERANCE:.0%}"


if __name__ == "__main__":
    sys.exit(main())

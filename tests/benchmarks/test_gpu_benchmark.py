"""The acceptance on a GPU: what it does when packages, time or a device are missing, and when a row fails."""

import argparse
import json
import operator
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from tests.benchmarks import gpu, gpu_packages, gpu_process
from tests.benchmarks.gpu_kernels import KernelProfile
from tests.benchmarks.gpu_process import Died, Stopped
from tests.benchmarks.gpu_rows import COMMAND, ZERO, Row

ROOT = Path(__file__).parents[2]
SPAWN = gpu_process.multiprocessing.get_context("spawn")


def test_the_library_runs_without_the_packages_of_the_command() -> None:
    """As on a machine that has only PyTorch, transformers and lightning, and jaxtyping."""
    ours = {"jsonargparse", "docstring_parser", "typeshed_client"}  # Lightning imports them where they are installed
    absent = {*COMMAND, *ZERO} - {*ours, "matplotlib", "tensorboard", "pyarrow", "pandas", "psutil", "einops"}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)})); import tests.benchmarks.gpu_fit"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_their_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_packages, "LIBRARY", ("torch", "not_there_1", "not_there_2"))
    monkeypatch.setattr(gpu_packages, "WITHOUT_WHEEL", ("not_there_2",))
    assert gpu.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("launch/gpu.sh needs not_there_1, not_there_2; ")
    assert "-d wheels not_there_1 && pip wheel " in said
    assert " -w wheels not_there_2; here: bash launch/gpu.sh --wheels wheels" in said


def test_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "transformers":
            raise PackageNotFoundError
        return "2.9.1+cu128"

    monkeypatch.setattr(gpu_packages, "version", version)
    assert gpu_packages.outdated() == ["torch >= 2.11, got 2.9.1+cu128"]


def test_a_process_has_a_limit_and_says_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu_process.run(SPAWN, operator.add, (1, 2), 60, log) == 3
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped after 3 s"):
        gpu_process.run(SPAWN, time.sleep, (600,), 3, log)
    assert time.monotonic() - began < 30
    with pytest.raises(Died, match="ValueError: invalid literal"):
        gpu_process.run(SPAWN, int, ("x",), 60, log)
    assert "Traceback" in log.read_text()
    with pytest.raises(Died, match="ended with status 3"):
        gpu_process.run(SPAWN, os._exit, (3,), 60, log)


def acceptance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *given: Row, minutes: float = 9) -> gpu.Acceptance:
    monkeypatch.setattr(gpu, "rows", lambda tiny: list(given))
    monkeypatch.setattr(gpu_process, "context", lambda device, preload: None)
    options = argparse.Namespace(device="cpu", tiny=True, minutes=minutes, only=[""], out=tmp_path, scratch=tmp_path)
    return gpu.Acceptance(options, "bash launch/gpu.sh")


def outcomes(found: gpu.Acceptance) -> dict[str, str]:
    return {row["name"]: row["outcome"] for row in found.found}


def test_rows_that_fail_are_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(where: Any, measure: Any, args: Any, seconds: float, log: Path) -> dict[str, Any]:
        row, _, directory = args
        if row.name == "breaks":
            raise Died("RuntimeError: no")
        if row.name == "hangs":
            phase = {"seconds": 1.0, "host_bytes": 1, "device_allocated_bytes": 50, "split": None}
            phases = [{"phase": f"window {name}", **phase, "categories": {"device": {"weights": 49}}} for name in "ab"]
            (directory / "memory.json").write_text(json.dumps({"phases": phases, "baseline_host_bytes": 1}))
            raise Stopped("stopped after 9 s")
        if row.kind == "rates":
            return {"rates": {"bf16": 100.0}, "environment": {}}
        return {"seconds": 2.0, "flops": 50, "tracked_bytes": 80, "allocated_bytes": 80 if row.name == "good" else 100}

    monkeypatch.setattr(gpu_process, "run", run)
    names = ("breaks", "hangs", "off", "good")
    found = acceptance(
        tmp_path, monkeypatch, Row("rates", kind="rates"), *map(Row, names), Row("lacks", packages=("no",))
    )
    assert found.run() == 1
    assert outcomes(found) == {
        **{"lacks": "skipped", "GPU tests": "skipped", "rates": "passed"},
        **{"breaks": "failed", "hangs": "stopped", "off": "off", "good": "passed"},
    }
    by_name = {row["name"]: row for row in found.found}
    assert by_name["breaks"]["reason"] == "RuntimeError: no"
    assert by_name["hangs"]["reason"] == "stopped after 9 s, after 2 of 64 windows"
    assert (by_name["hangs"]["tracked_bytes"], by_name["hangs"]["allocated_bytes"]) == (49, 50)
    assert by_name["good"]["share"] == 50 / 2 / 100
    assert by_name["off"]["reason"].startswith("the tracked peak is 0.800 of the allocated one")
    page = (tmp_path / "gpu.md").read_text()
    assert "| hangs | stopped |  | 2/64 |" in page
    assert "- breaks: RuntimeError: no\n" in page
    assert json.loads((tmp_path / "gpu.json").read_text())["verdict"] == "not passed"


def test_rows_without_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def run(where: Any, measure: Any, args: Any, seconds: float, log: Path) -> dict[str, Any]:
        limits.append(seconds)
        return {}

    monkeypatch.setattr(gpu_process, "run", run)
    given = Row("heavy", weight=3.0), Row("light", weight=1.0), Row("long", least=1000.0)
    found = acceptance(tmp_path, monkeypatch, *given, minutes=5.5)
    assert found.run() == 1
    assert outcomes(found) == {"GPU tests": "skipped", "heavy": "passed", "light": "passed", "long": "no time"}
    assert limits == pytest.approx([330 * 3 / 5.5, 330 * 1 / 2.5], rel=0.05)


def test_all_that_ran_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "run", lambda *args: {})
    assert acceptance(tmp_path, monkeypatch, Row("one"), Row("lacks", packages=("no",))).run() == 0
    assert acceptance(tmp_path, monkeypatch, Row("lacks", packages=("no",))).run() == 1  # nothing ran


def event(name: str, microseconds: float, kind: DeviceType = DeviceType.CUDA, annotates: bool = False) -> Any:
    time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, time_range=time_range, device_type=kind, is_user_annotation=annotates)


def test_kernels_of_a_device_are_summed_by_name() -> None:
    profile = KernelProfile(torch.device("cuda"), 1, 1)
    events = [event("gemm", 3000), event("copy", 1000), event("gemm", 4000)]
    events += [event("cudaLaunchKernel", 9000, DeviceType.CPU), event("Optimizer.step", 8000, annotates=True)]
    profile._profile, profile._seconds = SimpleNamespace(events=lambda: events), 0.016  # pyright: ignore
    assert profile.result() == {
        "seconds": 0.016,
        "busy_seconds": 0.008,
        "kernels": [
            {"name": "gemm", "share": 7 / 8, "milliseconds": 7.0, "calls": 2},
            {"name": "copy", "share": 1 / 8, "milliseconds": 1.0, "calls": 1},
        ],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_build_without_a_profile_of_the_device_says_so() -> None:
    profile = KernelProfile(torch.device("cuda"), 1, 1)
    profile.on_phase_start("window a")
    profile.on_run_end(failed=False)
    assert profile.result() == {"reason": "this build of torch cannot profile cuda"}

"""The script of the acceptance on a GPU: its whole way on a CPU, with models of nothing."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.benchmarks.gpu_rows import rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    line = ["bash", "launch/gpu.sh", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--scratch", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu.log").read_text()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["verdict"] == "passed"
    assert record["rates"].keys() == {"bf16", "tf32", "fp32"}
    assert record["environment"]["torch"] == version("torch")
    found = {row["name"]: row for row in record["rows"]}
    assert found.pop("GPU tests")["outcome"] == "skipped"
    assert {row["outcome"] for row in found.values()} == {"passed"}
    assert found.keys() == {row.name for row in rows(tiny=True)}
    for name, row in found.items():
        if row["kind"] != "fit":
            continue
        kernels = row["profile"]["kernels"]
        assert 1 <= len(kernels) <= 5
        assert 0 < sum(kernel["share"] for kernel in kernels) <= 1
        assert row["share"] == pytest.approx(row["flops"] / row["seconds"] / record["rates"]["bf16"])
        assert (
            row["windows_done"]
            == row["num_windows"]
            == {"submodule": 4, "block": 2, "matrix": 2, "full": 0}[name.partition(",")[0]]
        )
        if not name.endswith(("ZeRO-2", "ZeRO-3", "FSDP2")):  # whose activations are not followed
            assert row["tracked_bytes"] == pytest.approx(row["planned_bytes"], rel=0.1)
    assert found["recon fit, bundled model"]["perplexity"] > 1
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} | passed |" in page for name in found if name != "rates")
    assert page.strip() in done.stdout
    assert not list(tmp_path.glob("recon-gpu-*"))


def test_wheels_go_before_the_machine(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    line = ["bash", "launch/gpu.sh", "--wheels", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"--wheels needs a directory with wheels, got {tmp_path}" in done.stderr
    with zipfile.ZipFile(tmp_path / "argparse-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("argparse.py", "raise SystemExit('from the wheel')")
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "from the wheel" in done.stderr

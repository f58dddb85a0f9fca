"""`recon test` on runs of every kind, with and without a model, and on sparse models."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from recon.cli import main
from tests.cli.test_cli import DATA, RANDOM


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruning without a model, with moved weights, and a recovery from it."""
    path = tmp_path_factory.mktemp("runs")
    assert main(["prune", "--run_dir", str(path / "pruned"), "--criterion=SparseGPT", *RANDOM, *DATA]) == 0
    options = ["--run_dir", str(path / "fit"), "--masks", str(path / "pruned" / "masks.safetensors")]
    assert main(["fit", "-c", "scopes/matrix", *options, *RANDOM, *DATA]) == 0
    return path


def outcome(path: Path, to: Path, *more: str) -> dict[str, Any]:
    assert main(["test", str(path), "--run_dir", str(to), *more]) == 0
    return json.loads((to / "report.json").read_text())


def test_a_run_without_a_model_is_its_source_under_masks_and_moved_weights(runs: Path, tmp_path: Path) -> None:
    report, held = outcome(runs / "pruned", tmp_path), json.loads((runs / "pruned" / "report.json").read_text())
    assert report["perplexity"] == held["perplexity"]
    assert (report["scope"], report["criterion"], report["mask_violations"]) == ("pruned", "sparsegpt", 0)
    assert report["sparsity"] == held["sparsity"]
    assert report["dense_perplexity"] == held["dense_perplexity"]


def test_the_model_within_a_run_is_the_run(runs: Path, tmp_path: Path) -> None:
    one, other = outcome(runs / "fit", tmp_path / "a"), outcome(runs / "fit" / "model", tmp_path / "b")
    for field in ("scope", "label", "perplexity", "sparsity", "mask_violations", "recovered", "protocol"):
        assert one[field] == other[field], field
    assert one["scope"] == "matrix"


def test_a_sparse_model_is_not_called_dense(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "fit" / "model", tmp_path / "copy")
    report = outcome(tmp_path / "copy", tmp_path / "t", *DATA)
    assert report["scope"] == "sparse"
    assert report["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert 0 < report["model_sparsity"] < report["sparsity"]
    assert any(line.startswith("sparse ") for line in capsys.readouterr().out.splitlines())
    assert outcome(Path("bundled"), tmp_path / "d", *DATA)["scope"] == "dense"


def test_a_run_without_model_and_masks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fingerprint.json").write_text("{}")
    assert main(["test", str(tmp_path)]) == 2
    assert "needs a model or a run with model or masks, got" in capsys.readouterr().err


def test_the_hint_of_prune_can_be_pasted(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    assert main(["prune", "--run_dir", str(runs / "pruned"), "--criterion=SparseGPT", *RANDOM, *DATA]) == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recover with: recon fit")]
    _, *args = shlex.split(hint.partition(": ")[2])
    assert args[-2:] == ["--model.start", "moved"]
    assert main([*args, "--run_dir", str(tmp_path / "run"), "--model.epochs=1"]) == 0
    text = capsys.readouterr().out
    rows = [found[1] for line in text.splitlines() if (found := re.match(r"(\w+) +\d", line))]
    assert [name for name in rows if name in ("dense", "pruned", "submodule")] == ["dense", "pruned", "submodule"]
    assert "memory" not in text.replace("memory.json", "")
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert log[0].startswith("--- ")
    assert "load random" in log

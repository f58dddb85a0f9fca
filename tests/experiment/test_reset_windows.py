"""A run whose learning rate is too high: every window keeps its start, and the run says so wherever it speaks."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from recon.cli import main
from recon.pruning.masks import Masks
from tests.experiment.test_ownership import DATA, MODEL

FIT = ["fit", "-c", "scopes/submodule", *MODEL, *DATA, "--model.epochs=1", "--model.start=pruned", "--model.lr=3"]


def test_windows_that_end_worse_are_named_counted_and_recorded(tmp_path: Path, capsys: Any) -> None:
    assert main([*FIT, "--drift=false", "--run_dir", str(tmp_path)]) == 0
    printed, logged = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    report, results = (json.loads((tmp_path / name).read_text()) for name in ("report.json", "windows.json"))
    names = ["000.attention", "000.mlp", "001.attention", "001.mlp"]
    assert list(report["windows"]) == list(results) == names
    for name, errors in report["windows"].items():
        assert errors.keys() == {"before", "after", "discarded"}
        assert errors["after"] == errors["before"] < errors["discarded"]
        assert all(results[name][key] == value for key, value in errors.items())
        for text in (printed, logged):
            assert text.count(f"window {name} ended worse than it began, held-out error {errors['before']:.4g} ") == 1
    assert "4 of 4 windows ended worse than they began and kept their start" in " ".join(printed.split())
    assert report["perplexity"] == pytest.approx(report["pruned_perplexity"], rel=1e-6)
    assert report["recovered"] == pytest.approx(0.0, abs=1e-3)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all((written[name][~keep] == 0).all() for name, keep in Masks.load(tmp_path / "masks.safetensors").items())

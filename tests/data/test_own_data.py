"""A user's own data module: named by its class, its hooks called, its loaders and tokens used."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from recon.cli import main
from tests.support.shapes import TIED_LLAMA, random_model
from tests.support.slow import slow

MODULE = '''
import torch
from recon.data import ResumableLoader, TokenData
from lightning import LightningDataModule

CALLS = []


class Mine(TokenData):
    """Tokens of a generator.

    Args:
        scale: Which tokens.
    """

    def __init__(self, scale: int = 1, seq_len: int = 32, batch_size: int = 4) -> None:
        super().__init__(seq_len=seq_len, batch_size=batch_size)
        self.scale = scale

    def identity(self):
        return {"scale": self.scale}

    def tokens(self, split):
        assert self.made, "setup first"
        generator = torch.Generator().manual_seed(len(split) * self.scale)
        return torch.randint(2000, (8, self.seq_len), generator=generator)

    def prepare_data(self):
        CALLS.append("prepare_data")

    def setup(self, stage):
        assert "prepare_data" in CALLS
        CALLS.append("setup " + stage)
        self.made = True

    def train_dataloader(self):
        CALLS.append("train_dataloader")
        return super().train_dataloader()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        CALLS.append("before")
        return batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        CALLS.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        CALLS.append("after " + (" ".join(sorted(batch)) if isinstance(batch, dict) else "no dict"))
        return batch

    def teardown(self, stage):
        CALLS.append("teardown " + stage)


class Foreign(LightningDataModule):
    """Knows nothing of tokens."""
'''
MODEL = random_model(TIED_LLAMA)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A module `own_data` in the working directory, where `recon` finds it; its record of calls."""
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    sys.path.append(str(tmp_path))
    import own_data

    yield own_data.CALLS
    del sys.modules["own_data"]


def fit(scope: str, *more: str) -> dict[str, Any]:
    args = ["fit", "-c", f"scopes/{scope}", "--run_dir", "run", *MODEL, "--summary=false", *more]
    assert main(args) == 0
    return json.loads(Path("run/report.json").read_text())


@pytest.mark.parametrize(
    ("scope", "seen"),
    [
        ("full", "after input_ids"),
        ("submodule", "after attention hidden target"),
        slow("block", "after hidden target"),
        slow("matrix", "after no dict"),
    ],
)
def test_hooks_run_around_the_runs_own_batches(scope: str, seen: str, calls: list[str]) -> None:
    epochs = [] if scope == "matrix" else ["--model.epochs=1"]
    report = fit(scope, "--data=own_data.Mine", "--data.scale=3", "--seed_everything=5", *epochs)
    assert (report["seed"], report["protocol"]["seq_len"]) == (5, 32)
    assert calls[:3] == ["prepare_data", "setup fit", "setup test"]  # before anything is pruned
    assert calls[3:5] == ["prepare_data", "setup fit"]  # Lightning's own
    assert calls[-2:] == ["teardown fit", "teardown test"]
    assert seen in calls
    batches = [call for call in calls if call.startswith("after")]
    assert len(batches) == calls.count("before") == calls.count("transfer") > 0
    assert ("train_dataloader" in calls) == (scope == "full")
    saved = yaml.safe_load(Path("run/config.yaml").read_text())["data"]
    assert saved == {"class_path": "own_data.Mine", "init_args": {"scale": 3, "seq_len": 32, "batch_size": 4}}
    assert "scale" in Path("run/fingerprint.json").read_text()


def test_the_same_class_by_yaml_and_for_the_other_commands(
    calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text("data: {class_path: own_data.Mine, init_args: {scale: 2}}\n")
    report = fit("matrix", "-c", "own.yaml", "--data.seq_len=16")
    assert report["protocol"]["seq_len"] == 16
    assert main(["test", "run", "--run_dir", "tested"]) == 0
    tested = json.loads(Path("tested/report.json").read_text())
    assert tested["perplexity"] == report["perplexity"]
    assert main(["prune", "-c", "own.yaml", *MODEL, "--run_dir", "pruned", "--data.seq_len=16"]) == 0
    pruned = json.loads(Path("pruned/report.json").read_text())
    assert pruned["perplexity"] == report["pruned_perplexity"]


def test_other_data_is_another_run(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit("matrix", "--data=own_data.Mine")
    args = ["fit", "-c", "scopes/matrix", "--run_dir", "run", *MODEL, "--data=own_data.Mine", "--data.scale=2"]
    assert main(args) == 1
    assert "scale" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "prune"])
def test_a_class_that_does_not_fit_is_refused(
    command: str, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    scope = ["-c", "scopes/matrix"] if command == "fit" else []
    assert main([command, *scope, *MODEL, "--run_dir", "run", "--data=own_data.Foreign"]) == 2
    error = capsys.readouterr().err
    assert "own_data.Foreign" in error
    assert "subclass of TokenData" in error
    assert not Path("run").exists()

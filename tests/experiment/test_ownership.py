"""One owner for each run directory, and nothing left of a run that was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recon.basics.locks import owned
from recon.basics.run_paths import RunPaths
from recon.cli import main

SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, tie_word_embeddings: true}"
)
MODEL = ["--model.name=random", f"--model.shape={SHAPE}"]
DATA = ["--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"]
FIT = ["fit", "-c", "scopes/submodule", *MODEL, *DATA, "--model.epochs=2", "--baselines=false", "--drift=false"]
PRUNE = ["prune", *MODEL, *DATA, "--drift=false", "--summary=false"]

SLOWLY = """
import sys, time
from recon.scopes.distillation import Distillation
step = Distillation.training_step
def slow(self, *args):
    time.sleep(0.3)
    return step(self, *args)
Distillation.training_step = slow
from recon.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Runs recon with a pause in every step, so that two commands meet in the middle of their windows."""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by one command."""
    path = tmp_path_factory.mktemp("single") / "run"
    assert main([*FIT, "--run_dir", str(path)]) == 0
    return path


def test_of_two_commands_in_one_directory_one_runs_and_the_other_names_it(single: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOWLY, *FIT, "--run_dir", str(tmp_path / "pair")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes, said
    runner = codes.index(0) if 1 in codes else int("nothing to do" in said[0])
    other, its = both[1 - runner], said[1 - runner]
    if other.returncode:
        assert other.returncode == 1, its
        assert f"owned by process {both[runner].pid} on host" in its or "a process that has just begun" in its
    else:
        assert "finished: nothing to do" in its
    pair = tmp_path / "pair"
    names = sorted(path.name for path in (single / "windows").iterdir())
    assert sorted(path.name for path in (pair / "windows").iterdir()) == names
    for file in ("model/model.safetensors", *(f"windows/{name}" for name in names)):
        ours, theirs = load_file(pair / file), load_file(single / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_parts_share_a_directory_and_merge_waits_for_none_of_them(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    first, second = ([*FIT, "--run_dir", str(run), "--windows", f"{number}/2"] for number in (1, 2))
    with owned(run):
        assert main(first) == 1
    assert f"owned by process {os.getpid()} on host" in capsys.readouterr().err
    with owned(run, RunPaths(run).parts / "002-of-002"):
        assert main(first) == 0
        assert main(second) == 1
        assert main(["merge", str(run)]) == 1
    assert "(002-of-002), owned by process" in capsys.readouterr().err
    assert main(second) == 0
    assert main(["merge", str(run)]) == 0


def test_prune_owns_its_directory(tmp_path: Path, capsys: Any) -> None:
    with owned(tmp_path):
        assert main([*PRUNE, "--run_dir", str(tmp_path)]) == 1
    assert f"owned by process {os.getpid()} on host" in capsys.readouterr().err
    assert not RunPaths(tmp_path).masks.exists()


def test_what_kills_have_left_is_swept_from_a_finished_run(single: Path) -> None:
    run, number = RunPaths(single), "0123456789abcdef" * 2
    held = {path: path.read_bytes() for path in single.rglob("*.safetensors")} | {run.report: run.report.read_bytes()}
    left = [single / f".report.json.{number}.tmp", run.windows / f".000.mlp.safetensors.{number}.tmp", run.start]
    folders = [single / ".model.partial", single / ".model.old", run.checkpoints, run.block_masks, run.dense]
    for folder in folders:
        folder.mkdir()
    for file in [*left, *(folder / "x" for folder in folders)]:
        file.write_text("left")
    assert main([*FIT, "--run_dir", str(single)]) == 0
    assert not [path for path in [*left, *folders] if path.exists()]
    assert {path: path.read_bytes() for path in held} == held


def test_a_killed_prune_takes_the_masks_that_it_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, command = RunPaths(tmp_path), [*PRUNE, "--run_dir", str(tmp_path)]
    assert main(command) == 0
    straight, masks = json.loads(run.report.read_text()), run.masks.read_bytes()
    assert straight["environment"]["resumed"] is False
    run.report.unlink()

    def pruned_again(*_: Any) -> None:
        raise AssertionError("the masks were there")

    monkeypatch.setattr("recon.experiment.baselines.prune_to", pruned_again)
    assert main(command) == 0
    again = json.loads(run.report.read_text())
    assert again["environment"]["resumed"] is True
    assert run.masks.read_bytes() == masks
    for name in ("perplexity", "dense_perplexity", "sparsity", "mask_violations"):
        assert again[name] == straight[name]

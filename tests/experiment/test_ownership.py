"""One owner for each run directory, and nothing left of a run that was killed."""

import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recon.basics.locks import owned
from recon.basics.run_paths import RunPaths
from recon.cli import main
from tests.support import pairs
from tests.support.processes import in_processes
from tests.support.slow import quick

SHAPE = (
    "{model_type: llama, vocab_size: 2048, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, tie_word_embeddings: true}"
)
MODEL = ["--model.name=random", f"--model.shape={SHAPE}"]
DATA = ["--data.num_sequences=8", "--data.seq_len=32", "--data.num_validation=4", "--data.num_test=8"]
PRUNE = ["prune", *MODEL, *DATA, "--drift=false", "--summary=false"]


def fit(scope: str) -> list[str]:
    """A command without its directory."""
    epochs = [] if scope == "matrix" else ["--model.epochs=2"]
    return ["fit", "-c", f"scopes/{scope}", *MODEL, *DATA, *epochs, "--baselines=false", "--drift=false"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Scope -> a finished run, made by one command; each once."""

    @cache
    def run(scope: str) -> Path:
        path = tmp_path_factory.mktemp(scope) / "run"
        assert main([*fit(scope), "--run_dir", str(path)]) == 0
        return path

    return run


@pytest.mark.parametrize("scope", quick(("submodule", "full", "matrix", "block"), "submodule"))
def test_of_two_commands_in_one_directory_one_runs_and_the_other_names_it(
    scope: str, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    pair, command = tmp_path, [*fit(scope), f"--run_dir={tmp_path}"]
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(in_processes, pairs.command, *command, world=1) for _ in range(2)]
        both = [end.result()[0] for end in ends]
    statuses = [status for _, status, _ in both]
    assert 0 in statuses, both
    runner = statuses.index(0) if 1 in statuses else int("nothing to do" in both[0][2])
    (pid, _, _), (_, status, said) = both[runner], both[1 - runner]
    if status:
        assert status == 1, said
        owner = f"owned by process {pid} on host {socket.gethostname()}"
        assert owner in said or "a process that has just begun" in said
    else:
        assert "finished: nothing to do" in said
    single = alone(scope)
    files = [path.relative_to(single) for path in sorted(single.rglob("*.safetensors"))]
    assert [path.relative_to(pair) for path in sorted(pair.rglob("*.safetensors"))] == files
    assert len(files) == {"matrix": 4, "submodule": 6, "block": 4, "full": 2}[scope]  # model, masks, windows
    for file in files:
        ours, theirs = load_file(pair / file), load_file(single / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_parts_share_a_directory_and_merge_waits_for_none_of_them(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    first, second = ([*fit("submodule"), "--run_dir", str(run), "--windows", f"{number}/2"] for number in (1, 2))
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


def test_what_kills_have_left_is_swept_from_a_finished_run(alone: Callable[[str], Path]) -> None:
    single = alone("submodule")
    run, number = RunPaths(single), "0123456789abcdef" * 2
    held = {path: path.read_bytes() for path in single.rglob("*.safetensors")} | {run.report: run.report.read_bytes()}
    left = [single / f".report.json.{number}.tmp", run.windows / f".000.mlp.safetensors.{number}.tmp", run.start]
    folders = [single / ".model.partial", single / ".model.old", run.checkpoints, run.block_masks, run.dense]
    for folder in folders:
        folder.mkdir()
    for file in [*left, *(folder / "x" for folder in folders)]:
        file.write_text("left")
    assert main([*fit("submodule"), "--run_dir", str(single)]) == 0
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

"""Mixtures of experts through the real commands: pruned to 2:4, recovered, verified."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recon.cli import main
from recon.cli.fit import main as fit
from recon.pruning.masks import Masks
from recon.report import Report
from tests.support import distributed_runs as runs
from tests.support.families import MIXTURES
from tests.support.processes import in_processes
from tests.support.slow import quick

CASES = [(family, scope) for family in MIXTURES for scope in ("submodule", "block", "matrix")]


def arguments(family: str, run: Path) -> list[str]:
    shape = {"model_type": family, "vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"num_sequences": 16, "seq_len": 32, "num_validation": 4, "num_test": 4, "batch_size": 4}
    return [
        *("--model.name", "random", "--model.shape", json.dumps(shape | MIXTURES[family]), "--pattern", "2:4"),
        *(part for name, size in sizes.items() for part in (f"--data.{name}", str(size))),
        *("--drift", "false", "--baselines", "false", "--summary", "false", "--run_dir", str(run)),
    ]


@pytest.mark.parametrize(("family", "scope"), quick(CASES, ("gpt_oss", "matrix")))
def test_a_mixture_is_pruned_and_recovered(family: str, scope: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = [] if scope == "matrix" else ["--model.epochs", "1"]
    more += ["--pruning.experts", "all"] if family == "afmoe" else []  # its untrained router chooses the same experts
    assert main(["fit", "-c", f"scopes/{scope}", *arguments(family, run), *more]) == 0
    report, masks = Report.load(run / "report.json"), Masks.load(run / "masks.safetensors")
    assert (report.sparsity, report.mask_violations) == (0.5, 0)
    stacks = {name: keep for name, keep in masks.items() if keep.ndim == 3}
    assert stacks
    assert not stacks.keys() & report.left_dense.keys()
    assert all(torch.equal(keep.flatten(1).float().mean(1), torch.full((len(keep),), 0.5)) for keep in stacks.values())
    assert main(["verify", str(run)]) == 0


def test_adapters_of_experts_are_refused_before_pruning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = [*arguments("mixtral", tmp_path / "run"), "--model.parameters", "lora"]
    assert main(["fit", "-c", "scopes/block", *options]) != 0
    error = capsys.readouterr().err
    assert "model.parameters: lora learns updates of Linear and Conv1D modules, got 24 matrices of fused" in error
    assert not (tmp_path / "run" / "masks.safetensors").exists()


def assert_pruned(run: Path) -> None:
    """The written model, loaded, for files hold experts one by one, has zeros where its masks say so."""
    masks = Masks.load(run / "masks.safetensors")
    weights = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    assert any(keep.ndim == 3 for keep in masks.values())
    assert all(not weights[name][~keep].any() and weights[name][keep].any() for name, keep in masks.items())


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["submodule", "block"])
def test_an_interrupted_mixture_goes_on_and_ends_as_if_it_had_not_been(scope: str, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = {
        run: ["-c", f"scopes/{scope}", *arguments("mixtral", run), "--model.epochs", "1"] for run in (stopped, whole)
    }
    with pytest.raises(RuntimeError, match="the test says stop"):
        runs.main_with(runs.Fail(6), command[stopped])
    assert list(stopped.glob("windows/*.safetensors"))
    for run in (stopped, whole):
        assert main(["fit", *command[run]]) == 0
    assert runs.same(runs.weights(stopped), runs.weights(whole))
    assert_pruned(stopped)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_masks_of_slices_hold_in_two_processes(strategy: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.batch_size", "2"]
    if strategy == "zero3":  # a model as small as this one would otherwise stay whole
        more += ["--trainer.strategy.init_args.min_partitioned", "0"]
    command = ["-c", "scopes/full", *arguments("mixtral", run), "-c", f"strategies/{strategy}", *more]
    in_processes(fit, command)
    report = Report.load(run / "report.json")
    assert (report.sparsity, report.mask_violations) == (0.5, 0)
    assert_pruned(run)

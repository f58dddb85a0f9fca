"""The precision of what is written: that of the source, whatever is computed in; and what is measured of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.cli import main
from recon.models.loading import ModelSource
from recon.models.stored import dtype_of, share_of_zeros, size_on_disk, stored_weights
from recon.pruning.masks import Masks
from tests.cli.test_cli import DATA
from tests.support.shapes import TIED_LLAMA
from tests.support.slow import quick


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory whose weights are bf16."""
    path = tmp_path_factory.mktemp("bf16") / "dense"
    model, tokenizer = ModelSource("random", TIED_LLAMA, dtype="bfloat16").load()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def fitted(name: str, scope: str, run: Path, *more: str) -> dict[str, torch.Tensor]:
    epochs = [] if scope == "matrix" else ["--model.epochs=1"]
    pattern = ["--pattern=NM", "--pattern.keep=2", "--pattern.of=4"]
    options = ["--model.name", name, "--run_dir", str(run), *DATA, *epochs, *pattern, *more]
    assert main(["fit", "-c", f"scopes/{scope}", *options]) == 0
    return load_file(run / "model" / "model.safetensors")


CASES: dict[str, tuple[str, list[str]]] = {
    "matrix": ("matrix", []),
    "full": ("full", []),
    "lora": ("full", ["--model.parameters=lora"]),
    "host": ("submodule", ["--model.offload=host"]),
    "disk": ("block", ["--model.offload=disk"]),
}


@pytest.mark.parametrize("case", quick(CASES, "disk"))
def test_a_bf16_model_comes_back_in_bf16_and_is_measured_as_written(case: str, bf16: str, tmp_path: Path) -> None:
    scope, options = CASES[case]
    weights = fitted(bf16, scope, tmp_path / "run", *options)
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    masks = Masks.load(tmp_path / "run" / "masks.safetensors")
    for name, keep in masks.items():
        assert not weights[name][~keep].any()
        assert int((weights[name].view(-1, 4) != 0).sum(1).max()) <= 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model_sparsity"] == share_of_zeros(weights.values())
    assert report["disk_bytes"] == size_on_disk(tmp_path / "run" / "model")
    assert report["references"]["pruned"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["references"]["dense"]["disk_bytes"] == size_on_disk(Path(bf16))
    assert main(["test", str(tmp_path / "run"), "--run_dir", str(tmp_path / "tested")]) == 0
    tested = json.loads((tmp_path / "tested" / "report.json").read_text())
    assert tested["perplexity"] == pytest.approx(report["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_save_dtype_wins_and_is_the_unrounded_model(bf16: str, tmp_path: Path) -> None:
    enough = "--data.num_sequences=64"  # for windows that do not keep their start, which is in bf16
    rounded = fitted(bf16, "matrix", tmp_path / "bf16", enough)
    exact = fitted(bf16, "matrix", tmp_path / "fp32", enough, "--model.save_dtype=float32")
    assert {one.dtype for one in exact.values()} == {torch.float32}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in rounded)
    assert any((exact[name] != rounded[name].float()).any() for name in rounded)


def test_prune_writes_the_stored_precision_too(bf16: str, tmp_path: Path) -> None:
    options = ["--model.name", bf16, "--criterion=SparseGPT", "--save_model=true", *DATA]
    assert main(["prune", "--run_dir", str(tmp_path / "p"), *options]) == 0
    assert dtype_of(tmp_path / "p" / "model") == torch.bfloat16
    report = json.loads((tmp_path / "p" / "report.json").read_text())
    assert report["dense_perplexity"] > 1
    assert main(["test", str(tmp_path / "p"), "--run_dir", str(tmp_path / "t")]) == 0
    assert json.loads((tmp_path / "t" / "report.json").read_text())["perplexity"] == report["perplexity"]


@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "auto")])
def test_the_stored_precision_does_not_depend_on_the_one_in_memory(stored: str, asked: Any, tmp_path: Path) -> None:
    ModelSource("random", TIED_LLAMA, dtype=stored).model().save_pretrained(tmp_path / "m")
    assert ModelSource(str(tmp_path / "m"), dtype=asked).stored_dtype() == getattr(torch, stored)
    assert ModelSource("random", TIED_LLAMA, dtype=stored).stored_dtype() == getattr(torch, stored)


def test_most_weights_decide_and_the_configuration_without_safetensors(tmp_path: Path) -> None:
    mixed = {"a": torch.zeros(8, dtype=torch.bfloat16), "b": torch.ones(3)}
    save_file(mixed, tmp_path / "model.safetensors")
    assert dtype_of(tmp_path) == torch.bfloat16
    assert share_of_zeros(stored_weights(tmp_path)) == 8 / 11
    model = ModelSource("random", TIED_LLAMA, dtype="float16").model()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert dtype_of(tmp_path / "bin") is None
    with pytest.raises(ValueError, match=r"needs safetensors files, got .*pytorch_model.bin, a pickle"):
        ModelSource(str(tmp_path / "bin")).stored_dtype()

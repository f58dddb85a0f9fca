"""`recon speed` on real runs: its record and tables, refusals at once, wrong storages, and 2:4 on a device."""

import json
from collections import Counter
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from recon.basics.run_paths import RunPaths
from recon.cli import main
from recon.experiment.speed import SpeedOptions, measure_speed
from recon.experiment.verification import verify
from recon.models.anatomy import Anatomy
from recon.models.matrices import joined
from recon.models.weight_files import directory_digest
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM
from recon.pruning.recorded_pattern import KEY, recorded
from recon.report.speed import Speed
from tests.support.families import tiny
from tests.support.simulated.device import simulated_cuda

QUICK = ["--min_seconds", "0.0001"]
ON_CPU = SpeedOptions((1, 2), None, torch.device("cpu"), 1e-4, 0)


def write_run(path: Path, model: PreTrainedModel, masks: Masks, metadata: dict[str, str]) -> RunPaths:
    """The model and the masks of a run, recorded in its manifest."""
    run = RunPaths(path)
    masks.apply(model)
    masks.save(run.masks, metadata, run.manifest.writing)
    with run.manifest.placing(run.model) as made:
        model.save_pretrained(made)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a 2:4 model, without a measurement of it."""
    model = tiny("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=4)
    prunable = Anatomy.of(model).prunable()
    masks = Masks({name: NM(2, 4).select(one.weight.abs()) for name, one in prunable.items()})
    metadata = {"criterion": "magnitude", "pattern": "2:4", **recorded(NM(2, 4), [])}
    return write_run(tmp_path_factory.mktemp("speed") / "run", model, masks, metadata).path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunPaths:
    return RunPaths(Path(copytree(made, tmp_path / "run")))


def test_it_measures_prints_and_writes(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", str(run.path), "--tokens", "[1, 3]", *QUICK, "--seed_everything", "5"]) == 0
    said = capsys.readouterr().out
    content = json.loads(run.speed.read_text())
    assert content["verdict"] in " ".join(said.split())
    assert "2:4 was not timed: it needs a GPU of compute capability 8.0 or later (here is a CPU) and half prec" in said
    assert (content["tokens"], content["seed"], content["dtype"], content["pattern"]) == ([1, 3], 5, "float32", "2:4")
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert content["environment"]["torch"] == torch.__version__
    assert {"device", "date"} <= content["environment"].keys()
    masks, weights = Masks.load(run.masks), load_file(run.model / "model.safetensors")
    assert content["digests"] == {"masks": masks.fingerprint(), "model": directory_digest(run.model)}
    shapes = {(one["rows"], one["columns"]): one["count"] for one in content["matrices"]}
    assert shapes == {(64, 64): 8, (64, 128): 2, (128, 64): 4}
    for matrix in content["matrices"]:
        assert weights[matrix["name"]].shape == (matrix["rows"], matrix["columns"])
        assert matrix["sparsity"] == 0.5
        dense, csr, packed, half = matrix["stored"]
        assert [one["status"] for one in (dense, csr, packed, half)] == ["timed", "timed", "timed", "needs"]
        assert packed["num_bytes"] == dense["num_bytes"] / 2 + dense["num_bytes"] / 32
        for one in (dense, csr, packed):
            assert [product["tokens"] for product in one["products"]] == [1, 3]
            assert 0 < one["error"] < 1e-6
    found = verify(run.path)
    assert (found.faults, found.notes) == ([], [])
    content["verdict"] = "edited"
    run.speed.write_text(json.dumps(content))
    assert len(verify(run.path).faults) == 1
    assert main(["speed", str(run.path), "--tokens", "1", *QUICK]) == 0  # takes its place
    assert verify(run.path).faults == []


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_is_a_matrix_of_its_own(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    prunable = Anatomy.of(model).prunable()
    halves = {one: NM(2, 4).select(matrix.weight.abs()) for one, matrix in prunable.items()}
    masks = Masks(joined(prunable, halves, lambda whole: torch.ones_like(whole, dtype=torch.bool)))
    run = write_run(tmp_path / "run", model, masks, {"pattern": "2:4", **recorded(NM(2, 4), prunable.values())})
    measured = measure_speed(run, ON_CPU)
    assert {(one.rows, one.columns): one.count for one in measured.matrices} == Counter(
        matrix.shape for matrix in prunable.values()
    )
    assert any(".experts." in one.name for one in measured.matrices)
    for one in measured.matrices:
        assert (one.rows, one.columns) == prunable[one.name].shape
        assert one.sparsity == 0.5
        assert [stored.status for stored in one.stored] == ["timed", "timed", "timed", "needs"]


def test_json_alone_is_printed(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", str(run.path), "--tokens", "1", *QUICK, "--json", "--dtype", "bfloat16"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(run.speed.read_text())
    assert content["dtype"] == "bfloat16"
    assert {one["stored"][1]["reason"][:17] for one in content["matrices"]} == {"float32 on a CPU "}


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["{run}", "--tokens", "[4, 0]"], 2, "--tokens needs whole numbers from 1 on, got [4, 0]"),
        (["{run}", "--tokens", "[]"], 2, "--tokens needs"),
        (["{run}", "--min_seconds", "0"], 2, "--min_seconds needs a positive number"),
        (["{run}", "--seed_everything", "-1"], 2, "--seed_everything must be"),
        (["{run}", "--dtype", "float64"], 2, "--dtype needs float32, bfloat16 or float16, got float64"),
        (["{run}", "--token", "1"], 2, "no option --token; did you mean --tokens?"),
        (["{run}", "--device", "tpu"], 2, "--device needs auto, cpu, cuda or cuda:N"),
        ([], 2, "run_dir"),
        (["{run}/nowhere"], 1, "which does not exist"),
        (["{run}/model"], 1, "which has no model of recon's"),
    ],
)
def test_refusals_come_before_anything_is_read(
    args: list[str], status: int, said: str, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("recon.cli.speed.measure_speed", lambda *_: pytest.fail("measured"))
    before = sorted(made.rglob("*"))
    assert main(["speed", *(one.format(run=made) for one in args)]) == status
    assert said in capsys.readouterr().err
    assert sorted(made.rglob("*")) == before


def test_a_run_that_cannot_be_measured_is_refused(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.model / "model.safetensors"
    weights = load_file(file)
    for name in Masks.load(run.masks):
        weights[name][0] = 1.0
    save_file(weights, file, {"format": "pt"})
    assert main(["speed", str(run.path), *QUICK]) == 1
    assert "has not the sha256" in capsys.readouterr().err
    with run.manifest.placing(run.model) as made:  # as if it had been written so
        copytree(run.model, made)
    assert main(["speed", str(run.path), *QUICK]) == 1
    assert "needs pruned weights that are zero, got 32 of `model.layers" in capsys.readouterr().err
    run.manifest.forget(run.masks)
    assert main(["speed", str(run.path), *QUICK]) == 1
    assert "which has no masks: its model was not pruned" in capsys.readouterr().err
    assert not run.speed.exists()


def test_a_wrong_storage_ends_with_status_1(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = torch.Tensor.to_sparse_csr

    def lose(weight: Tensor) -> Tensor:
        first = weight.nonzero()[0].tolist()
        other = weight.clone()
        other[*first] = 0
        return convert(other)

    monkeypatch.setattr(torch.Tensor, "to_sparse_csr", lose)
    assert main(["speed", str(run.path), "--tokens", "1", *QUICK]) == 1
    said = capsys.readouterr().out
    assert "CSR for 64 x 64 is wrong: 1 of 4096 stored weights differ" in said
    assert "CSR is" not in json.loads(run.speed.read_text())["verdict"]


def test_matrices_stored_in_x_out_are_turned(tmp_path: Path) -> None:
    """GPT-2 keeps them so: by the masks' record, and by the model's code where there is none."""
    model = tiny("gpt2")
    names = [name for name, one in model.named_parameters() if name.endswith(("c_attn.weight", "mlp.c_proj.weight"))]
    generator = torch.Generator().manual_seed(0)
    masks = Masks({name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.4 for name in names})
    found: list[Speed] = []
    rule = {"pattern": "Unstructured", "sparsity": 0.6, "per": "matrix"}
    for metadata in ({KEY: json.dumps(rule | {"transposed": names})}, {}):
        run = write_run(tmp_path, model, masks, metadata)
        with mock.patch.object(Masks, "_require_recorded"):  # the counts are random
            found.append(measure_speed(run, ON_CPU))
    assert [[(one.rows, one.columns, one.count) for one in speed.matrices] for speed in found] == [
        [(32, 128, 3), (96, 32, 3)]
    ] * 2
    assert all(one.of("packed").status == "timed" for speed in found for one in speed.matrices)
    zeros = {name: 1 - float(masks[name].float().mean()) for name in names}
    assert all(one.sparsity == pytest.approx(zeros[one.name]) for speed in found for one in speed.matrices)
    for one in found[0].matrices:  # the median
        alike = sorted(value for name, value in zeros.items() if ("c_attn" in name) == ("c_attn" in one.name))
        assert one.sparsity == pytest.approx(alike[1])


def test_2_4_is_made_and_multiplied_on_the_device(made: Path) -> None:
    """With a stand-in for torch's tensor: matrices in half precision, on the device, in out x in."""
    asked: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def stand_in(weight: Tensor) -> Tensor:
        asked.append((weight.device.type, weight.dtype, tuple(weight.shape)))
        stored = weight.clone()
        stored.__tensor_flatten__ = lambda: (["packed"], None)  # type: ignore[attr-defined]
        stored.packed = weight[:, ::2]  # type: ignore[attr-defined]
        return stored

    options = SpeedOptions((1, 4), "float16", torch.device("cuda", 0), 1e-4, 0)
    with (
        simulated_cuda(),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 6)),
        mock.patch.object(torch.sparse, "to_sparse_semi_structured", stand_in),
    ):
        found = measure_speed(RunPaths(made), options)
    assert asked == [("cuda", torch.float16, shape) for shape in ((64, 64), (64, 128), (128, 64))]
    for one in found.matrices:
        half = one.of("2:4")
        assert (half.status, len(half.products)) == ("timed", 2)
        assert half.num_bytes == one.rows * one.columns
    assert found.environment["capability"] == (8, 6)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA device of compute capability 8.0 or later",
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_2_4_on_a_gpu(dtype: str, run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", str(run.path), "--device", "cuda", "--dtype", dtype, "--min_seconds", "0.05"]) == 0
    assert "2:4 is" in capsys.readouterr().out
    for matrix in json.loads(run.speed.read_text())["matrices"]:
        dense, *_, half = matrix["stored"]
        assert (half["status"], half["reason"], len(half["products"])) == ("timed", "", 4)
        assert half["num_bytes"] < 0.7 * dense["num_bytes"]

"""The precision of a model that names none: float32 on a CPU; on a GPU the stored one, where none is trained in it."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from recon.cli import main, prune
from recon.models.loading import ModelSource
from recon.scopes import BlockDistillation, FullRetraining
from tests.support.scope_fixtures import IGNORED
from tests.support.simulated.device import simulated_cuda
from tests.support.simulated.tags import CPU, CUDA

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

RANDOM = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}
SMALL = {"num_sequences": 2, "seq_len": 8, "num_validation": 1, "num_test": 1, "batch_size": 2}
DATA = [f"--data.{name}={value}" for name, value in SMALL.items()]


@pytest.mark.parametrize(
    ("given", "device", "dtype"),
    [
        (None, CPU, torch.float32),
        (None, CUDA, torch.bfloat16),
        ("float32", CUDA, torch.float32),
        ("auto", CPU, torch.bfloat16),
    ],
)
def test_the_bundled_model_which_is_stored_in_bf16(given: str | None, device: torch.device, dtype: torch.dtype) -> None:
    source = ModelSource(dtype=given).on(device)
    assert source.model().dtype == source.skeleton().dtype == dtype
    assert source.at(Path("elsewhere")).dtype == source.dtype


def test_a_random_model_is_made_in_fp32_on_any_device() -> None:
    for device in (CPU, CUDA):
        assert ModelSource("random", RANDOM).on(device).model().dtype == torch.float32


def test_an_open_precision_is_that_of_float32_in_the_identity() -> None:
    assert ModelSource().on(CPU).identity() == ModelSource(dtype="float32").identity()
    assert ModelSource().on(CUDA).identity() == ModelSource(dtype="auto").identity()


def test_only_local_scopes_which_widen_their_windows_take_the_stored_one() -> None:
    for scope, dtype in ((BlockDistillation(), torch.bfloat16), (FullRetraining(), torch.float32)):
        scope.settle(CUDA)
        assert scope.source.skeleton().dtype == dtype
    scope = BlockDistillation(dtype="float16")
    scope.settle(CUDA)
    assert scope.source.dtype == "float16"


def test_a_fit_settles_it_by_the_device_of_its_trainer(tmp_path: Path) -> None:
    with mock.patch.object(BlockDistillation, "settle", side_effect=ValueError("settled")) as settle:
        assert main(["fit", "-c", "scopes/block", "--run_dir", str(tmp_path / "run"), "--trainer.accelerator=cpu"]) == 1
    settle.assert_called_once_with(CPU)


def test_pruning_on_a_device_loads_the_stored_one(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    measure = prune.measure_pruned

    def watched(source: ModelSource, *args: Any) -> Any:
        seen.append(source.skeleton().dtype)
        return measure(source, *args)

    with (
        mock.patch.object(prune, "choose_device", return_value=CUDA),
        mock.patch.object(prune, "measure_pruned", watched),
        simulated_cuda(),
    ):
        assert main(["prune", "--run_dir", str(tmp_path / "run"), "--summary=false", "--drift=false", *DATA]) == 0
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(("accelerator", "block"), [("gpu", "bfloat16"), ("cpu", None)])
def test_a_plan_is_in_the_precision_of_the_run(accelerator: str, block: Any, capsys: Any) -> None:
    options = ["--trainer.devices=1", f"--trainer.accelerator={accelerator}", "--scopes", "[block, full]"]
    assert main(["plan", "-c", "scopes/block", *options, "--json", "true"]) == 0
    rows = json.loads(capsys.readouterr().out)["scopes"]
    assert [row["setting"]["dtype"] for row in rows] == [block, None]

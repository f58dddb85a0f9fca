"""What a run asks of a device, counted on the simulated one: waits of the host, transfers, unpacked masks."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from recon.calibration.activations import Activations
from recon.distributed import ranks
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.models.replay import Replay
from recon.models.windows import Window
from recon.pruning.bits import unpack
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from recon.scopes.local import module
from recon.solvers import GradientDescent
from tests.support.families import DIM
from tests.support.scope_fixtures import IGNORED, data_of, save_tiny
from tests.support.simulated.counts import Counts
from tests.support.simulated.device import simulated_cuda
from tests.support.simulated.runs import WANDA, run, trainer_on
from tests.support.simulated.tags import CUDA
from tests.support.slow import slow

pytestmark = [pytest.mark.filterwarnings("error"), *(pytest.mark.filterwarnings(one) for one in IGNORED)]


class Steps(Callback):
    """What each step asks of the device, from the begin of one batch to that of the next in the same epoch.

    Args:
        counts: Those of the run.
    """

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.steady: list[Counts] = []
        self._began: tuple[int, Counts] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._began is not None and 0 < self._began[0] == batch_idx - 1:
            self.steady.append(self.counts.since(self._began[1]))
        self._began = batch_idx, self.counts.copy()


def steps_of(scope: Scope, path: Path, **trainer: Any) -> list[Counts]:
    """The steps of a run, without the first of each window, which unpacks masks and makes the optimizer's state."""
    with simulated_cuda() as counts:
        steps = Steps(counts)
        options = replace(WANDA, baselines=False, drift=False)
        run(scope, path / "run", CUDA, options, steps, data=data_of(num=24), **trainer)
    return steps.steady


PLACES: dict[str, dict[str, Any]] = {
    "on the device": {"activations": "device"},
    "on the host": {"activations": "host", "offload": "host"},
    "on disk": {"activations": "disk", "offload": "disk"},
}


@pytest.mark.parametrize("place", PLACES)
def test_no_step_of_a_window_waits_for_the_device(place: str, tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path, num_hidden_layers=1)
    scope = SubmoduleDistillation(name=name, epochs=1, batch_size=4, start="pruned", **PLACES[place])
    steps = steps_of(scope, tmp_path, log_every_n_steps=1000)
    batch = 0 if place == "on the device" else 2 * 4 * 16 * DIM * 4
    assert len(steps) == 2 * 4
    for step in steps:
        assert not step.waits
        assert set(step.bytes) <= {("to device", "recon/calibration/activations.py _upload")}
        assert step.total("to device") in (0, batch, 3 * batch // 2)  # MLP windows take attention's output, too


def test_a_step_of_the_matrix_scope_and_of_adapters_waits_for_nothing(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path, num_hidden_layers=1)
    scopes = [
        MatrixReconstruction(name=name, batch_size=4, solver=GradientDescent(steps=6), activations="device"),
        BlockDistillation(name=name, epochs=1, batch_size=4, parameters="lora", start="pruned", activations="device"),
    ]
    for number, scope in enumerate(scopes):
        for step in steps_of(scope, tmp_path / str(number), log_every_n_steps=1000):
            assert not step.waits
            assert not step.bytes


def test_a_loss_is_waited_for_only_when_it_is_logged(tmp_path: Path) -> None:
    """Lightning asks for the value of a progress bar's metric after every batch, from its first log on."""
    name = save_tiny("llama", tmp_path, num_hidden_layers=1)
    scope = BlockDistillation(name=name, epochs=1, batch_size=4, start="pruned", lr=1e-3)
    steps = steps_of(scope, tmp_path, log_every_n_steps=2)
    assert [dict(step.waits) for step in steps] == [
        {("recon/scopes/step_losses.py finite", "transfer to host"): 1},
        {},
        {("recon/scopes/step_losses.py finite", "transfer to host"): 1},
        {},
    ]


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_a_step_of_full_retraining_waits_for_its_batch_and_for_transformers(loss: Any, tmp_path: Path) -> None:
    """transformers looks for packed sequences in the positions of each forward pass."""
    name = save_tiny("llama", tmp_path, num_hidden_layers=1)
    for step in steps_of(FullRetraining(name=name, epochs=1, loss=loss), tmp_path, log_every_n_steps=1000):
        num_passes = 1 if loss == "cross_entropy" else 2
        assert dict(step.waits) == {
            ("recon/experiment/training.py train", "transfer to device"): 1,
            ("recon/scopes/model_loss.py model_loss", "aten::_local_scalar_dense"): num_passes,
        }
        assert dict(step.bytes) == {("to device", "recon/experiment/training.py train"): 4 * 16 * 8}


class Passes:
    """Traffic of a model's blocks, in copies of their weights."""

    def __init__(self, name: str, counts: Counts) -> None:
        blocks = Anatomy.of(ModelSource(name).model()).blocks
        self.counts, self.bytes = counts, sum(p.nbytes for one in blocks for p in one.parameters().values())

    def to_device(self) -> float:
        """Copies of the blocks that went to the device."""
        return self.counts.total("to device", "offload/blocks.py _copied") / self.bytes

    def to_host(self) -> float:
        """Copies that came back, through pinned memory."""
        return self.counts.total("to host", "offload/transfers.py") / self.bytes


@pytest.mark.parametrize(("make", "num_more"), [slow(BlockDistillation, 0), (SubmoduleDistillation, 1)])
def test_an_offloaded_recovery_moves_a_model_once_a_pass(make: Any, num_more: int, tmp_path: Path) -> None:
    """Each block goes to the device once a pass; its two starts, its result and what changed come back once each.

    Passes: the model's moves are tried (two, and block 0 once more to learn its form), pruning, the fit, the
    evaluation; of submodules one more, which finds the parameters that their outputs depend on.
    """
    name = save_tiny("llama", tmp_path, num_hidden_layers=4)
    options = replace(WANDA, baselines=False, drift=False)
    with simulated_cuda() as counts:
        run(make(name=name, epochs=3, batch_size=4, lr=1e-3, offload="host"), tmp_path / "run", CUDA, options)
    moved = Passes(name, counts)
    assert moved.to_device() <= 2 + 1 / 4 + 3 + num_more + 0.6  # and embeddings and head, to evaluate
    assert moved.to_host() <= 4
    waits = sum(number for (place, _), number in counts.waits.items() if "offload/blocks.py _copied" in place)
    assert waits == 5  # embeddings, head, last norm and two sets of frequencies, when it is evaluated


def test_a_mask_is_unpacked_at_most_four_times_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, unpacked = save_tiny("llama", tmp_path, num_hidden_layers=2), []

    def counting(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not any("beartype" in frame.filename for frame in traceback.extract_stack()):  # looks at values of mappings
            unpacked.append(packed.device.type)
        return unpack(packed, shape)

    for place in ("recon.pruning.masks", "recon.scopes.enforcement", "recon.scopes.lora"):
        monkeypatch.setattr(f"{place}.unpack", counting)
    with simulated_cuda() as counts:
        run(SubmoduleDistillation(name=name, epochs=4, batch_size=4, lr=1e-3), tmp_path / "run", CUDA, WANDA)
    assert len(unpacked) == 4 * 2 * 7  # of the baseline, the two starts to choose from, and the window
    assert set(unpacked) == {"cuda"}
    num_bytes = sum(p.numel() // 8 for n, p in ModelSource(name).model().named_parameters() if "proj" in n)
    assert counts.total("to device", "masks.py on") <= 4 * num_bytes
    assert counts.total("to host", "masks.py pack") <= 6 * num_bytes  # chosen, and checked five times


def test_the_held_out_error_is_computed_in_the_trainers_precision(tmp_path: Path) -> None:
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    window_error = module.held_out_error

    def watched(replay: Replay, window: Window, held_out: Activations) -> float:
        seen[torch.is_autocast_enabled("cpu")].add(torch.get_autocast_dtype("cpu"))
        return window_error(replay, window, held_out)

    name = save_tiny("llama", tmp_path, num_hidden_layers=1)
    options = replace(WANDA, baselines=False, drift=False)
    scope = BlockDistillation(name=name, epochs=1, batch_size=4, lr=1e-3, start="pruned")
    with mock.patch.object(module, "held_out_error", watched), simulated_cuda() as counts:
        run(scope, tmp_path / "run", CUDA, options, precision="bf16-mixed")
    assert seen == {True: {torch.bfloat16}, False: set()}
    waits = [cause for cause in counts.waits if "window_error.py" in cause[0]]
    assert waits == [("recon/scopes/local/window_error.py held_out_error", "transfer to host")]
    assert counts.waits[waits[0]] == 2  # before and after: once for all batches


def test_the_device_of_a_run_is_current_before_its_fit() -> None:
    trainer = trainer_on(CUDA)
    accelerator = trainer.strategy.accelerator
    with mock.patch.object(accelerator, "setup_device") as setup:
        ranks.start(trainer, L.LightningModule())
    setup.assert_called_once_with(CUDA)


@pytest.mark.parametrize("make", [BlockDistillation, SubmoduleDistillation])
def test_a_fit_ends_without_moving_the_model_to_the_host(make: Any, tmp_path: Path) -> None:
    """It is written from the device; Lightning would move it first."""
    name = save_tiny("llama", tmp_path, num_hidden_layers=2)
    with simulated_cuda() as counts:
        run(make(name=name, epochs=1, batch_size=4), tmp_path / "run", CUDA, WANDA)
    size = sum(one.nbytes for one in ModelSource(name).model().parameters())
    assert size <= counts.total("to host", "experiment/writing.py") <= 1.01 * size
    assert counts.total("to host", "experiment/training.py") < 0.01 * size

"""The parts of a local scope that need no trainer: batches, window files, and changes to the model for a while."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recon.models.anatomy import Block
from recon.models.matrices import Matrix
from recon.models.windows import BlockWindow, GroupWindow, Window
from recon.scopes.local.batches import WindowBatches
from recon.scopes.local.window_files import WindowFiles
from recon.scopes.local.window_state import Upcast, WithheldWeights, freeze


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)


def block_of(model: nn.Sequential) -> Block:
    return Block(0, "0", model[0], {"0": Matrix.of_module("0", model[0])})


def windows_of(model: nn.Sequential) -> tuple[Window, Window]:
    """The same parameters as a block and as a group of matrices."""
    block, owned = block_of(model), ["0.weight", "0.bias"]
    return BlockWindow("000", [block], owned, []), GroupWindow("000.0", [block], owned, [], ["0"], ["0"])


# --- batches ---------------------------------------------------------------------------------------------


def rows_of(batches: WindowBatches) -> list[list[int]]:
    return [batch["rows"].tolist() for batch in batches]


def test_every_sequence_comes_once_an_epoch_in_an_order_that_its_seed_gives() -> None:
    seeds = iter((1, 2, 1))
    batches = WindowBatches(10, 4, lambda: next(seeds), lambda order: ({"rows": one} for one in order.split(4)))
    epochs = [rows_of(batches) for _ in range(3)]
    assert all([len(batch) for batch in one] == [4, 4, 2] for one in epochs)
    assert all(sorted([row for batch in one for row in batch]) == list(range(10)) for one in epochs)
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(batches) == 3


@pytest.mark.parametrize(("num", "batch_size", "length"), [(8, 4, 2), (9, 4, 3), (1, 4, 1)])
def test_the_number_of_batches_counts_a_smaller_last_one(num: int, batch_size: int, length: int) -> None:
    batches = WindowBatches(num, batch_size, lambda: 0, lambda order: ({"rows": one} for one in order.split(4)))
    assert len(batches) == len(rows_of(batches)) == length


# --- weights that are withheld ---------------------------------------------------------------------------


def recover(model: nn.Module, window: Window) -> dict[str, Tensor]:
    with torch.no_grad():
        for name in window.owned:
            model.get_parameter(name).add_(1)
    return {name: model.get_parameter(name).detach().clone() for name in window.owned}


def test_a_block_that_must_stay_dense_gets_its_weights_at_the_end() -> None:
    model = model_of()
    _, window = windows_of(model)
    dense = {name: model.get_parameter(name).detach().clone() for name in window.owned}
    withheld = WithheldWeights(model)
    withheld.keep_dense(window)
    recovered = recover(model, window)
    withheld.withhold(window)
    assert all(torch.equal(model.get_parameter(name), dense[name]) for name in window.owned)
    assert [name in withheld for name in ("0.weight", "0.bias", "1.weight")] == [True, True, False]
    withheld.hand_over()
    assert all(torch.equal(model.get_parameter(name), recovered[name]) for name in window.owned)
    assert "0.weight" not in withheld


def test_other_windows_pass_through() -> None:
    model = model_of()
    window, _ = windows_of(model)
    withheld = WithheldWeights(model)
    withheld.keep_dense(window)
    recovered = recover(model, window)
    withheld.withhold(window)
    assert "0.weight" not in withheld
    withheld.hand_over()
    assert all(torch.equal(model.get_parameter(name), recovered[name]) for name in window.owned)


# --- precision and gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_block_is_trained_in_fp32_at_least_and_rounded_back(dtype: torch.dtype) -> None:
    model, upcast = model_of(dtype), Upcast()
    weight, before = model[0].weight, model[0].weight.detach().clone()
    upcast.upcast([block_of(model)])
    assert model[0].weight is weight
    assert weight.dtype == torch.promote_types(dtype, torch.float32)
    assert model[1].weight.dtype == dtype
    upcast.restore()
    assert weight.dtype == dtype
    assert torch.equal(weight, before)


def test_frozen_parameters_keep_neither_gradient_nor_state() -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    freeze(optimizer)
    assert not any(one.requires_grad or one.grad is not None for one in model.parameters())
    assert len(optimizer.state) == 0


# --- files -----------------------------------------------------------------------------------------------


def test_a_written_window_is_loaded_with_its_results(tmp_path: Path) -> None:
    model, files = model_of(), WindowFiles(tmp_path)
    window, group = windows_of(model)
    assert window not in files
    files.write(window, model, {"before": 0.2, "after": 0.1, "tokens": 8, "seconds": 0.5})
    assert window in files
    assert group not in files
    written = {name: model.get_parameter(name).detach().clone() for name in window.owned}
    recover(model, window)
    assert files.load(window, model) == {"before": 0.2, "after": 0.1, "tokens": 8, "seconds": 0.5}
    assert all(torch.equal(model.get_parameter(name), written[name]) for name in window.owned)


def test_without_a_directory_nothing_is_written_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, files = model_of(), WindowFiles()
    window, _ = windows_of(model)
    files.write(window, model, {})
    assert window not in files
    assert not list(tmp_path.iterdir())


def test_weights_on_disk_are_read_from_the_windows_file_from_now_on(tmp_path: Path) -> None:
    class Redirected:
        def __init__(self) -> None:
            self.calls: list[tuple[list[str], Path]] = []

        def redirect(self, names: list[str], path: Path) -> None:
            self.calls.append((names, path))

    model, redirected = model_of(), Redirected()
    window, _ = windows_of(model)
    files = WindowFiles(tmp_path)
    object.__setattr__(files, "disk_weights", redirected)
    files.write(window, model, {"before": 0.2, "after": 0.1, "tokens": 8, "seconds": 0.5})
    files.load(window, model)
    assert redirected.calls == [(window.owned, files.path(window))] * 2

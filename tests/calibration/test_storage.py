"""Hidden states on the device, on the host or on disk: the same bits, and nothing left behind."""

import errno
import gc
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import MaskEnforcer
from recon.basics.mapped import mapped
from recon.calibration.activations import Activations
from recon.calibration.storage import Budget, Storage
from recon.cli.fit import ParsingCLI, _cli
from recon.models.anatomy import Anatomy
from recon.models.replay import Replay
from recon.models.windows import Windows
from recon.scopes import BlockDistillation, MatrixReconstruction, SubmoduleDistillation
from tests.support.families import DEPTH, tiny, token_ids
from tests.support.scope_fixtures import (
    IGNORED,
    data_of,
    random_masks,
    same,
    save_tiny,
    trainer_of,
    untimed,
    weights_of,
)
from tests.support.scope_runs import Kill, Killed
from tests.support.slow import quick

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

CPU = torch.device("cpu")
MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and a file system that reserves room")


def room(storage: Storage, numel: int = MIB) -> torch.Tensor:
    return storage.empty((4, numel // 4), torch.bfloat16, CPU)


def is_mapped(directory: Path) -> bool:
    """Whether a file in it, with or without a name, is mapped into this process, as far as the system tells."""
    maps = Path("/proc/self/maps")
    return maps.exists() and f"{directory}/" in maps.read_text()


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_without_a_name_holds_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    storage = Storage("disk", directory=tmp_path)
    values = torch.randn(6, 5, 4).to(dtype)
    tensors = [storage.empty(values.shape, dtype, CPU) for _ in range(2)]
    for factor, tensor in enumerate(tensors, start=1):
        tensor[1:] = factor * values[1:]
        tensor[0] = factor * values[0]
    for factor, tensor in enumerate(tensors, start=1):
        assert torch.equal(tensor, factor * values)
    assert list(tmp_path.iterdir()) == []  # nothing to be taken for something whole, whoever is killed


@on_linux
def test_the_file_goes_with_the_tensor(tmp_path: Path) -> None:
    tensor = room(Storage("disk", directory=tmp_path))
    view = tensor[1:]
    assert is_mapped(tmp_path)
    del tensor
    view.zero_()
    assert is_mapped(tmp_path)
    del view
    gc.collect()
    assert not is_mapped(tmp_path)


def test_a_full_disk_says_what_is_needed_and_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"disk needs 2.0 MiB for one copy .* got .*iB free in .*choose .*host") as raised:
        room(Storage("disk", directory=tmp_path))
    assert raised.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@on_linux
def test_room_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        first = mapped(file, (3, 5), torch.float64)
        second = mapped(file, (MIB,), torch.float32)
        status = os.fstat(file.fileno())
    assert status.st_blocks * 512 >= second.nbytes
    assert (first.shape, second.shape) == ((3, 5), (MIB,))


# --- a budget -----------------------------------------------------------------------------------------


def test_each_copy_goes_where_there_is_room(tmp_path: Path) -> None:
    storage = Storage("auto", budget=Budget(5 * MIB, 2 * MIB), directory=tmp_path)
    assert storage.budget is not None
    copies = [room(storage) for _ in range(4)]  # of 2 MiB each
    assert storage.budget.left["device"] == MIB
    assert storage.budget.left["host"] == 0
    assert storage.budget.left["disk"] == float("inf")
    small = room(storage, MIB // 2)  # of 1 MiB, which fits
    assert storage.budget.left["device"] == 0
    del copies[0], small
    assert storage.budget.left["device"] == 3 * MIB
    unlimited = Storage("auto", budget=Budget(1))
    assert room(unlimited).device == CPU
    assert unlimited.budget is not None
    assert unlimited.budget.left == {"device": 1, "host": float("inf"), "disk": float("inf")}


def test_options_that_do_not_go_together_are_refused() -> None:
    for options, message in (
        ({"activations": "host", "activations_budget": "1GiB"}, "are for model.activations: auto, got .*: host"),
        (
            {"activations": "device", "activations_host_budget": "1GiB"},
            "are for model.activations: auto, got .*: device",
        ),
        ({"activations": "auto", "activations_budget": "4"}, "model.activations_budget: an amount .* got '4'"),
        (
            {"activations": "auto", "activations_budget": "4MiB", "activations_host_budget": "many"},
            "model.activations_host_budget: an amount .* got 'many'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            BlockDistillation(**options)


def test_by_default_copies_are_off_the_device_and_on_disk_where_the_host_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = replace(BlockDistillation().storage, directory=tmp_path)
    assert not storage.may_be_on_device
    monkeypatch.setattr("recon.calibration.storage.available_bytes", lambda: 4.0 * MIB)
    copy = room(storage)  # of 2 MiB: half of it
    assert storage.is_on_host(copy)
    assert not is_mapped(tmp_path)
    assert not caplog.records
    larger = room(storage, MIB + 4)
    assert storage.is_on_host(larger)
    assert is_mapped(tmp_path)
    assert "goes to disk: it would take more than half of the 4.0 MiB that the host has" in caplog.text
    given = BlockDistillation(activations="auto", activations_host_budget="1GiB").storage
    kept = room(given, 4 * MIB)  # what is available does not matter
    assert given.is_on_host(kept)
    assert given.budget is not None
    assert given.budget.left["host"] == 2**30 - 8 * MIB


def test_submodules_say_what_hidden_states_on_the_device_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = save_tiny("llama", tmp_path)
    with caplog.at_level("INFO", logger="recon"):
        fitted(SubmoduleDistillation(**SHORT, name=name), tmp_path / "host")
        assert "may take the device" not in caplog.text
        fitted(SubmoduleDistillation(**SHORT, name=name, activations="device"), tmp_path / "device")
    assert "3 copies of 20.0 KiB, one more than windows of whole blocks need; model.activations: host" in caplog.text


# --- walks and fits -----------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"epochs": 1, "lr": 3e-3, "batch_size": 4}
GROUPS = Windows([["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"], ["*.mlp.*"]])
KINDS = {
    ("matrix", "recovered"): lambda **o: MatrixReconstruction(batch_size=4, propagation="recovered", **o),
    ("submodule", "recovered"): lambda **o: SubmoduleDistillation(propagation="recovered", **SHORT, **o),
    ("groups", "dense"): lambda **o: SubmoduleDistillation(windows=GROUPS, **SHORT, **o),
    ("overlapping", "dense"): lambda **o: BlockDistillation(num_blocks=2, stride=1, **SHORT, **o),
}
COPY = 10 * 16 * 32 * 4
"""Bytes of one copy of the calibration sequences."""
PLACES: list[dict[str, Any]] = [
    {"activations": "disk"},
    {"activations": "auto", "activations_budget": f"{COPY}B", "activations_host_budget": f"{COPY}B"},  # of each some
]


def fitted(scope: Any, directory: Path, *callbacks: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    directory.mkdir(exist_ok=True)
    data = data_of()
    scope.load(data)
    scope.prepare(data, random_masks(scope.model), directory)
    trainer_of(MaskEnforcer(), *callbacks).fit(scope)
    return untimed(scope.results), weights_of(scope.model)


@pytest.mark.parametrize(("kind", "propagation"), quick(KINDS, ("submodule", "recovered"), ("overlapping", "dense")))
def test_where_hidden_states_are_kept_does_not_change_a_bit(kind: str, propagation: str, tmp_path: Path) -> None:
    name, scope_of = save_tiny("llama", tmp_path), KINDS[kind, propagation]
    expected, weights = fitted(scope_of(name=name), tmp_path / "run")
    for number, place in enumerate(PLACES):
        scope = scope_of(name=name, **place)
        results, found = fitted(scope, tmp_path / str(number))
        assert results == expected
        assert same(found, weights)
        gc.collect()
        assert not is_mapped(tmp_path / str(number))
        if scope.storage.budget is not None:  # everything was given back
            assert scope.storage.budget.left["device"] == scope.storage.budget.left["host"] == COPY


def test_a_walk_keeps_what_it_is_told_to_keep_there(tmp_path: Path) -> None:
    model = tiny("llama")
    tokens = token_ids(5, 12)
    size = 5 * 12 * 32 * 4
    storage = Storage("auto", budget=Budget(size, size), directory=tmp_path)
    walk = Activations(Replay(model, Anatomy.of(model)), tokens, 2, CPU, "recovered", tap=True, storage=storage)
    assert storage.budget is not None
    for index in range(DEPTH):
        walk.enter([index])
        assert storage.budget.left["device"] == storage.budget.left["host"] == 0  # and one copy is on disk


def test_a_run_whose_disk_was_full_goes_on_elsewhere(tmp_path: Path) -> None:
    name = save_tiny("llama", tmp_path)
    expected, weights = fitted(BlockDistillation(**SHORT, name=name), tmp_path / "whole")
    with pytest.raises(Killed):
        fitted(BlockDistillation(**SHORT, name=name, activations="disk"), tmp_path / "run", Kill("001", 1))
    held = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert held == {"windows", "manifest.json"}
    results, found = fitted(BlockDistillation(**SHORT, name=name, activations="host"), tmp_path / "run")
    assert results == expected
    assert same(found, weights)


def test_the_place_is_not_part_of_what_identifies_a_run(tmp_path: Path) -> None:
    args = ["-c", "scopes/submodule", "--run_dir", str(tmp_path), "--trainer.accelerator=cpu", "--model.activations"]
    prints = [
        _cli([*args, *place], ParsingCLI).fingerprint["options"]
        for place in (["disk"], ["auto", "--model.activations_budget", "4GiB"], ["host"])
    ]
    assert prints[0] == prints[1] == prints[2]
    rounded = _cli([*args, "disk", "--model.activations_dtype", "bfloat16"], ParsingCLI).fingerprint["options"]
    assert rounded != prints[0]


@on_linux
def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch; from pathlib import Path; from recon.calibration.storage import Storage\n"
        "kept = Storage('disk', directory=Path(sys.argv[1])).empty((64,), torch.float32, torch.device('cpu'))\n"
        "kept.zero_(); print('kept', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "kept\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []

"""Checkpoints that were made to run code are refused, before any of it runs."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from recon.distributed.unpickling import unpickling_metadata_only
from recon.experiment.consolidation import consolidate

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What FSDP2 writes: weights, an optimizer's state, and numbers that are no tensors."""
    state = {
        "state_dict": {"model.a": torch.arange(6, dtype=torch.bfloat16).view(2, 3)},
        "optimizer_0": {
            "state": {"a": {"step": torch.tensor(1.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        },
    }
    path = tmp_path / "step-000001.ckpt"
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def test_a_checkpoint_of_torch_is_read(checkpoint: Path) -> None:
    assert torch.equal(consolidate(checkpoint)["a"], torch.arange(6, dtype=torch.bfloat16).view(2, 3))
    state = {"optimizer_0": {"param_groups": [{"lr": 0.0, "betas": None}]}}
    with unpickling_metadata_only():
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert state["optimizer_0"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.95)}]


def test_metadata_that_would_run_code_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    metadata.planner_data = Payload(tmp_path / "ran")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"classes of torch's metadata only, got posix\.mkdir"):
        consolidate(checkpoint)
    assert not (tmp_path / "ran").exists()
    FileSystemReader(checkpoint).read_metadata()  # the payload is real: without the guard it runs
    assert (tmp_path / "ran").exists()


def test_an_entry_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.ckpt"
    dcp.save({"note": "x"}, storage_writer=FileSystemWriter(path), no_dist=True)
    evil = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), evil)
    (file,) = path.glob("*.distcp")
    file.write_bytes(evil.getvalue())
    metadata = FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(evil.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"cannot be read \(Weights only load failed"), unpickling_metadata_only():
        dcp.load({"note": ""}, checkpoint_id=path, no_dist=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_metadata_are_named(checkpoint: Path, damage: bytes | None) -> None:
    file = checkpoint / ".metadata"
    file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    with pytest.raises(ValueError, match=r"needs metadata that torch wrote, got .*\.metadata"):
        consolidate(checkpoint)

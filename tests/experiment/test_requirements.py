"""What can be known before the first expensive step is refused before it: full disks, unfit models."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from recon.distributed.part import Share
from recon.experiment.baselines import measure_pruned
from recon.experiment.checkpoints import Checkpoints
from recon.experiment.directory import RunDirectory
from recon.experiment.job import Job
from recon.experiment.options import RunOptions
from recon.experiment.requirements import require_interleavable, require_room, require_suitable
from recon.models.loading import ModelSource
from recon.models.windows import Windows
from recon.pruning.criteria import Magnitude, SparseGPT
from recon.pruning.masks import Masks
from recon.pruning.patterns import NM, Pattern, Unstructured
from recon.pruning.prune import Pruning
from recon.scopes import BlockDistillation, FullRetraining, MatrixReconstruction, Scope, SubmoduleDistillation
from tests.support.families import tiny
from tests.support.scope_fixtures import IGNORED, QUIET, data_of, save_tiny

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

MIB = 2**20


def job_of(scope: Scope, path: Path, callbacks: tuple[Any, ...] = (), **options: Any) -> Job:
    """A job whose model is loaded."""
    scope.model = tiny("llama")
    trainer = L.Trainer(**QUIET)
    trainer.callbacks.extend(callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    return Job(scope, data_of(), trainer, RunDirectory(path, None), RunOptions(**options))


def free(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=amount))


LOCAL = {"disk": {"model": 60 * MIB, "masks": 10 * MIB, "windows": 30 * MIB}}
FULL = {"disk": {"model": 50 * MIB, "checkpoints": 100 * MIB}, "steps": 12}


@pytest.mark.parametrize(
    ("prediction", "options", "every", "needed"),
    [
        (LOCAL, {}, None, 100 * MIB),
        (LOCAL, {"part": Share(0, 3)}, None, 20 * MIB),
        (FULL, {}, 100, 50 * MIB),  # after 12 steps none is written
        (FULL, {}, 10, 100 * MIB),
        (FULL, {}, 5, 150 * MIB),
    ],
)
def test_a_disk_with_clearly_too_little_room_is_refused(
    prediction: Mapping[str, Any],
    options: dict[str, Any],
    every: int | None,
    needed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "not" / "made"
    callbacks = () if every is None else (Checkpoints(path, every),)
    job = job_of(FullRetraining(), path, callbacks, prediction=prediction, **options)
    free(monkeypatch, round(0.91 * needed))
    require_room(job)
    free(monkeypatch, round(0.89 * needed))
    with pytest.raises(
        ValueError, match=r"a run needs room .* MiB more \(.*\), got .* MiB free in .*; free space"
    ) as no:
        require_room(job)
    assert f"predicted {needed // MIB}" in str(no.value)
    assert str(tmp_path) in str(no.value)


def test_what_is_written_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(FullRetraining(), tmp_path, prediction={"disk": {"model": 2 * MIB}})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(2 * MIB))
    free(monkeypatch, 0)
    require_room(job)


@pytest.mark.parametrize("prediction", [{}, {"reason": "no FLOPs"}])
def test_without_a_prediction_no_disk_is_refused(
    prediction: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 0)
    require_room(job_of(FullRetraining(), tmp_path, prediction=prediction))


def test_pruning_needs_room_for_masks_moved_weights_and_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_tiny("llama", tmp_path / "model")
    weights = sum(one.numel() for n, one in tiny("llama").named_parameters() if "proj" in n)
    disk = weights // 8 + 4 * weights + 4 * sum(one.numel() for one in tiny("llama").parameters())
    options = RunOptions(SparseGPT(), NM(2, 4), baselines=False, drift=False)

    def prune(place: str) -> None:
        run = RunDirectory(tmp_path / place, {})
        measure_pruned(ModelSource(name), data_of(), run, options, torch.device("cpu"), keep_model=True)

    free(monkeypatch, round(0.89 * disk))
    with pytest.raises(ValueError, match=r"room .* \(masks .*, moved weights .*, model .*\), got .* free in"):
        prune("full")
    assert not (tmp_path / "full" / "masks.safetensors").exists()
    free(monkeypatch, disk)
    prune("free")


ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]


@pytest.mark.parametrize(
    ("scope", "pattern", "exclude", "said"),
    [
        (lambda: BlockDistillation(num_blocks=4), NM(2, 4), [], "model.num_blocks must be at most 3, .* got 4; give"),
        (
            lambda: BlockDistillation(num_blocks=2, stride=1, propagation="recovered_local"),
            NM(2, 4),
            [],
            "overlapping windows .* model.stride: null",
        ),
        (lambda: MatrixReconstruction(), NM(3, 7), [], "3:7 needs in_features divisible by 7, got 32 for .*; exclude"),
        (lambda: FullRetraining(), NM(2, 64), ["*.[qkvo]_proj"], "needs in_features divisible by 64, got 32 for"),
        (lambda: FullRetraining(), Unstructured(0.99), [], "keep a weight of each row, got none of 32 for .*; lower"),
        (lambda: FullRetraining(), NM(2, 4), ["*"], "must be left to prune"),
        (lambda: FullRetraining(), NM(2, 4), ["*.nope"], r"pruning.exclude .* '\*.nope' matches none"),
        (lambda: SubmoduleDistillation(windows=Windows([["*.nope"]])), NM(2, 4), [], r"'\*.nope' matches none"),
        (
            lambda: SubmoduleDistillation(windows=Windows([ATTENTION, ["*.q_proj"]])),
            NM(2, 4),
            [],
            "belong to only one group",
        ),
        (lambda: SubmoduleDistillation(windows=Windows([ATTENTION])), NM(2, 4), [], "got 9 that belong to none"),
    ],
)
def test_what_a_model_cannot_take_is_refused_before_it_is_pruned(
    scope: Any, pattern: Pattern, exclude: list[str], said: str, tmp_path: Path
) -> None:
    job = job_of(scope(), tmp_path, criterion=Magnitude(), pattern=pattern, pruning=Pruning(exclude=exclude))
    with pytest.raises(ValueError, match=said):
        require_suitable(job)


def test_what_a_model_can_take_passes(tmp_path: Path) -> None:
    scope = SubmoduleDistillation(windows=Windows([ATTENTION]))
    pruning = Pruning(exclude=["*.mlp.*"])
    require_suitable(job_of(scope, tmp_path, criterion=Magnitude(), pattern=Unstructured(0.9), pruning=pruning))
    masks = Masks({})  # given ones are checked when they are read
    require_suitable(job_of(FullRetraining(), tmp_path, criterion=Magnitude(), pattern=NM(3, 7), masks=masks))


def test_masks_along_with_recovery_need_recovered_inputs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"criterion": Magnitude(), "pattern": NM(2, 4), "pruning": Pruning(inputs="recovered")}
    require_interleavable(job_of(BlockDistillation(propagation="recovered"), tmp_path, **options))
    with pytest.raises(ValueError, match=r"got model.propagation: dense, .* choose model.propagation: recovered"):
        require_interleavable(job_of(BlockDistillation(), tmp_path, **options))
    with pytest.raises(ValueError, match="needs a local scope"):
        require_interleavable(job_of(FullRetraining(), tmp_path, **options))


def test_a_model_in_parts_writes_no_text(tmp_path: Path) -> None:
    whole, parts = (job_of(FullRetraining(partitioned=partitioned), tmp_path) for partitioned in (False, True))
    assert whole.open_dense().model is whole.scope.model
    with pytest.raises(
        ValueError, match=r"needs the whole model to write text, got model\.partitioned.*run `recon prune`"
    ):
        parts.open_dense()

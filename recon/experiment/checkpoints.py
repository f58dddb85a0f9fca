"""What full retraining saves to go on after it was killed: written whole or not at all, and only for the same run."""

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import ProcessGroup
from typing_extensions import override

from recon.basics.files import read_json, write_json
from recon.basics.manifest import Entry, Manifest
from recon.data.loader import ResumableLoader
from recon.distributed.ranks import any_rank, gathered, layout, patient_group, rank, size
from recon.pruning.masks import Masks

STOPPED = 128 + signal.SIGTERM
"""Exit status of a run that was told to stop; Lightning's own would be 0, as if it had ended."""


class Checkpoints(Checkpoint):
    """Saves every `every_n_steps` optimizer steps and when the run is stopped; keeps the last one.

    A checkpoint counts once its marker, a JSON file beside it, is written, and the one before is deleted only
    then: a run killed at any moment has a checkpoint to go on from, and goes on bit-identically.

    On SIGTERM to any rank, all of them end the step they are in, save and stop. On an exception the state of the
    last step is saved if there is one process; a rank that fails alone cannot save what the others hold, and the
    last regular checkpoint is then the one to go on from.

    Args:
        directory: Where to write.
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, directory: Path, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint_every_n_steps must be at least 1, got {every_n_steps}; 100 is the default")
        self.directory, self.every_n_steps = directory, every_n_steps
        self._saved_step = self._last_step = 0
        self._stepping = False
        self._told_to_stop = False
        self._group: ProcessGroup | None = None  # asks the other ranks; none if there are none
        self._position: dict[str, int] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict["position"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = self._last_step = trainer.global_step
        self._group = patient_group() if size() > 1 else None
        if self._position is not None:
            # Lightning restores loaders itself, but not if the learning rate's schedule has asked for their length.
            if not isinstance(trainer.train_dataloader, ResumableLoader):
                raise ValueError(
                    f"to go on within an epoch, full retraining needs a data.train_dataloader that returns a "
                    f"recon.data.ResumableLoader, got {type(trainer.train_dataloader).__name__}; return one, or delete "
                    f"{self.directory} to begin anew"
                )
            trainer.train_dataloader.load_state_dict(self._position)

        # Not Lightning's handler: it calls a collective at once, which meets those of the step under way and hangs.
        # Lightning puts back what was there before it when the fit ends.
        def stop(number: int, frame: Any) -> None:
            if not self._told_to_stop and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # the processes that this one has started
            self._told_to_stop = True

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self._stepping = True

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stepping = False
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        stop = any_rank(self._told_to_stop, self._group)
        # Not after the last step: Lightning goes on from there with nothing, not even with the best weights.
        if stop or (step % self.every_n_steps == 0 and step != trainer.max_steps):
            self._save(trainer, pl_module)
        if stop:
            raise SIGTERMException(STOPPED)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Within a step the weights may be half updated; at an epoch's end Lightning's counters are between two epochs.
        if trainer.global_step == self._saved_step or self._stepping or not trainer.training:
            return
        if isinstance(exception, FloatingPointError):  # found some steps after it happened
            return
        if trainer.world_size == 1 and _back_to_last_step(trainer):
            self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, module: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        self._position = {"given": 0 if progress.is_last_batch else progress.current.ready}
        path = self.directory / f"step-{trainer.global_step:06}.ckpt"
        trainer.save_checkpoint(path)
        manifest, own = _manifest(self.directory), _share(_files(path))
        written = {
            file: entry for part in gathered({file: Entry.of(file) for file in own}) for file, entry in part.items()
        }
        if trainer.is_global_zero:
            manifest.record(written)
            content = identity(trainer, module.masks) | {"step": trainer.global_step}
            write_json(_marker(path), content, manifest.writing)
            for other in sorted(self.directory.iterdir()):
                if other not in (path, _marker(path)):
                    manifest.forget(other)
                    _delete(other)
        self._saved_step = trainer.global_step


def identity(trainer: L.Trainer, masks: Masks) -> dict[str, Any]:
    """What a run and the checkpoint that it goes on from have to have in common."""
    return layout(trainer) | {"masks": masks.fingerprint()}


def last(directory: Path) -> Path | None:
    """The newest checkpoint that was written completely, as the manifest has it; None if there is none."""
    markers = sorted(
        path for path in _manifest(directory).records(directory) if path.parent == directory and path.suffix == ".json"
    )
    return markers[-1].with_suffix(".ckpt") if markers else None


def require_intact(path: Path) -> None:
    """Refuse a checkpoint that is not as it was written; all processes come here, and each reads a share of the files.

    Raises:
        ValueError: On every process, naming a file.
    """
    entries = _manifest(path.parent).records(path, _marker(path))
    faults = [_manifest(path.parent).fault_of(file, entries[file]) for file in _share(sorted(entries))]
    if found := [fault for part in gathered(faults) for fault in part if fault]:
        raise ValueError(
            f"a run goes on from its checkpoint as it was written, got a damaged one: {found[0]}; copy it again, or "
            f"delete {path.parent} to begin anew"
        )


def step_of(path: Path) -> int:
    """The optimizer steps before a checkpoint."""
    return _marked(path)["step"]


def require_same(path: Path, ours: dict[str, Any]) -> None:
    """Refuse to go on from the checkpoint of another run.

    Raises:
        ValueError: Naming what differs.
    """
    theirs = _marked(path)
    if different := [name for name in ours if ours[name] != theirs.get(name)]:
        told = ", ".join(
            "other masks" if name == "masks" else f"{name} {theirs.get(name)}, now {ours[name]}" for name in different
        )
        raise ValueError(
            f"a run goes on from its checkpoint only with the same processes, strategy, precision and masks; {path} "
            f"was written with {told}; start it as before, or delete {path.parent} to begin anew"
        )


def _marked(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's marker.

    Raises:
        ValueError: If the marker is damaged, or of another version.
    """
    marker, cure = _marker(path), f"delete {path.parent} to begin anew"
    marked = read_json(marker, dict, "a checkpoint", cure)
    if missing := [name for name in ("step", "masks") if name not in marked]:
        raise ValueError(
            f"a checkpoint needs a marker with {' and '.join(missing)}, got {marker}, made by another version of "
            f"recon; use that version, or {cure}"
        )
    return marked


def _manifest(directory: Path) -> Manifest:
    return Manifest(directory.parent)


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint, which is one itself or a directory."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _share(files: list[Path]) -> list[Path]:
    """The files that this process hashes, of all that are on the disk which the processes share."""
    return files[rank() :: size()]


def _marker(path: Path) -> Path:
    return path.with_suffix(".json")


def _delete(path: Path) -> None:
    """The marker first: what has none does not count."""
    if path.suffix == ".ckpt":
        _marker(path).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _back_to_last_step(trainer: L.Trainer) -> bool:
    """Set Lightning's counters back to the last optimizer step of this epoch; False if it had none.

    Batches whose gradients were accumulated since, or that were under way, are then given again.
    """
    progress, accumulate = trainer.fit_loop.epoch_loop.batch_progress, trainer.accumulate_grad_batches
    batches = progress.current.completed // accumulate * accumulate
    if batches == 0:
        return False
    undone = progress.current.ready - batches
    for tracker in (progress.current, progress.total):
        tracker.ready -= undone
        # As it is in `on_train_batch_end`, where regular checkpoints are written.
        tracker.started = tracker.processed = tracker.ready  # pyright: ignore[reportAttributeAccessIssue]
        tracker.completed = tracker.ready - 1
    progress.is_last_batch = False
    return True

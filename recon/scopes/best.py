"""The weights of the lowest held-out loss, in a file: the result of a fit that overfits in its last steps."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from safetensors import safe_open
from torch import Tensor, nn

from recon.basics.files import atomic_write
from recon.basics.manifest import Manifest
from recon.basics.run_paths import RunPaths
from recon.distributed.parameters import copies, whole, whole_shape
from recon.distributed.ranks import rank
from recon.pruning.start_weights import written

log = logging.getLogger("recon")

VALIDATES_NEXT = "validates_next"
"""Key in a checkpoint: whether the next thing to do was to measure the held-out loss."""


class BestWeights:
    """The weights that learn as they were when the held-out loss was lowest.

    A fit that goes on from a checkpoint finds the file of its earlier starts. That file may be of a later step than the
    checkpoint: the same steps then give the same losses, and leave it as it is.

    Args:
        path: The file; rank 0 writes and reads it.

    Attributes:
        step: Optimizer steps before the lowest loss; None without one.
        loss: The lowest loss.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step: int | None = None
        self.loss = math.inf

    def begin(self, trainer: L.Trainer, resumed: bool) -> None:
        """Find the file of earlier starts, or remove that of another fit; all processes call this.

        Raises:
            ValueError: If the file is damaged.
        """
        if rank() == 0 and not resumed:
            self.forget()
        if rank() == 0 and self.path.exists():
            if (manifest := self._manifest) is not None:
                checkpoints = RunPaths(self.path.parent).checkpoints
                manifest.require(self.path, f"copy it again, or delete it and {checkpoints} to begin anew")
            with safe_open(self.path, framework="pt") as file:
                noted = file.metadata()
            self.step, self.loss = int(noted["step"]), float.fromhex(noted["loss"])
        self.step, self.loss = trainer.strategy.broadcast((self.step, self.loss))

    def offer(self, loss: float, step: int, model: nn.Module) -> None:
        """Keep the weights of `model` if no loss before was as low; all processes call this with the same loss."""
        if not loss < self.loss:
            return
        self.step, self.loss = step, loss
        model.state_dict()  # under FSDP2 this shards again what the last forward pass left whole
        learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
        if rank() != 0:
            for parameter in learning.values():
                list(copies(parameter))  # gathered by all processes
            return
        like = {
            name: torch.empty(whole_shape(one), dtype=torch.promote_types(one.dtype, torch.float32), device="meta")
            for name, one in learning.items()
        }
        noted = {"step": str(step), "loss": loss.hex()}
        writing = atomic_write if self._manifest is None else self._manifest.writing
        with written(self.path, like, writing, noted) as write:
            for name, parameter in learning.items():
                write(name, list(copies(parameter))[-1][1])

    def other_than(self, step: int) -> "BestWeights | None":
        """These weights, unless there are none or they are those after `step`, the last one."""
        if self.step in (None, step):
            return None
        log.info(f"the weights after step {self.step} of {step} are kept: lowest held-out loss, {self.loss:.4f}")
        return self

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Give `model` these weights; of a model that ZeRO partitions all processes call this, else rank 0 alone."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with whole(parameter, write=True) as weight:
                    if rank() == 0:
                        weight.copy_(self._weight(name))

    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Give a gathered state dict these weights; rank 0 alone calls this."""
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                state[name].copy_(file.get_tensor(name))

    def _weight(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:  # an open file would keep its pages resident
            return file.get_tensor(name)

    def forget(self) -> None:
        """Remove the file."""
        if rank() == 0:
            if self._manifest is not None:
                self._manifest.forget(self.path)
            self.path.unlink(missing_ok=True)

    @property
    def _manifest(self) -> Manifest | None:
        """That of the run; None of a fit without one."""
        manifest = Manifest(self.path.parent)
        return manifest if manifest.file.exists() else None


def validates_next(trainer: L.Trainer) -> bool:
    """Whether the trainer, which is in `on_train_batch_end`, goes on with a validation."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def ends_unmeasured(trainer: L.Trainer) -> bool:
    """Whether the trainer, which is in `on_train_batch_end`, stops at its last step without a validation."""
    return trainer.global_step == trainer.max_steps and not validates_next(trainer)


def validate_now(trainer: L.Trainer) -> None:
    """Run a validation that Lightning leaves out: after a checkpoint saved just before one, and at its last step."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    is_first = connector._first_loop_iter
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training, connector._first_loop_iter = True, is_first

"""The parts of a run that the account of live tensors follows."""

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from callbacks.tensor_owners import HOLDERS
from recon.distributed.strategies import WindowParallelStrategy
from recon.profiling.entries import Peak, Side
from recon.profiling.footprint import has_state
from recon.profiling.ledger import Ledger
from recon.profiling.phases import PhaseName, is_window

NOT_FOLLOWED = (PhaseName.LOAD, PhaseName.SAVE)
"""Phases in which libraries move weights in their own ways; live tensors at their end are counted."""

END = "at its end"


class Follower:
    """Opens, feeds and closes a ledger, phase by phase.

    The first phase of each kind (attention, MLP, every other phase) is followed from its beginning, in the samples of
    `recon.profiling.ledger`, and in its optimizer steps up to the first with optimizer state: later steps are like it.
    Of other windows that one step is followed; without an optimizer, live tensors before the first step are counted.
    Under a strategy that shards, live tensors are counted.

    Attributes:
        ledger: The account.
    """

    def __init__(self) -> None:
        self.ledger = Ledger(HOLDERS)
        self._kinds: set[str] = set()
        self._is_sharded = False
        self._forget()

    def begin_run(self, device: torch.device) -> None:
        """Begin a run that computes on `device`; `gc.freeze` may follow."""
        self.ledger.device = device
        self.ledger.remember()
        self._kinds, self._is_sharded = set(), False

    def begin_phase(self, name: str) -> None:
        """Begin a phase after the last one has ended."""
        self._forget()
        self.ledger.close()
        self.ledger.reset()
        kind = name.partition(".")[2] if is_window(name) else name
        is_new = kind not in self._kinds
        self._kinds.add(kind)
        if is_new and name not in NOT_FOLLOWED and not self._is_sharded:
            self.ledger.open("at its start")

    def end_phase(self) -> dict[Side, Peak]:
        """End the phase, failed or not, and return its peaks."""
        return self.ledger.close() or self.ledger.look(END)

    def begin_fit(self, trainer: L.Trainer) -> None:
        """Begin training, by a strategy that is known now."""
        self._is_sharded = not isinstance(trainer.strategy, SingleDeviceStrategy | WindowParallelStrategy)
        if self._is_sharded:
            self.ledger.close()
            self.ledger.reset()

    def begin_batch(self, trainer: L.Trainer, batch_index: int) -> None:
        """Begin a training step, or one of its micro-batches."""
        if self._is_done or self._is_sharded:
            return
        is_first, self._has_begun = not self._has_begun, True
        if self._first_step is None:
            self._first_step = trainer.global_step
        self._steps = (batch_index + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        self._is_complete = self._steps and has_state(trainer.optimizers)
        if not self.ledger.is_open:
            if not trainer.optimizers:
                self.ledger.look(f"{self.step(trainer)}, held")
                self._is_done = True
                return
            if not self._is_complete and not trainer.is_last_batch:
                return
            self.ledger.open(f"{self.step(trainer)}, held", listen=True)
        if is_first or self._steps:
            self.ledger.listen()
            self.ledger.forward(f"{self.step(trainer)}, forward")

    def begin_backward(self, trainer: L.Trainer) -> None:
        """Begin the backward pass."""
        if self.ledger.listens:
            self.ledger.backward(f"{self.step(trainer)}, backward")

    def begin_update(self, trainer: L.Trainer) -> None:
        """Begin the optimizer's update."""
        if self.ledger.listens:
            self.ledger.step(f"{self.step(trainer)}, optimizer")
            self.ledger.label("gradients", [parameter.grad for parameter in _learning(trainer)])

    def count(self, trainer: L.Trainer) -> None:
        """Count live tensors now, with gradients and optimizer state, under a strategy that shards."""
        if self._is_sharded:
            self.ledger.look(f"{self.step(trainer)}, optimizer")

    def end_batch(self) -> dict[Side, Peak] | None:
        """End a training step, or one of its micro-batches; return this phase's peaks after its last followed step."""
        if not self.ledger.listens:
            return None
        self.ledger.step("between steps")
        self.ledger.pause()
        if not self._is_complete:
            return None
        self._is_done = True
        return self.ledger.close()

    def step(self, trainer: L.Trainer) -> str:
        """Name the current optimizer step, counted from this phase's first."""
        first = trainer.global_step if self._first_step is None else self._first_step
        return f"step {trainer.global_step - first + 1}"

    def _forget(self) -> None:
        self._first_step: int | None = None
        self._has_begun = self._steps = self._is_complete = self._is_done = False


def _learning(trainer: L.Trainer) -> list[torch.nn.Parameter]:
    """List the parameters that learn; an offloaded model is no part of its module."""
    groups = [group for one in trainer.optimizers for group in one.param_groups]
    return [parameter for group in groups for parameter in group["params"]]

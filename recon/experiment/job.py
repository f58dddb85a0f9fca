"""The parts of one recovery, which all of its steps share."""

from dataclasses import dataclass

import lightning as L
import torch

from recon.data import TokenData
from recon.distributed import ranks
from recon.experiment.directory import RunDirectory
from recon.experiment.options import RunOptions
from recon.models.loading import ModelSource
from recon.models.offload.opening import open_offloaded
from recon.models.replay import Replay
from recon.scopes.base import Scope


@dataclass(frozen=True)
class Job:
    """A recovery as this process sees it.

    Args:
        scope: The recovery scope; names the model.
        data: Calibration, validation and test tokens.
        trainer: Runs the scope's fit.
        run: The run's directory, the same for all processes.
        options: See `RunOptions`.
    """

    scope: Scope
    data: TokenData
    trainer: L.Trainer
    run: RunDirectory
    options: RunOptions

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.trainer.strategy.root_device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prunes, saves and evaluates."""
        return ranks.rank() == 0

    @property
    def is_offloaded(self) -> bool:
        """Whether the blocks of the model are on the device only while they are needed."""
        return self.scope.offload != "none"

    @property
    def measures_baselines(self) -> bool:
        """Whether the dense and the pruned model are evaluated here."""
        return self.options.baselines and self.options.part is None

    @property
    def written(self) -> ModelSource:
        """The recovered model, as it was written."""
        return self.scope.source.at(self.run.model)

    def reopened(self, source: ModelSource) -> Replay:
        """Another copy of a model, offloaded as the scope's is."""
        offloaded = open_offloaded(source, self.scope.offload, self.device, self.run.dense)
        replay = Replay.within(offloaded, self.scope.forms)
        self.scope.forms = replay.forms
        return replay

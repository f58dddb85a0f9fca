"""The parts of one recovery, which all of its steps share."""

from dataclasses import dataclass

import lightning as L
import torch

from recon.data import TokenData
from recon.distributed import ranks
from recon.experiment.directory import RunDirectory
from recon.experiment.opened import Opener, OpenModel
from recon.experiment.options import RunOptions
from recon.models.loading import ModelSource
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
        """The device of this process; a CPU without the index that DeepSpeed gives it, which tensors do not have."""
        device = self.trainer.strategy.root_device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prunes, saves and evaluates."""
        return ranks.rank() == 0

    @property
    def is_offloaded(self) -> bool:
        """Whether the blocks of the model are on the device only while needed; in full retraining, outside the fit."""
        return self.scope.offload != "none"

    @property
    def measures_baselines(self) -> bool:
        """Whether the dense and the pruned model are evaluated here."""
        return self.options.baselines and self.options.part is None

    @property
    def written(self) -> ModelSource:
        """The recovered model, as it was written."""
        return self.scope.source.at(self.run.model)

    def open_dense(self) -> Replay:
        """The model that the scope has loaded, on the device, before it is pruned.

        Raises:
            ValueError: If each process loads a part of it.
        """
        if not self.scope.loads_whole:
            raise ValueError(
                "data.source SelfGenerated needs the whole model to write text, got model.partitioned, which loads "
                "a part of it; run `recon prune` with the same model, data and seed first: its text is found then"
            )
        return self.scope.to(self.device).open_replay()

    def reopened(self, source: ModelSource) -> OpenModel:
        """Another copy of a model, offloaded as the scope's is."""
        scope = self.scope
        opener = Opener(scope.offload, self.device, scope.storage, self.run.dense, scope.forms)
        model = opener(source)
        scope.forms = opener.forms
        return model

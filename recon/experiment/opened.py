"""A model that is pruned or measured: whole on the device, or block by block from the host or from disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.calibration.storage import ON_DEVICE, ON_HOST, Storage
from recon.data import TokenData
from recon.evaluation.blockwise import evaluate_blockwise, measure_drift_blockwise
from recon.evaluation.drift import Drift, measure_drift
from recon.evaluation.perplexity import Evaluation, evaluate
from recon.experiment.sizes import offloaded_parameters
from recon.models.loading import ModelSource, empty
from recon.models.offload.opening import Offload, open_offloaded
from recon.models.replay import Forms, Replay
from recon.pruning.masks import Masks
from recon.pruning.start_weights import amend_by, apply


class OpenModel(ABC):
    """A loaded model, wherever it is.

    Args:
        model: As transformers has made it.
    """

    replay: Replay | None = None
    """Its blocks, if they are not on the device."""

    storage: Storage = ON_DEVICE
    """Place of the hidden states of all sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and values, tied ones once; a value is valid until the next is yielded."""

    @abstractmethod
    def apply(self, masks: Masks, moved: Mapping[str, Tensor] | None = None) -> None:
        """Prune it; the survivors take the values of `moved` if it is given."""

    @abstractmethod
    def evaluate(self, data: TokenData) -> Evaluation:
        """Measure its perplexity on the split that `data` evaluates on."""

    @abstractmethod
    def drift_to(self, other: Any, data: TokenData) -> Drift:
        """Measure the distance of `other`, opened the same way, on the validation split."""

    @abstractmethod
    def state(self, dtype: torch.dtype, directory: Path) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
        """Return it in `dtype`, to be written: a model, and its weights if the model is without them."""

    def violations(self, masks: Masks) -> int:
        """Count the weights that are pruned but not zero."""
        return sum(masks.violations_of(name, value) for name, value in self.parameters() if name in masks)


class WholeModel(OpenModel):
    """A model on the device."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See `OpenModel`."""
        yield from self.model.named_parameters()

    def apply(self, masks: Masks, moved: Mapping[str, Tensor] | None = None) -> None:
        """See `OpenModel`."""
        apply(self.model, masks, moved)

    def evaluate(self, data: TokenData) -> Evaluation:
        """See `OpenModel`."""
        return evaluate(self.model, data.evaluation_dataloader(), data.evaluate_on)

    def drift_to(self, other: "WholeModel", data: TokenData) -> Drift:
        """See `OpenModel`."""
        return measure_drift(self.model, other.model, data.val_dataloader())

    def state(self, dtype: torch.dtype, directory: Path) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
        """See `OpenModel`."""
        return self.model.to(dtype), None  # pyright: ignore[reportArgumentType]

    def violations(self, masks: Masks) -> int:
        """See `OpenModel`; a tied parameter may have its mask under any of its names."""
        return masks.violations(self.model)


class OffloadedModel(OpenModel):
    """A model whose blocks are on the device only while they are needed.

    Args:
        replay: Its blocks.
        storage: Place of the hidden states.
    """

    replay: Replay

    def __init__(self, replay: Replay, storage: Storage) -> None:
        super().__init__(replay.model)
        assert replay.offloaded is not None
        self.replay, self.offloaded, self.storage = replay, replay.offloaded, storage

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See `OpenModel`."""
        yield from offloaded_parameters(self.offloaded)

    def apply(self, masks: Masks, moved: Mapping[str, Tensor] | None = None) -> None:
        """See `OpenModel`; each block is pruned whenever it comes to the device."""
        masks.validate_for(self.model)
        self.offloaded.hold(())
        self.offloaded.amend = amend_by(masks, moved, self.offloaded)

    def evaluate(self, data: TokenData) -> Evaluation:
        """See `OpenModel`."""
        # In the model's own precision: a perplexity does not depend on options.
        storage, split = replace(self.storage, dtype=None), data.evaluate_on
        return evaluate_blockwise(self.replay, data.tokens(split), data.batch_size, split, storage)

    def drift_to(self, other: "OffloadedModel", data: TokenData) -> Drift:
        """See `OpenModel`."""
        storage, tokens = replace(self.storage, dtype=None), data.tokens("validation")
        return measure_drift_blockwise(self.replay, other.replay, tokens, data.batch_size, storage=storage)

    def state(self, dtype: torch.dtype, directory: Path) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
        """See `OpenModel`; the weights are in an unnamed file in `directory`."""
        model = empty(type(self.model), self.model.config, dtype)
        model.generation_config = self.model.generation_config
        return model, self.offloaded.state(dtype, directory)


@dataclass
class Opener:
    """Opens models of one architecture, all at one place.

    Args:
        offload: Place of their blocks.
        device: Where they compute.
        storage: Place of the hidden states of offloaded models; the host's memory by default.
        dense: Directory for the weights of a model that no files hold, if blocks are to be read from disk.
        forms: In which blocks return, once they were tried out.
    """

    offload: Offload
    device: torch.device
    storage: Storage = ON_HOST
    dense: Path | None = None
    forms: Forms | None = None

    def __call__(self, source: ModelSource) -> OpenModel:
        """Load a model.

        Raises:
            ValueError: If there is no such model, or it cannot be offloaded.
        """
        if self.offload == "none":
            return WholeModel(source.model(self.device))
        replay = Replay.within(open_offloaded(source, self.offload, self.device, self.dense), self.forms)
        self.forms = replay.forms
        return OffloadedModel(replay, self.storage)

"""A data module whose hooks run in a fit that trains on a scope's own batches."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from typing_extensions import override


class OwnBatches(L.LightningDataModule):
    """The hooks of a data module, around training batches from elsewhere.

    Lightning asks a data module for every loader if `trainer.fit` has one. The batches of a local scope are hidden
    states of its window, so its data module is this one. Transfer hooks see these batches. There is no validation
    loader: local scopes measure the held-out error of a window themselves.

    Args:
        data: Whose hooks run.
        batches: Makes the training loader.
    """

    def __init__(self, data: L.LightningDataModule, batches: Callable[[], Any]) -> None:
        self.data, self.batches = data, batches
        super().__init__()

    @property
    def trainer(self) -> L.Trainer | None:
        """The trainer under way, which `data` knows, too."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self.data.trainer = trainer

    @property
    def prepare_data_per_node(self) -> bool:
        """Whether one process of each node prepares, or one of all."""
        return self.data.prepare_data_per_node

    @prepare_data_per_node.setter
    def prepare_data_per_node(self, value: bool) -> None:
        """Nothing: it is what `data` has."""

    @override
    def prepare_data(self) -> None:
        self.data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self.data.setup(stage)

    @override
    def train_dataloader(self) -> Any:
        return self.batches()

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data.load_state_dict(state_dict)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.data.on_exception(exception)

    @override
    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)

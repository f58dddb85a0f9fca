"""A model that the caller holds in memory, in place of one that is loaded."""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.models.loading import ModelSource, empty, require_vocabulary


class LiveModel(ModelSource):
    """A live model as the source of a run, and where the run's result goes.

    `load` lends the model: a module tree of its own around the same weights, in evaluation mode and without a cache.
    Hooks, adapters, modes and `requires_grad` of a run end with that tree; the weights alone are changed in place.

    Args:
        live: The model, dense, on one device.
        tokenizer: Its tokenizer.
        keep_dense: Hold a copy of the dense weights on the host once they are lent, for comparisons with the dense
            model and to restore it after an error.

    Raises:
        ValueError: If the model lies on several devices or holds no weights, or has a precision that recon does not
            know.
    """

    dtype: str

    def __init__(self, live: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep_dense: bool = True) -> None:
        super().__init__(name_of(live), dtype=str(live.dtype).removeprefix("torch."))
        devices = sorted({str(parameter.device) for parameter in live.parameters()})
        if len(devices) != 1 or devices == ["meta"]:
            raise ValueError(
                f"a live model needs all of its weights on one device, got {', '.join(devices)}; load it without "
                f"device_map, or give its name to `recon fit` with --model.offload host"
            )
        # The base class is frozen.
        vars(self).update(_live=live, _tokenizer=tokenizer, _keep_dense=keep_dense, _dense={})
        self._live: PreTrainedModel
        self._tokenizer: PreTrainedTokenizerBase
        self._keep_dense: bool
        self._dense: dict[str, torch.Tensor]

    @property
    def is_stored(self) -> bool:
        """Never: no files hold these weights."""
        return False

    def at(self, directory: Path) -> ModelSource:
        """A model of this class in a directory."""
        return _Written(directory, type(self._live), self.dtype)

    def load(self, device: torch.device | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Lend the model, on the CPU or wherever it is if `device` is None, and its tokenizer.

        Raises:
            ValueError: If the tokenizer has ids without an embedding.
        """
        if self._keep_dense and not self._dense:
            self._dense.update((name, one.detach().to("cpu", copy=True)) for name, one in self._weights())
        model = self._shell({id(one): nn.Parameter(one.detach(), False) for _, one in self._weights()})
        if device is not None:
            nn.Module.to(model, device)
        return model, self.tokenizer_for(model)

    def model(self, device: torch.device | None = None) -> PreTrainedModel:
        """A copy of the dense model, in evaluation mode and without a cache, on `device` (the CPU if None)."""
        weights = self._dense or {name: one.detach() for name, one in self._weights()}
        where = device or torch.device("cpu")
        memo = {id(one): nn.Parameter(weights[name].to(where, copy=True), False) for name, one in self._weights()}
        model = self._shell(memo)
        nn.Module.to(model, where)  # the buffers
        return model

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, on the meta device."""
        return empty(type(self._live), copy.deepcopy(self._live.config), self._live.dtype)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    def tokenizer_for(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: If it has ids without an embedding.
        """
        require_vocabulary(model, self._tokenizer)
        return self._tokenizer

    def identity(self) -> dict[str, Any]:
        """Digests of configuration and weights, and of the tokenizer's vocabulary and chat template."""
        text = json.dumps([self._tokenizer.get_vocab(), self._tokenizer.chat_template], sort_keys=True)
        digest = hashlib.sha256(self._live.config.to_json_string().encode())
        for name, weight in self._weights():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        tokenizer = hashlib.sha256(text.encode()).hexdigest()
        return {"weights": digest.hexdigest(), "tokenizer": tokenizer, "dtype": self.dtype}

    @torch.no_grad()
    def take(self, directory: Path) -> None:
        """Give the live model the weights that a run wrote to `directory`, in place, in its own precision."""
        written = dict(self.at(directory).model().named_parameters(remove_duplicate=False))
        for name, weight in self._weights():
            weight.copy_(written[name])

    @contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Put the dense weights back if the block fails, where they are held."""
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for name, weight in self._weights():
                    if name in self._dense:
                        weight.copy_(self._dense[name])
            raise

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._live.named_parameters()  # tied ones once

    def _shell(self, parameters: dict[int, nn.Parameter]) -> PreTrainedModel:
        """The model around other parameters: id of each of its own -> the one in its place."""
        model = copy.deepcopy(self._live, dict[int, Any](parameters))
        model.config.use_cache = False
        return model.eval()


class _Written(ModelSource):
    """A model in a directory, loaded by the class that wrote it, whether or not transformers knows that class."""

    dtype: str

    def __init__(self, directory: Path, kind: type[PreTrainedModel], dtype: str) -> None:
        super().__init__(str(directory), dtype=dtype)
        vars(self).update(_kind=kind)
        self._kind: type[PreTrainedModel]

    def model(self, device: torch.device | None = None) -> PreTrainedModel:
        model = self._kind.from_pretrained(self.name, dtype=getattr(torch, self.dtype), weights_only=True)
        model.config.use_cache = False
        if device is not None:
            nn.Module.to(model, device)
        return model.eval()


def name_of(model: PreTrainedModel) -> str:
    """What reports call a live model: the name it was loaded by, or its class."""
    return model.name_or_path or type(model).__name__

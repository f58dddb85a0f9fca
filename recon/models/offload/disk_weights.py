"""The weights of a model in its safetensors files, read one at a time and never kept in memory."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from recon.models.weight_files import FLOATS, INDEX, SINGLE, weight_places

OFFLOAD, _OR_HOST = "model.offload: disk", ", or choose model.offload: host"
"""The option that reads weights from disk, and the other way that it leaves."""


class DiskWeights:
    """Finds the weights of a model in its files, by their names in the model.

    Args:
        directory: Model in Hugging Face format, with one safetensors file or several and their index.
        model: Gives the names and shapes of the weights; its values are not read.
        option: The option that needs them, for messages.

    Raises:
        ValueError: If the directory has no such files, or lacks a weight of `model` under its name, or has it in
            another shape.
    """

    def __init__(self, directory: Path, model: PreTrainedModel, option: str = OFFLOAD) -> None:
        self._option = option
        files = weight_places(directory, option)
        if not files:
            raise ValueError(
                f"{option} reads {SINGLE} or the files in {INDEX}, {directory} has neither; load the model and save it "
                f"again with save_pretrained{_OR_HOST if option == OFFLOAD else ''}"
            )
        state = model.state_dict(keep_vars=True)
        names = _names(files, model, state)
        self._places = {name: (files[key], key) for key, name in names.items() if name in state}
        there = {id(state[name]) for name in self._places}
        missing = [name for name, tensor in state.items() if id(tensor) not in there]  # a tied one is there once
        if missing:
            raise ValueError(
                f"{option} reads weights by their names in the model, {directory} lacks {len(missing)} of "
                f"{len(state)}, {missing[0]} the first; load the model and save it again with save_pretrained"
                f"{_OR_HOST if option == OFFLOAD else ''}"
            )
        self._require_shapes(state)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and stored weight, file by file; the weight is valid until the next is yielded."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._places[name][0], []).append(name)
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:  # closed soon: an open file keeps its pages resident
                for name in members:
                    yield name, file.get_tensor(self._places[name][1])

    def redirect(self, names: Iterable[str], path: Path) -> None:
        """Read `names` from the file at `path` from now on, which holds them under these names."""
        self._places |= {name: (path, name) for name in names}

    def _require_shapes(self, state: Mapping[str, Tensor]) -> None:
        by_file: dict[Path, list[str]] = {}
        for name, (path, _) in self._places.items():
            by_file.setdefault(path, []).append(name)
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    stored = file.get_slice(self._places[name][1])
                    shape = torch.Size(stored.get_shape())
                    if shape != state[name].shape:
                        raise ValueError(
                            f"{self._option} needs weights in the model's own shapes, got {list(shape)} for "
                            f"{name} {list(state[name].shape)} in {path}; correct config.json or copy the model again"
                        )
                    if state[name].is_floating_point() and stored.get_dtype() not in FLOATS:
                        raise ValueError(
                            f"{self._option} needs floating-point weights, got {stored.get_dtype()} for {name} in "
                            f"{path}; write the model again with save_pretrained"
                        )


def _names(keys: Iterable[str], model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, str]:
    """Map each key in the files to its name in the model, as `from_pretrained` does.

    Keys whose values it would convert are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    names = {}
    for key in keys:
        name, converted_by = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted_by is None:
            names[key] = name
    return names

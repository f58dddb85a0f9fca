"""Reading the checkpoints of DeepSpeed and of FSDP2, which are pickles, without running code that one may hold."""

import os
import pathlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO, Any
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable that restricts every `torch.load` to tensors and registered types, whatever its caller asks."""


@contextmanager
def unpickling_weights_only() -> Iterator[None]:
    """Within, DeepSpeed's checkpoints are read with tensors and three types of DeepSpeed's own, and nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with (
        patch.dict(os.environ, {FORCED: "1"}),
        torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler]),
    ):
        yield


@contextmanager
def unpickling_metadata_only() -> Iterator[None]:
    """Within, checkpoints of `torch.distributed.checkpoint` are read with its own metadata classes and tensors.

    torch unpickles the file `.metadata` without restriction, and every entry that is no tensor.

    Raises:
        ValueError: If one of them holds anything else, or is damaged.
    """
    with patch.dict(os.environ, {FORCED: "1"}), patch.object(filesystem, "pickle", SimpleNamespace(load=_load)):
        try:
            yield
        except CheckpointException as failure:  # a BaseException, with an error for each rank
            first = next(iter(failure.failures.values()))[0]
            reason = str(first).strip().splitlines()[0]
            raise ValueError(
                f"a checkpoint needs the entries that torch wrote, one cannot be read ({reason}); delete it, "
                f"or copy it again from where it was made"
            ) from failure


class _MetadataUnpickler(pickle.Unpickler):
    """Admits the classes of which torch's metadata consist."""

    def find_class(self, module: str, name: str) -> Any:
        known = vars(metadata).get(name)
        if module == metadata.__name__ and isinstance(known, type) and known.__module__ == module:
            return known
        # A nested enumeration of TensorProperties, pickled under its qualified name or as an attribute of its module.
        if module == metadata.__name__ and name in ("TensorProperties._MEM_FORMAT_ENCODING", "_MEM_FORMAT_ENCODING"):
            return super().find_class(module, name)
        if (module, name) in _ADMITTED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(
            f"the metadata of a checkpoint may hold classes of torch's metadata only, got {module}.{name}, which could "
            f"run code; use a checkpoint from a source that you trust"
        )


_ADMITTED = {
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", kind.__name__) for kind in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath)),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


def _load(file: IO[bytes]) -> Any:
    try:
        return _MetadataUnpickler(file).load()
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged pickle raises
        name = getattr(file, "name", "the metadata of a checkpoint")
        raise ValueError(
            f"a checkpoint needs metadata that torch wrote, got {name}, which cannot be read ({error}); delete the "
            f"checkpoint to begin from the step before, or copy it again from where it was made"
        ) from error

"""The simulated device of a tensor: a tag on its storage, so views share it."""

import torch
from torch import Tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def device_of(tensor: Tensor) -> torch.device:
    """The device that `tensor` would be on."""
    return getattr(_storage(tensor), "simulated_device", CPU)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Tag the storage of `tensor`, whose values stay where they are."""
    if (storage := _storage(tensor)) is not None:
        storage.simulated_device = device
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor on the host would be in pinned memory."""
    return getattr(_storage(tensor), "simulated_pin", False)


def pin(tensor: Tensor) -> Tensor:
    """Mark the storage of `tensor` as pinned."""
    storage = _storage(tensor)
    assert storage is not None
    storage.simulated_pin = True
    return tensor


def key_of(tensor: Tensor) -> int | None:
    """What tensors with one storage have in common; None without a storage."""
    return None if (storage := _storage(tensor)) is None else storage._cdata


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None  # sparse tensors and those of functorch have none


def normalised(device: torch.device | str | int | None) -> torch.device | None:
    """A device as torch's functions take it; there is one CUDA device."""
    if device is None:
        return None
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return CUDA if named.type == "cuda" else named

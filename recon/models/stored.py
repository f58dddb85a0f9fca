"""The files of a model directory: their precision, their size, the zeros in them. Read one tensor at a time."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from recon.basics.manifest import FOR_PEOPLE
from recon.models.weight_files import weight_places

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The precisions in which recon loads and writes models, by their name in a safetensors file."""


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files with the weights of a model; none if it is stored in another format."""
    return sorted(set(weight_places(directory, "model.name").values()))


def dtype_of(directory: Path) -> torch.dtype | None:
    """The precision of most weights in a model directory; None without safetensors files, or in another precision."""
    sizes: Counter[str] = Counter()
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 -- no mapping
                weight = file.get_slice(key)
                sizes[weight.get_dtype()] += torch.Size(weight.get_shape()).numel()
    return DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None


def size_on_disk(directory: Path) -> int:
    """Bytes of the files in a model directory; neither those for people nor those in directories within count."""
    files = (path for path in directory.iterdir() if path.is_file() and path.suffix not in FOR_PEOPLE)
    return sum(path.stat().st_size for path in files)


def stored_weights(directory: Path) -> Iterator[Tensor]:
    """The weights in the files of a model directory, each valid until the next is yielded; tied ones once."""
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 -- no mapping
                yield file.get_tensor(key)


def share_of_zeros(weights: Iterable[Tensor]) -> float:
    """Zeros among all elements of `weights`; 0 if there are none."""
    zeros = total = 0
    for weight in weights:
        zeros += weight.numel() - int(weight.count_nonzero())
        total += weight.numel()
    return zeros / max(1, total)

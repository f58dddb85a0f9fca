"""Masks: which weights survive, as one bool tensor per pruned parameter, True = kept.

A mask has its parameter's own layout and shape. On disk eight weights share a byte, so the masks of a model
of 7 billion weights take 0.9 GB.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recon.atomic import atomic_write

FORMAT = "recon-masks-1"
NUM_NAMES_SHOWN = 3


class Masks(Mapping[str, Tensor]):
    """Parameter name -> mask.

    Args:
        masks: Name, as in `model.named_parameters()`, -> bool tensor shaped as the parameter, True = kept.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, keep in masks.items():
            if keep.dtype != torch.bool:
                raise ValueError(f"a mask needs dtype bool, True = kept, got {keep.dtype} for `{name}`")
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(keep.cpu(), other[name].cpu()) for name, keep in self.items()
        )

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.num_pruned} weights pruned, sparsity {self.sparsity:.4f})"

    @property
    def num_pruned(self) -> int:
        """Number of weights pruned."""
        return sum(keep.numel() - int(keep.sum()) for keep in self.values())

    @property
    def sparsity(self) -> float:
        """The fraction pruned among the weights of the masked parameters; 0 without any."""
        return self.num_pruned / max(1, sum(keep.numel() for keep in self.values()))

    def subset(self, names: Iterable[str]) -> "Masks":
        """The masks of `names`, in that order; every name needs to have one."""
        names = list(names)
        if unknown := [name for name in names if name not in self]:
            raise ValueError(f"a subset needs names that have a mask, got {_few(unknown)} without one")
        return Masks({name: self[name] for name in names})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zero the pruned weights of `model` in place."""
        for _, parameter, keep in self._matched(model):
            parameter.masked_fill_(~keep, 0)  # not `* keep`: inf * 0 is NaN

    def violations(self, model: nn.Module) -> int:
        """Number of weights that are pruned but not zero; NaN counts."""
        return sum(_num_violations(parameter, keep) for _, parameter, keep in self._matched(model))

    def check(self, model: nn.Module) -> None:
        """Raise a `ValueError` that names the first parameter with a pruned weight that is not zero."""
        for name, parameter, keep in self._matched(model):
            if count := _num_violations(parameter, keep):
                raise ValueError(
                    f"pruned weights need to be zero, got {count} of {int((~keep).sum())} in `{name}` that "
                    f"are not; apply the masks before training and keep the MaskEnforcer callback"
                )

    def validate_for(self, model: nn.Module) -> None:
        """Raise a `ValueError` if the masks are not those of `model`: unknown names or other shapes."""
        parameters = _parameters(model)
        if unknown := [name for name in self if name not in parameters]:
            raise ValueError(
                f"masks need the names of the model's parameters, got {len(unknown)} of {len(self)} that it "
                f"does not have ({_few(unknown)}; it has {_few(list(parameters))}); use the masks made from "
                "this model, or prune it again"
            )
        if other := [name for name in self if self[name].shape != parameters[name].shape]:
            shown = ", ".join(
                f"`{name}`: mask {tuple(self[name].shape)}, parameter {tuple(parameters[name].shape)}"
                for name in other[:NUM_NAMES_SHOWN]
            )
            raise ValueError(
                f"masks need the shapes of the model's parameters, got {len(other)} of {len(self)} that "
                f"differ ({shown}); use the masks made from this model, or prune it again"
            )

    def fingerprint(self) -> str:
        """The SHA-256, in hex, of names, shapes and bits; the order of the names does not count."""
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(json.dumps([name, list(self[name].shape)]).encode())
            digest.update(bytes(_pack(self[name]).numpy().data))
        return digest.hexdigest()

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write all masks to one bit-packed safetensors file, atomically.

        Args:
            path: The file; its directory is made if missing.
            metadata: What the masks were made from, for `read_metadata`.

        Raises:
            OSError: If the file cannot be written; an older file at `path` is then untouched.
        """
        header = {
            "format": FORMAT,
            "shapes": json.dumps({name: list(keep.shape) for name, keep in self.items()}),
            "metadata": json.dumps(metadata or {}),
        }
        with atomic_write(path) as temporary:
            save_file({name: _pack(keep) for name, keep in self.items()}, temporary, header)

    @staticmethod
    def load(path: str | Path) -> "Masks":
        """Read the masks that `save` wrote, to the CPU.

        Raises:
            ValueError: If `path` is not such a file.
        """
        shapes = json.loads(_read_header(path)["shapes"])
        with safe_open(path, framework="pt") as file:
            return Masks({name: _unpack(file.get_tensor(name), tuple(shape)) for name, shape in shapes.items()})

    @staticmethod
    def read_metadata(path: str | Path) -> dict[str, str]:
        """Read what `save` received as metadata, without reading the masks."""
        return json.loads(_read_header(path)["metadata"])

    def _matched(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Pair each masked parameter with its mask, moved to the parameter's device."""
        self.validate_for(model)
        parameters = _parameters(model)
        for name, keep in self.items():
            yield name, parameters[name].detach(), keep.to(parameters[name].device)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of `model`, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _num_violations(parameter: Tensor, keep: Tensor) -> int:
    return int(((parameter != 0) & ~keep).sum())


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:NUM_NAMES_SHOWN])
    return shown + (f" and {len(names) - NUM_NAMES_SHOWN} more" if len(names) > NUM_NAMES_SHOWN else "")


def _pack(keep: Bool[Tensor, "..."]) -> UInt8[Tensor, "num_bytes"]:
    """Eight weights a byte, row-major, the first in the lowest bit; the last byte is filled with zeros."""
    bits = keep.flatten().cpu().to(torch.uint8)
    bits = nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: UInt8[Tensor, "num_bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().flatten()[: torch.Size(shape).numel()].view(shape)


def _read_header(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"`{path}` needs to be a mask file of recon, got no safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"`{path}` needs to be a mask file of recon (format {FORMAT}), got a safetensors file of another "
            f"kind (format {header.get('format')}); a pruned model's weights are no mask file"
        )
    return header

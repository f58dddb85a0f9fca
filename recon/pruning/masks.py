"""Masks: which weights survive, as one bool tensor per pruned parameter, True = kept.

A mask has its parameter's own layout and shape. In memory as on disk eight weights share a byte, so the masks of
a model of 7 billion weights take 0.9 GB. Reading a mask unpacks it; names, shapes, counts and violations come from the
packed bytes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recon.basics.digests import sha256_of
from recon.basics.files import Writer, atomic_write
from recon.distributed.parameters import copies, whole, whole_shape
from recon.models.matrices import Matrix
from recon.pruning.bits import bits_between, count_bits, pack, unpack
from recon.pruning.recorded_pattern import broken

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
        self._packed = {name: pack(keep) for name, keep in masks.items()}
        self._shapes = {name: tuple(keep.shape) for name, keep in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self._packed[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed  # that of `Mapping` would unpack the mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            self._shapes[name] == other._shapes[name] and torch.equal(self._packed[name], other._packed[name])
            for name in self
        )

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.num_pruned} weights pruned, sparsity {self.sparsity:.4f})"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter name -> shape of the mask."""
        return MappingProxyType(self._shapes)

    @property
    def num_pruned(self) -> int:
        """Number of weights pruned."""
        return sum(self._num_pruned(name) for name in self)

    @property
    def sparsity(self) -> float:
        """The fraction pruned among the weights of the masked parameters; 0 without any."""
        return self.num_pruned / max(1, sum(math.prod(shape) for shape in self._shapes.values()))

    @property
    def densities(self) -> dict[str, float]:
        """Parameter name -> the fraction of its weights that is kept."""
        return {name: 1 - self._num_pruned(name) / math.prod(shape) for name, shape in self._shapes.items()}

    def subset(self, names: Iterable[str]) -> "Masks":
        """Select the masks of `names`, in that order.

        Raises:
            ValueError: If a name has no mask.
        """
        names = list(names)
        if unknown := [name for name in names if name not in self]:
            raise ValueError(f"a subset needs names that have a mask, got {_few(unknown)} without one")
        return Masks.of_packed({name: self._packed[name] for name in names}, self._shapes)

    def add(self, others: "Masks") -> None:
        """Add the masks of further parameters, in place, for all holders of this object."""
        self._packed |= others._packed
        self._shapes |= others._shapes

    def remove(self, names: Iterable[str]) -> None:
        """Remove the masks of these parameters, in place, for all holders of this object."""
        for name in names:
            del self._packed[name], self._shapes[name]

    def packed(self, name: str) -> UInt8[Tensor, "num_bytes"]:
        """The mask of `name` as it is held, for `unpack`."""
        return self._packed[name]

    def on(self, device: torch.device, name: str) -> Bool[Tensor, "..."]:
        """The mask of `name` on a device: packed bytes are copied, an eighth of the mask's, and unpacked there."""
        return unpack(self._packed[name].to(device), self._shapes[name])

    def of(self, matrix: Matrix, device: torch.device) -> Bool[Tensor, "out in_"]:
        """The mask of one matrix on a device, out x in; that of a slice is unpacked without the others."""
        shape = self._shapes[matrix.parameter_name][-2:]
        return matrix.out_in(unpack(self._packed_of(matrix).to(device), shape))

    def num_pruned_of(self, matrix: Matrix) -> int:
        """Number of weights of one matrix that are pruned."""
        return math.prod(matrix.shape) - count_bits(self._packed_of(matrix))

    def _packed_of(self, matrix: Matrix) -> UInt8[Tensor, "num_bytes"]:
        packed, shape = self._packed[matrix.parameter_name], self._shapes[matrix.parameter_name]
        return packed if matrix.index is None else bits_between(packed, math.prod(shape[1:]), matrix.index)

    @staticmethod
    def of_packed(packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> "Masks":
        """Wrap masks that are packed already, without a copy.

        Args:
            packed: Parameter name -> bytes, as `packed` gives them.
            shapes: Parameter name -> shape; further names are ignored.
        """
        masks = Masks({})
        masks._packed, masks._shapes = dict(packed), {name: shapes[name] for name in packed}
        return masks

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zero the pruned weights of `model` in place, before FSDP2 shards it or DeepSpeed copies it."""
        for name, parameter in self._matched(model):
            with whole(parameter, write=True) as weight:
                weight.masked_fill_(~self.on(weight.device, name), 0)  # not `* keep`: inf * 0 is NaN

    def violations(self, model: nn.Module) -> int:
        """Count the weights that are pruned but not zero in one of their copies; NaN counts."""
        return sum(
            max(self.violations_of(name, copy) for _, copy in copies(parameter))
            for name, parameter in self._matched(model)
        )

    def violations_of(self, name: str, weight: Tensor) -> int:
        """Count the weights of one parameter that are pruned but not zero; NaN counts.

        The weight is packed, rather than the mask unpacked: a third of the time.

        Args:
            name: Of the parameter.
            weight: Its values, on any device.
        """
        return count_bits(pack(weight != 0) & ~self._packed[name])

    def violations_in(self, directory: Path) -> int:
        """Count violations in the safetensors files of `directory`, one parameter at a time.

        Raises:
            ValueError: If a masked parameter is in none of them.
        """
        count, missing = 0, set(self)
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in missing & set(file.keys()):
                    count += self.violations_of(name, file.get_tensor(name))
                    missing.discard(name)
        if missing:
            raise ValueError(
                f"a written model needs all masked parameters, {directory} lacks {_few(sorted(missing))}; its "
                f"architecture saves them under other names: load it and use `violations`"
            )
        return count

    def check(self, model: nn.Module) -> None:
        """Refuse a pruned weight that is not zero, in the working or in the fp32 master copy.

        Under a strategy that shards, every rank has to call it.

        Raises:
            ValueError: If there is one, with the name of its parameter.
        """
        for name, parameter in self._matched(model):
            for which, copy in copies(parameter):
                if count := self.violations_of(name, copy):
                    where = f"`{name}`" if which == "working copy" else f"the {which} of `{name}`"
                    raise ValueError(
                        f"pruned weights need to be zero, got {count} of {self._num_pruned(name)} in {where} that "
                        f"are not; apply the masks before training and keep the MaskEnforcer callback"
                    )

    def validate_for(self, model: nn.Module) -> None:
        """Refuse masks of another model.

        Raises:
            ValueError: If names are unknown or shapes differ.
        """
        parameters = _parameters(model)
        if unknown := [name for name in self if name not in parameters]:
            raise ValueError(
                f"masks need the names of the model's parameters, got {len(unknown)} of {len(self)} that it "
                f"does not have ({_few(unknown)}; it has {_few(list(parameters))}); use the masks made from "
                "this model, or prune it again"
            )
        if other := [name for name in self if self._shapes[name] != whole_shape(parameters[name])]:
            shown = ", ".join(
                f"`{name}`: mask {self._shapes[name]}, parameter {tuple(whole_shape(parameters[name]))}"
                for name in other[:NUM_NAMES_SHOWN]
            )
            raise ValueError(
                f"masks need the shapes of the model's parameters, got {len(other)} of {len(self)} that "
                f"differ ({shown}); use the masks made from this model, or prune it again"
            )

    def fingerprint(self) -> str:
        """The SHA-256, in hex, of names, shapes and bits; the order of the names does not count."""
        return _fingerprint(self._shapes, self._packed.__getitem__)

    def save(self, path: str | Path, metadata: dict[str, str] | None = None, writing: Writer = atomic_write) -> None:
        """Write all masks to one bit-packed safetensors file, atomically.

        Args:
            path: The file; its directory is made if missing.
            metadata: What the masks were made from, for `read_metadata`.
            writing: Opens the file; `Manifest.writing` records it, too.

        Raises:
            OSError: If the file cannot be written; an older file at `path` is then untouched.
        """
        header = {
            "format": FORMAT,
            "shapes": json.dumps(self._shapes),
            "metadata": json.dumps(metadata or {}),
        }
        with writing(Path(path)) as temporary:
            save_file(self._packed, temporary, header)

    @staticmethod
    def load(path: str | Path) -> "Masks":
        """Read the masks that `save` wrote, to the CPU.

        Raises:
            ValueError: If `path` is not such a file, or the masks do not keep to the pattern that it records.
        """
        shapes = _shapes(_json_of(path, "shapes"), path)
        with safe_open(path, framework="pt") as file:
            if differing := sorted(shapes.keys() ^ set(file.keys())):
                raise ValueError(_damaged(path, f"`{differing[0]}` only as a shape or only as a mask"))
            packed = {name: _read_bits(file, name, shapes[name], path) for name in shapes}
        masks = Masks.of_packed(packed, shapes)
        masks._require_recorded(path, Masks.read_metadata(path))
        return masks

    @staticmethod
    def read_metadata(path: str | Path) -> dict[str, str]:
        """Read what `save` received as metadata, without reading the masks.

        Raises:
            ValueError: If `path` is not such a file.
        """
        metadata = _json_of(path, "metadata")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(_damaged(path, "metadata that are no texts"))
        return metadata

    def _require_recorded(self, path: str | Path, made_by: Mapping[str, str]) -> None:
        try:
            found = broken(made_by, self._packed, self._shapes)
        except ValueError as error:
            found = str(error)
        if found is not None:
            raise ValueError(
                f"masks need to keep to the pattern that their file records, {made_by.get('pattern')}, got `{path}`, "
                f"which keeps {found}; copy it again from where it was made, or prune again"
            )

    def _num_pruned(self, name: str) -> int:
        return math.prod(self._shapes[name]) - count_bits(self._packed[name])

    def _matched(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The masked parameters with their names, after the check that there are no others."""
        self.validate_for(model)
        parameters = _parameters(model)
        for name in self:
            yield name, parameters[name]


def identity_of(path: Path) -> str:
    """The `Masks.fingerprint` of the masks in a file: the order of a header's entries differs whenever it is written.

    That of its bytes if it is no mask file, which is refused when the masks are needed. One mask is read at a time.
    """
    try:
        shapes = _shapes(_json_of(path, "shapes"), path)
        with safe_open(path, framework="pt") as file:
            return _fingerprint(shapes, lambda name: _read_bits(file, name, shapes[name], path))
    except (ValueError, SafetensorError):
        return sha256_of(path)


def _fingerprint(shapes: Mapping[str, tuple[int, ...]], packed: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(json.dumps([name, list(shapes[name])]).encode())
        digest.update(packed(name).numpy().data)
    return digest.hexdigest()


def _read_bits(file: Any, name: str, shape: tuple[int, ...], path: str | Path) -> UInt8[Tensor, "num_bytes"]:
    """Read one mask, bit-packed, from an open file."""
    mask, num_bytes = file.get_tensor(name), -(-math.prod(shape) // 8)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (num_bytes,):
        got = f"{list(mask.shape)} of {mask.dtype} for `{name}` {list(shape)}, not [{num_bytes}] of uint8"
        raise ValueError(_damaged(path, got))
    return mask


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of `model`, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:NUM_NAMES_SHOWN])
    return shown + (f" and {len(names) - NUM_NAMES_SHOWN} more" if len(names) > NUM_NAMES_SHOWN else "")


def _read_header(path: str | Path) -> dict[str, str]:
    if Path(path).is_dir():
        raise ValueError(
            f"`{path}` needs to be a mask file of recon, got a directory; name the .safetensors file in it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"`{path}` needs to be a mask file of recon, got no safetensors file, or a truncated one ({error}); name "
            f"the masks.safetensors that `recon prune` wrote, or prune again"
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"`{path}` needs to be a mask file of recon (format {FORMAT}), got a safetensors file of another "
            f"kind (format {header.get('format')}); a pruned model's weights are no mask file"
        )
    return header


def _json_of(path: str | Path, name: str) -> dict[str, Any]:
    """A part of the header that is a JSON object."""
    header = _read_header(path)
    try:
        content = json.loads(header[name])
    except (KeyError, ValueError) as error:
        reason = f"no {name}" if isinstance(error, KeyError) else f"{name} that cannot be read ({error})"
        raise ValueError(_damaged(path, reason)) from error
    if not isinstance(content, dict):
        raise ValueError(_damaged(path, f"{name} that map no names"))
    return content


def _shapes(content: dict[str, Any], path: str | Path) -> dict[str, tuple[int, ...]]:
    for name, shape in content.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(_damaged(path, f"the shape {shape!r} for `{name}`"))
    return {name: tuple(shape) for name, shape in content.items()}


def _damaged(path: str | Path, got: str) -> str:
    return (
        f"`{path}` needs to be a whole mask file of recon, got {got}: it is damaged, or made by another version of "
        f"recon; use that version, or prune again"
    )

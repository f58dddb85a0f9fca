"""Masks: which weights survive, as one bool tensor per pruned parameter, True = kept.

A mask has its parameter's own layout and shape. In memory as on disk eight weights share a byte, so the masks of
a model of 7 billion weights take 0.9 GB; a mask is unpacked when it is asked for.
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

from recon.basics.files import atomic_write
from recon.distributed.parameters import copies, whole, whole_shape

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
        self._packed = {name: _pack(keep) for name, keep in masks.items()}
        self._shapes = {name: tuple(keep.shape) for name, keep in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self._packed[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

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
        return Masks._of({name: self._packed[name] for name in names}, self._shapes)

    def add(self, others: "Masks") -> None:
        """Take in the masks of further parameters, in place: who holds these masks sees them."""
        self._packed |= others._packed
        self._shapes |= others._shapes

    def packed(self, name: str) -> UInt8[Tensor, "num_bytes"]:
        """The mask of `name` as it is held, for `unpack`."""
        return self._packed[name]

    @staticmethod
    def _of(packed: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> "Masks":
        masks = Masks({})
        masks._packed, masks._shapes = packed, {name: shapes[name] for name in packed}
        return masks

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zero the pruned weights of `model` in place, before FSDP2 shards it or DeepSpeed copies it."""
        for _, parameter, keep in self._matched(model):
            with whole(parameter, write=True) as weight:
                weight.masked_fill_(~keep.to(weight.device), 0)  # not `* keep`: inf * 0 is NaN

    def violations(self, model: nn.Module) -> int:
        """Number of weights that are pruned but not zero in one of their copies; NaN counts."""
        return sum(
            max(_num_violations(copy, keep) for _, copy in copies(parameter))
            for _, parameter, keep in self._matched(model)
        )

    def violations_in(self, directory: Path) -> int:
        """As `violations`, of the weights in the safetensors files of `directory`, one parameter at a time.

        Raises:
            ValueError: If a masked parameter is in none of them.
        """
        count, missing = 0, set(self)
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in missing & set(file.keys()):
                    count += _num_violations(file.get_tensor(name), self[name])
                    missing.discard(name)
        if missing:
            raise ValueError(
                f"a written model needs all masked parameters, {directory} lacks {_few(sorted(missing))}; its "
                f"architecture saves them under other names: load it and use `violations`"
            )
        return count

    def check(self, model: nn.Module) -> None:
        """Raise a `ValueError` that names the first parameter with a pruned weight that is not zero.

        Under a strategy that shards, every rank has to call it; it looks at the working and the fp32 master copy.
        """
        for name, parameter, keep in self._matched(model):
            for which, copy in copies(parameter):
                if count := _num_violations(copy, keep):
                    where = f"`{name}`" if which == "working copy" else f"the {which} of `{name}`"
                    raise ValueError(
                        f"pruned weights need to be zero, got {count} of {int((~keep).sum())} in {where} that "
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
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(json.dumps([name, list(self._shapes[name])]).encode())
            digest.update(bytes(self._packed[name].numpy().data))
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
            "shapes": json.dumps(self._shapes),
            "metadata": json.dumps(metadata or {}),
        }
        with atomic_write(path) as temporary:
            save_file(self._packed, temporary, header)

    @staticmethod
    def load(path: str | Path) -> "Masks":
        """Read the masks that `save` wrote, to the CPU.

        Raises:
            ValueError: If `path` is not such a file.
        """
        shapes = json.loads(_read_header(path)["shapes"])
        with safe_open(path, framework="pt") as file:
            return Masks._of(
                {name: file.get_tensor(name) for name in shapes}, {name: tuple(shape) for name, shape in shapes.items()}
            )

    @staticmethod
    def read_metadata(path: str | Path) -> dict[str, str]:
        """Read what `save` received as metadata, without reading the masks."""
        return json.loads(_read_header(path)["metadata"])

    def _matched(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Pair each masked parameter with its mask."""
        self.validate_for(model)
        parameters = _parameters(model)
        for name, keep in self.items():
            yield name, parameters[name], keep


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of `model`, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _num_violations(weight: Tensor, keep: Tensor) -> int:
    return int(((weight != 0) & ~keep.to(weight.device)).sum())


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:NUM_NAMES_SHOWN])
    return shown + (f" and {len(names) - NUM_NAMES_SHOWN} more" if len(names) > NUM_NAMES_SHOWN else "")


def _pack(keep: Bool[Tensor, "..."]) -> UInt8[Tensor, "num_bytes"]:
    """Eight weights a byte, row-major, the first in the lowest bit; the last byte is filled with zeros."""
    bits = keep.flatten().cpu().to(torch.uint8)
    bits = nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "num_bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
    """The mask that `packed` holds, on its device."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.bool().flatten()[: torch.Size(shape).numel()].view(shape)


def _read_header(path: str | Path) -> dict[str, str]:
    if Path(path).is_dir():
        raise ValueError(
            f"`{path}` needs to be a mask file of recon, got a directory; name the .safetensors file in it"
        )
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

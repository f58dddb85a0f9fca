"""The directory of a run: what makes it comparable, what it wrote, how a second start goes on."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.basics.files import write_json
from recon.distributed.part import Share
from recon.profiling.phases import memory_file

PRODUCTS = ("masks.safetensors", "masks", "windows", "checkpoints", "report.json")
"""What a run leaves that another run must not take for its own; one that failed before is no obstacle."""


def digest(content: Any) -> str:
    """Sha256 of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class RunDirectory:
    """Paths of a run, and the check that the directory holds this run and no other.

    Args:
        path: The directory; made if it is missing.
        fingerprint: Model, data, masks, options, versions and seed: what makes two runs comparable. None on
            ranks other than 0, which leave this check to it.

    Raises:
        ValueError: If the directory holds a run with another fingerprint.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any] | None) -> None:
        self.path = path
        if fingerprint is None:
            return
        self.fingerprint = json.loads(json.dumps(fingerprint, default=str))
        file = path / "fingerprint.json"
        if file.exists() and any((path / product).exists() for product in PRODUCTS):
            held = json.loads(file.read_text())
            if held != self.fingerprint:
                raise ValueError(
                    f"run_dir needs a new directory or one of this very run, got {path}, whose run differs in "
                    f"{', '.join(_differences(held, self.fingerprint))}; name another run_dir or delete this one"
                )
        else:
            write_json(file, self.fingerprint)

    @property
    def masks(self) -> Path:
        """The bit-packed masks."""
        return self.path / "masks.safetensors"

    @property
    def has_begun(self) -> bool:
        """Whether an earlier start left parts of a recovery."""
        return (self.path / "windows").exists() or self.checkpoints.exists()

    @property
    def model(self) -> Path:
        """The recovered model in Hugging Face format."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The report of the finished run."""
        return self.path / "report.json"

    def memory(self, rank: int = 0, share: Share | None = None) -> dict[str, Any] | None:
        """What MemoryProfiler measured on a rank, or in the job of a share; None if it did not."""
        file = (self.path if share is None else self.part(share)) / memory_file(rank)
        return json.loads(file.read_text()) if file.exists() else None

    def part(self, share: Share) -> Path:
        """Where a job that recovers a share of the windows leaves what it measured."""
        return self.path / "parts" / f"{share.index + 1:03d}-of-{share.of:03d}"

    def write_part(self, share: Share, measured: dict[str, Any]) -> None:
        """Note what the job of a share measured."""
        write_json(self.part(share) / "part.json", measured)

    def parts(self) -> list[dict[str, Any]]:
        """What the jobs measured, in the order of shares; empty if none was divided."""
        return [json.loads(file.read_text()) for file in sorted((self.path / "parts").glob("*/part.json"))]

    @property
    def checkpoints(self) -> Path:
        """Where full retraining saves what it needs to go on."""
        return self.path / "checkpoints"


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two nested dicts."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [prefix.removesuffix(".")]
    keys = sorted(ours.keys() | theirs.keys())
    return [name for key in keys for name in _differences(ours.get(key), theirs.get(key), f"{prefix}{key}.")]


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer as a plain Hugging Face directory that is whole or absent.

    Args:
        model: What to write.
        tokenizer: Written beside it.
        path: The directory.
        state: The weights, if `model` is without.

    Raises:
        OSError: If it cannot be written, naming `path`; nothing of it is kept then.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"could not write the model to {path}, nothing of it was kept ({error}); free space there"
        ) from error

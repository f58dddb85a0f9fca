"""Loading models and tokenizers: bundled, from a directory, from the hub, or random of a given shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recon.seeds import isolated_seed

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class ModelSource:
    """Which model, from where, in which precision.

    Args:
        name: `bundled`, a directory in Hugging Face format, a name on the hub, or `random`.
        shape: For `random`: the model's configuration, `model_type` included.
        dtype: Precision of the weights: float32, bfloat16, float16, or `auto` for the stored one.
        revision: Commit, tag or branch of a hub model.
        tokenizer: Where the tokenizer is, if not with the model; for `random` the bundled one by default.
        trust_remote_code: Run code that comes with the model. Off, because it can do anything.
        seed: Decides the weights of a `random` model.
    """

    name: str = "bundled"
    shape: dict[str, Any] | None = None
    dtype: str = "float32"
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise ValueError(f"model.dtype must be float32, bfloat16, float16 or auto, got {self.dtype!r}")
        if (self.name == "random") != (self.shape is not None):
            raise ValueError("model.shape belongs to model.name: random, and to it only")

    def model(self, device: torch.device | None = None) -> PreTrainedModel:
        """Load (or make) the model in evaluation mode, without a cache, on `device` (the CPU if None).

        Raises:
            ValueError: If there is no such model, with what was tried.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.shape is not None:
            shape = dict(self.shape)
            config = AutoConfig.for_model(shape.pop("model_type"), **shape)
            with isolated_seed(self.seed):
                model = AutoModelForCausalLM.from_config(config)
            if dtype != "auto":
                model = model.to(dtype)
        else:
            model = self._load(AutoModelForCausalLM, self.name, dtype=dtype)
        model.config.use_cache = False
        if device is not None:
            nn.Module.to(model, device)
        return model.eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            ValueError: If there is none, with what was tried.
        """
        return self._load(AutoTokenizer, self.tokenizer or ("bundled" if self.shape else self.name))

    def identity(self) -> dict[str, Any]:
        """What identifies the weights: a digest of local files, a hub name with its revision, or a shape."""
        if self.shape is not None:
            return {"shape": self.shape, "seed": self.seed, "dtype": self.dtype}
        path = _directory(self.name)
        if path is None:
            return {"name": self.name, "revision": self.revision or "main", "dtype": self.dtype}
        return {"files": directory_digest(path), "dtype": self.dtype}

    def _load(self, auto: Any, name: str, **options: Any) -> Any:
        path = _directory(name)
        if path is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise ValueError(f"model.name needs a directory, got {name}, which does not exist")
        try:
            return auto.from_pretrained(
                path or name,
                revision=self.revision or "main",
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except (OSError, ValueError, json.JSONDecodeError) as error:
            where = f"the directory {path}" if path else f"the Hugging Face hub under the name {name!r}"
            raise ValueError(
                f"model.name needs `bundled`, a directory in Hugging Face format or a hub name; "
                f"{where} could not be read as {auto.__name__}: {error}"
            ) from error


def _directory(name: str) -> Path | None:
    path = BUNDLED if name == "bundled" else Path(name).expanduser()
    return path if path.is_dir() else None


def directory_digest(path: Path) -> str:
    """Sha256 over names and contents of the files that make up a model directory."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(path.glob("*")):
        if file.suffix in (".safetensors", ".json", ".bin", ".model") and file.name != "card.json":
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()

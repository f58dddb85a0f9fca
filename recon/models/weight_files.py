"""The weight files of a model directory, checked before anything is loaded from them.

A model that recon cannot prune is told by its files or configuration, and refused by name: adapters, GGUF, pickles,
quantised weights, encoder-decoders. An index may come from anywhere, so the files in it have to lie in the directory.
"""

import hashlib
import json
from pathlib import Path
from textwrap import shorten

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from recon.basics.digests import sha256_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of a model in one file, and the index of one in several; with both, the first is read."""

WHOLE_NUMBERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
FLOATS = {"F16", "BF16", "F32", "F64"}


def require_format(directory: Path, option: str) -> None:
    """Refuse a directory with another kind of model than Hugging Face's, with safetensors files.

    Args:
        directory: Where the model is.
        option: The option that names it, for the message.

    Raises:
        ValueError: If it holds an adapter, GGUF files, or pickles only.
    """
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{option} needs a whole model, got {directory}, an adapter (adapter_config.json); merge it into its base "
            f"with peft: AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(new)"
        )
    if list(directory.glob("*.safetensors")):
        return
    if found := sorted(directory.glob("*.gguf")):
        raise ValueError(f"{option} needs safetensors files, got {found[0]}, a GGUF file; {_FROM_GGUF}")
    if found := sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]):
        raise ValueError(
            f"{option} needs safetensors files, got {found[0]}, a pickle, which can run code when it is loaded; if you "
            f"trust it, convert it: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )


def refuse_gguf(file: Path, option: str) -> None:
    """Say what to do with a GGUF file in place of a model directory.

    Raises:
        ValueError: If it is one.
    """
    if file.suffix.lower() == ".gguf":
        raise ValueError(f"{option} needs a model directory with safetensors files, got {file}; {_FROM_GGUF}")


_FROM_GGUF = (
    "take the model it was made from, or dequantise it: "
    "AutoModelForCausalLM.from_pretrained(directory, gguf_file=name).save_pretrained(new)"
)


def require_prunable(config: PreTrainedConfig, name: str | Path, option: str) -> None:
    """Refuse a model by its configuration.

    Raises:
        ValueError: If its weights are quantised, or it is an encoder-decoder.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ValueError(
            f"{option} needs floating-point weights, got {name}, quantised ({method or 'method not named'}); take the "
            f"model it was made from, or write it dequantised: model.dequantize().save_pretrained(new)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{option} needs a decoder-only causal language model, got {name}, an encoder-decoder "
            f"(model_type {config.model_type}); choose another model"
        )


def weight_places(directory: Path, option: str) -> dict[str, Path]:
    """Map the name of each stored tensor to its safetensors file; empty if the directory has no such files.

    Only headers are read.

    Args:
        directory: Where the model is.
        option: The option that names it, for messages.

    Raises:
        ValueError: If the index is damaged, a file is missing, lies elsewhere, is truncated, lacks a tensor or holds
            quantised ones.
    """
    if (directory / SINGLE).exists() or (directory / SINGLE).is_symlink():
        path = _inside(directory, SINGLE, SINGLE, option)
        return dict.fromkeys(_tensors(path, option), path)
    if not (directory / INDEX).exists():
        return {}
    places = _index(directory / INDEX, option)
    files = {name: _inside(directory, name, INDEX, option) for name in sorted(set(places.values()))}
    stored = {name: _tensors(path, option) for name, path in files.items()}
    for tensor, name in places.items():
        if tensor not in stored[name]:
            raise ValueError(
                f"{option} needs the tensors of its index, got {files[name]}, which lacks {tensor} though "
                f"{directory / INDEX} places it there; copy the model again"
            )
    return {tensor: files[name] for tensor, name in places.items()}


def _index(file: Path, option: str) -> dict[str, str]:
    try:
        places = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise TypeError("weight_map maps no names to names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "no weight_map" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{option} needs an index with a weight_map from tensors to files, got {file}: {reason}; copy the model "
            f"again"
        ) from error
    return places


def _inside(directory: Path, name: str, named_in: str, option: str) -> Path:
    """The file `name`, which must be there and lie in `directory`, or in the cache whose snapshot that is."""
    path, root = directory / name, directory.resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if ".." in Path(name).parts or not any(path.resolve().is_relative_to(one) for one in roots):
        raise ValueError(
            f"{option} needs weights within {directory}, got {name} in {named_in}, which lies at {path.resolve()}; if "
            f"you trust it, copy the file into the directory"
        )
    if not path.is_file():
        raise ValueError(f"{option} needs all files in {directory / named_in}, got no {path}; copy the model again")
    return path


def _tensors(file: Path, option: str) -> set[str]:
    """Names of the tensors in a safetensors file, as its header has them."""
    try:
        with safe_open(file, framework="pt") as opened:
            dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{option} needs whole safetensors files, got {file}, truncated or damaged ({shorten(f'{error}', 200)}); "
            f"copy the model again"
        ) from error
    for key, dtype in dtypes.items():
        if dtype not in FLOATS | WHOLE_NUMBERS | {"BOOL"} or (dtype in WHOLE_NUMBERS and key.endswith(".weight")):
            raise ValueError(
                f"{option} needs weights in {', '.join(sorted(FLOATS))}, got {dtype} for {key} in {file}: quantised "
                f"weights; take the model they were made from, or write them dequantised"
            )
    return set(dtypes)


def directory_digest(path: Path) -> str:
    """Sha256 over names and contents of the files that make up a model directory."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")):
        if file.suffix in (".safetensors", ".json", ".jinja", ".bin", ".model") and file.name != "card.json":
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()

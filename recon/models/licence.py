"""The licence of a model, by its card or its configuration on this machine; no network is asked."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from recon.models.loading import BUNDLED

KEYS = ("license", "license_name", "license_link")


def licence_of(name: str, revision: str | None = None) -> dict[str, str]:
    """Find the licence of a model as its metadata have it.

    Args:
        name: `bundled`, a directory, or a name on the hub.
        revision: Of a hub model.

    Returns:
        `license`, `license_name` and `license_link`, as far as they are given; empty if no file names a licence.
    """
    for file, read in (("README.md", metadata_load), ("config.json", _json)):
        path = _local(name, file, revision)
        try:
            content = read(path) if path is not None and path.is_file() else None
        except (OSError, ValueError, yaml.YAMLError):  # a file of somebody else's, which nothing else is read from
            continue
        if isinstance(content, dict) and isinstance(content.get("license"), str):
            return {key: content[key] for key in KEYS if isinstance(content.get(key), str)}
    return {}


def _local(name: str, file: str, revision: str | None) -> Path | None:
    directory = BUNDLED if name == "bundled" else Path(name)
    if directory.is_dir():
        return directory / file
    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no name of the hub's: a directory that is gone, or a random model
        return None
    return Path(cached) if isinstance(cached, str) else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

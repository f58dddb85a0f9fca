"""Recovered windows in the run directory, from which a restarted run, and other processes, take them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recon.basics.files import atomic_write
from recon.models.windows import Window


@dataclass(frozen=True)
class WindowFiles:
    """One file for each finished window; it appears whole or not at all.

    Args:
        directory: Where they are; nothing is written, and nothing is there, if None.
    """

    directory: Path | None = None

    def path(self, window: Window) -> Path:
        """Where `window` is, or will be."""
        assert self.directory is not None
        return self.directory / f"{window.name}.safetensors"

    def __contains__(self, window: Window) -> bool:
        return self.directory is not None and self.path(window).exists()

    def write(self, window: Window, weights: dict[str, Tensor], result: dict[str, Any]) -> None:
        """Keep recovered weights, and what else came of recovery, which must be JSON."""
        if self.directory is not None:
            with atomic_write(self.path(window)) as temporary:
                save_file(weights, temporary, {"result": json.dumps(result)})

    @contextmanager
    def read(self, window: Window) -> Iterator[tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]]:
        """The weights of a window, read one at a time, and its result."""
        with safe_open(self.path(window), framework="pt") as file:
            yield ((name, file.get_tensor(name)) for name in window.owned), json.loads(file.metadata()["result"])

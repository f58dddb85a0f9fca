"""Recovered windows in the run directory, from which a restarted run, and other processes, load them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from recon.basics.manifest import Manifest
from recon.models.offload.disk_weights import DiskWeights
from recon.models.windows import Window

RESULT = ("before", "after", "tokens", "seconds")
"""Results that the file of a window needs to have."""


@dataclass(frozen=True)
class WindowFiles:
    """One file for each finished window; it appears whole or not at all, and is recorded in the run's manifest.

    A file that is not recorded, or not as it was written, counts as none: its window is recovered again.

    Args:
        directory: Directory of the files; nothing is written or found if None.
        disk_weights: Weights of a model on disk, which are read from these files once a window is there.
    """

    directory: Path | None = None
    disk_weights: DiskWeights | None = None

    def path(self, window: Window) -> Path:
        """Return the path of the file of `window`, written or not."""
        assert self.directory is not None
        return self.directory / f"{window.name}.safetensors"

    def __contains__(self, window: Window) -> bool:
        return self.directory is not None and self._manifest.is_intact(self.path(window))

    def keep(self, window: Window, model: nn.Module, result: dict[str, Any]) -> dict[str, Any]:
        """Write a window as `write` does, or load it as `load` does if another process has written it meanwhile.

        Returns:
            The other results of the weights that `model` has in the end.
        """
        if window in self:
            return self.load(window, model)
        self.write(window, model, result)
        return result

    def write(self, window: Window, model: nn.Module, result: dict[str, Any]) -> None:
        """Write the recovered weights of `window` in `model`, and other results, which must be JSON."""
        if self.directory is None:
            return
        weights = {name: model.get_parameter(name).detach().cpu().contiguous() for name in window.owned}
        with self._manifest.writing(self.path(window)) as temporary:
            save_file(weights, temporary, {"result": json.dumps(result)})
        self._redirect(window)

    def result(self, window: Window) -> dict[str, Any]:
        """Return the results that were written with the weights of `window`.

        Raises:
            ValueError: If the file is damaged, or of a version with other results.
        """
        path = self.path(window)
        try:
            with safe_open(path, framework="pt") as file:
                result = json.loads((file.metadata() or {})["result"])
            if missing := [name for name in RESULT if name not in result]:
                raise KeyError(missing[0])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"a recovered window needs a file with {', '.join(RESULT)}, got {path} ({reason}), damaged or made by "
                f"another version of recon; delete it to recover the window again, or use that version"
            ) from error
        return result

    @torch.no_grad()
    def load(self, window: Window, model: nn.Module) -> dict[str, Any]:
        """Load the recovered weights of `window` into `model`, one at a time, and return the other results.

        Raises:
            ValueError: If the file is damaged, or of another model.
        """
        result, path = self.result(window), self.path(window)
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 -- no mapping
            for name in window.owned:
                parameter = model.get_parameter(name)
                if stored.get(name) != list(parameter.shape):
                    raise ValueError(
                        f"a recovered window needs the weights of the model, got {stored.get(name)} for {name} "
                        f"{list(parameter.shape)} in {path}; delete it to recover the window again"
                    )
                parameter.copy_(file.get_tensor(name))
        self._redirect(window)
        return result

    @property
    def _manifest(self) -> Manifest:
        assert self.directory is not None
        return Manifest(self.directory.parent)

    def _redirect(self, window: Window) -> None:
        if self.disk_weights is not None:
            self.disk_weights.redirect(window.owned, self.path(window))

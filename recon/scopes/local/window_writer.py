"""Writing finished windows while the device goes on with the next."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from recon.models.offload.transfers import copies_on_host
from recon.models.windows import Window
from recon.scopes.local.window_files import WindowFiles


class WindowWriter:
    """Writes windows from a thread, one at a time, out of copies on the host.

    Weights in the host's memory are written at once: there is no device to keep busy, and no second copy to pay for.
    So are those that are read from disk: the next read needs the file.

    Args:
        files: Writes and finds the windows.
    """

    def __init__(self, files: WindowFiles) -> None:
        self.files = files
        self._thread = ThreadPoolExecutor(1, "recon-windows")
        self._pending: Future[None] | None = None

    def keep(self, window: Window, model: nn.Module, result: dict[str, Any]) -> dict[str, Any]:
        """As `WindowFiles.keep`; returns as soon as the weights may change again.

        Raises:
            OSError: If the window before this one could not be written.
        """
        self.wait()
        weights = {name: model.get_parameter(name).detach() for name in window.owned}
        on_device = [weight for weight in weights.values() if weight.device.type != "cpu"]
        if window in self.files or not on_device or self.files.directory is None or self.files.disk_weights is not None:
            return self.files.keep(window, model, result)
        copies = dict(zip(weights, copies_on_host(list(weights.values()), on_device[0].device), strict=True))
        self._pending = self._thread.submit(self.files.write, window, _Weights(copies), result)
        return result

    def wait(self) -> None:
        """Wait until the last window is written.

        Raises:
            OSError: If it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class _Weights(nn.Module):
    """Weights by name, in place of the model that had them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a weight under its name in the model."""
        return nn.Parameter(self._weights[target], requires_grad=False)

"""Several processes that each recover windows of their own, with nothing sent between them meanwhile."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from typing_extensions import override

from recon.distributed.ranks import patient_group, size


class WindowParallelStrategy(DDPStrategy):
    """Starts and connects processes as DDP does, and lets each of them train by itself.

    With dense inputs windows do not depend on each other. Every process holds the model, or one window of it at a time
    if it is offloaded, and goes through its own share of the windows; no gradient is reduced. Shares may differ in
    size, and a process may have none: so nothing that Lightning does within a fit may wait for the other processes. It
    broadcasts before every batch whether to stop, and refuses training steps without a loss, where a trainer has
    several processes; to the trainer each is therefore the only one. Processes meet again in `wait`.
    """

    strategy_name = "window_parallel"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._group: dist.ProcessGroup | None = None

    @property
    @override
    def world_size(self) -> int:
        """One, to the trainer; `num_processes` times `num_nodes` were started."""
        return 1

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._group is None and size() > 1:  # before the fit, for who dies in it would be waited for in vain
            self._group = patient_group()

    def wait(self) -> None:
        """Until all processes come here.

        Raises:
            ConnectionError: If one of them has ended before.
        """
        if self._group is None:
            return
        try:
            dist.barrier(self._group)
        except RuntimeError as error:
            raise ConnectionError(
                "window_parallel needs all processes until every window is recovered, one of them has ended before; "
                "see what it said, and start the run again: it goes on with the windows that are missing"
            ) from error

    @override
    def configure_ddp(self) -> None:
        """Nothing: the module trains as it is."""

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: other processes may be in other windows, or done."""

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What this process has."""
        return obj

    @override
    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """What this process has."""
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """What this process has."""
        return tensor


StrategyRegistry.register(
    WindowParallelStrategy.strategy_name, WindowParallelStrategy, description="Each process recovers its own windows"
)

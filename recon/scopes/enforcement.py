"""Pruned weights stay exactly zero while the others learn, whichever strategy shards them."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from recon.pruning.bits import unpack
from recon.pruning.masks import Masks

ZERO_KEEPING = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RMSprop,
    torch.optim.Adafactor,
)
"""Optimizers for which zero weight, gradient and state stay zero, weight decay included."""


class MaskEnforcer(Callback):
    """Masks the gradients of pruned weights, which start at zero; no step then moves them.

    Every scope attaches one by `configure_callbacks`, whatever callbacks a trainer has. Configurations may name it,
    too: a trainer that has one gets no second.

    With weight, gradient and optimizer state zero from the first step, SGD, Adam(W), NAdam, RMSprop and
    Adafactor keep exact zeros, and so does the fp32 master copy that DeepSpeed trains. Zeroing the weights after
    each step would leave that copy to drift.

    A hook on the gradient masks it before it is reduced: on one device, under DDP and under ZeRO, where it is
    whole at that moment even if the weights are partitioned. FSDP2 never calls such hooks; there the accumulated
    gradient is masked, shard by shard.

    Checks the masks that hold when training starts and when it ends, in working and master copies, on all ranks,
    and names the first weight that violates one.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._unpacked: list[tuple[Tensor, dict[torch.device, Tensor]]] = []  # of each hook, with its parameter

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scope = _scope(pl_module)
        if scope.automatic_optimization:
            _require_zero_keeping(trainer.optimizers)
        self._detach()  # callback state is restored after this hook under DeepSpeed and FSDP2: attach once only
        parameters = dict(scope.model.named_parameters(remove_duplicate=False))
        for name in scope.maskable:
            parameter = parameters[name]
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)  # a hook is accepted only then; local scopes unfreeze later
            self._unpacked.append((parameter, {}))
            self._handles.append(_attach(parameter, scope.masks, name, self._unpacked[-1][1]))
            parameter.requires_grad_(not frozen)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scope = _scope(pl_module)
        scope.check(scope.enforced())

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameter, unpacked in self._unpacked:
            if not parameter.requires_grad:  # those of finished windows would fill the device
                unpacked.clear()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scope = _scope(pl_module)
        scope.check(scope.enforced())

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._detach()

    def forget(self) -> None:
        """Drop the unpacked masks; the next gradient unpacks them again."""
        for _, unpacked in self._unpacked:
            unpacked.clear()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._unpacked.clear()


def _scope(module: L.LightningModule) -> Any:
    """`module` as a `Scope`; the module of that class imports this one."""
    if not hasattr(module, "enforced"):
        raise ValueError(f"MaskEnforcer needs one of recon's scopes, got {type(module).__name__}")
    return module


def require_zero_keeping(kind: type) -> None:
    """Refuse a class of optimizers that moves weights whose gradient is zero.

    Raises:
        ValueError: Naming `kind`, and the classes that keep zeros.
    """
    if not issubclass(kind, ZERO_KEEPING):
        raise ValueError(
            f"masks need an optimizer that keeps zeros at zero "
            f"({', '.join(one.__name__ for one in ZERO_KEEPING)}), got {kind.__name__}"
        )


def _require_zero_keeping(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        while hasattr(optimizer, "optimizer"):  # DeepSpeed's, around the one that steps
            optimizer = optimizer.optimizer
        require_zero_keeping(type(optimizer))


def _attach(parameter: Tensor, masks: Masks, name: str, unpacked: dict[torch.device, Tensor]) -> RemovableHandle:
    """The hook that masks the gradient of `parameter`, as its strategy needs it; it keeps the mask in `unpacked`."""
    if isinstance(parameter, DTensor):
        keep = distribute_tensor(masks.on(parameter.device, name), parameter.device_mesh, parameter.placements)
        pruned = ~keep.to_local()

        def mask_shard(parameter: Tensor) -> None:
            assert isinstance(parameter.grad, DTensor)
            parameter.grad.to_local().masked_fill_(pruned, 0)

        return parameter.register_post_accumulate_grad_hook(mask_shard)
    if hasattr(parameter, "ds_id"):  # partitioned weights: whole masks of eight times the size would outweigh them
        shape = masks.shapes[name]
        packed = lambda device: masks.packed(name).to(device)  # noqa: E731
        return parameter.register_hook(_masking(packed, lambda bits: unpack(bits, shape), unpacked))
    return parameter.register_hook(_masking(lambda device: masks.on(device, name), lambda keep: keep, unpacked))


def _masking(
    mask: Callable[[torch.device], Tensor], to_bool: Callable[[Tensor], Tensor], on_device: dict[torch.device, Tensor]
) -> Callable[[Tensor], Tensor]:
    """A gradient hook; the mask is asked for at its first call, when it is there even if recovery chooses it."""

    def hook(gradient: Tensor) -> Tensor:
        if gradient.device not in on_device:
            on_device[gradient.device] = mask(gradient.device)
        return torch.where(to_bool(on_device[gradient.device]), gradient, 0)  # not a product: inf * 0 is nan

    return hook

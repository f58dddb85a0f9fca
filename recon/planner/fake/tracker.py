"""Live bytes and FLOPs of tensors, real or fake, operator by operator.

Every storage that an operator returns counts until it is freed, views once; categories are labels of storages. Older
tensors do not count, nor does a kernel's own memory.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 -- registers its operators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from recon.basics.trees import tensors_in

OTHER = "other"

aten, grouped = torch.ops.aten, torch.ops.transformers


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of attention forward; its formula in torch 2.11 refuses keys and values that groups of heads share."""
    return sdpa_flop_count(query.shape, *(_for_each_head(one, query) for one in (key, value)))


def attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of attention backward."""
    return sdpa_backward_flop_count(grad.shape, query.shape, *(_for_each_head(one, query) for one in (key, value)))


def _for_each_head(shared: Tensor, query: Tensor) -> torch.Size:
    """The shape of keys or values, repeated for each head of the queries, as they are multiplied."""
    batch, _, *rest = shared.shape
    return torch.Size((batch, query.shape[1], *rest))


def grouped_flops(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of the products of rows, each with one slice of the weight."""
    return 2 * rows.numel() * weight.shape[-1]


def grouped_backward_flops(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of the gradients of rows and weight."""
    return 2 * grouped_flops(rows, weight)


FORMULAS: dict[Any, Any] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    grouped.grouped_mm_fallback: grouped_flops,
    grouped.grouped_mm_fallback_backward: grouped_backward_flops,
}
"""FLOPs of an operator. The CPU's fused attention, which torch's registry lacks, keeps the same tensors as a GPU's; so
does transformers' operator for fused experts, which stands for the kernels that need numbers or 16 bits."""


class Tracker(TorchDispatchMode):
    """Counts live bytes and FLOPs inside.

    Args:
        known: Older tensors that do not count, such as parameters.

    Attributes:
        now: Category -> live bytes.
        peak: The same at the snapshot when their sum was largest, since the last `reset`.
        flops: FLOPs of matrix products and attention; a product computed twice counts twice.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self._live: dict[int, tuple[int, str]] = {}
        self._known = list(known)  # alive as long as this, for addresses are used again
        self._known_storages = {tensor.untyped_storage()._cdata for tensor in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
            self._see(tensor)
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += int(formula(*args, **kwargs, out_val=out))
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        return out

    def reset(self) -> None:
        """Forget the peak, but not the live tensors."""
        self.peak = self.now.copy()

    def label(self, tensor: Tensor, category: str) -> None:
        """Count the storage of `tensor` under `category` from now on, if it is counted."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            size, before = self._live[key]
            self.now[before] -= size
            self.now[category] += size
            self._live[key] = size, category

    @contextmanager
    def saving(self, category: str) -> Iterator[None]:
        """Label the tensors that autograd saves for the backward pass."""

        def pack(tensor: Tensor) -> Tensor:
            self.label(tensor, category)
            return tensor.detach()  # an operator that saves its own output would keep itself alive

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known_storages:
            return
        self._live[key] = storage.nbytes(), OTHER
        self.now[OTHER] += storage.nbytes()
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        size, category = self._live.pop(key)
        self.now[category] -= size

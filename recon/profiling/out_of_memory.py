"""The message when memory runs out: the live bytes, and options that would shrink the largest part."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from recon.basics.trees import tensors_in
from recon.profiling.entries import CATEGORIES, SIDES, Category, Entry, Side

NUM_OWNERS = 10

ON_HOST = re.compile(r"can't allocate memory|CUDA error: out of memory")
"""Parts of torch's RuntimeError when the host's memory runs out, pageable or pinned."""

ON_DEVICE = re.compile(r"CU[A-Z]+_STATUS_ALLOC_FAILED|Cuda failure.*out of memory")
"""Parts of a RuntimeError when a library of NVIDIA finds no memory on the device: cuBLAS, cuDNN and more, and NCCL."""

NAMES: dict[Category, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations kept for the backward pass",
    "calibration": "calibration activations",
    "gram": "Gram matrices",
    "masks": "masks",
    "other": "what a step needs for a moment, batches, and copies of weights",
}

Cures = Mapping[Category, str]

SMALLER_BATCH = "a smaller model.batch_size with trainer.accumulate_grad_batches in its place"
SMALLER_WINDOW = "a smaller model.num_blocks, scopes/submodule, or model.parameters: lora or vectors"

LOCAL_CURES: dict[Side, Cures] = {
    "device": {
        "weights": "model.offload: host or disk, a smaller model.num_blocks, or scopes/submodule",
        "gradients": SMALLER_WINDOW,
        "optimizer": SMALLER_WINDOW,
        "activations": f"{SMALLER_BATCH}, a smaller data.seq_len, a smaller model.num_blocks, or --trainer.precision "
        "bf16-mixed",
        "calibration": "model.activations: host, model.activations_dtype: bfloat16, or a smaller data.num_sequences",
        "gram": "model.start: pruned in scopes/submodule or scopes/block, which needs none",
        "masks": "a smaller model.num_blocks, or pruning.exclude for matrices that need no mask",
        "other": f"{SMALLER_BATCH} (pruning.batch_size while masks are chosen), or a smaller data.seq_len",
    }
}
LOCAL_CURES["host"] = {
    **LOCAL_CURES["device"],
    "weights": "model.offload: disk, or model.dtype: bfloat16",
    "calibration": "model.activations_dtype: bfloat16, or a smaller data.num_sequences or data.seq_len",
}

FULL_CURES: dict[Side, Cures] = {
    "device": {
        "weights": "model.offload: host outside the fit, strategies/zero3 or strategies/fsdp2 on more devices, "
        "strategies/zero3_offload, or a local scope",
        "gradients": "strategies/zero2 on more devices, model.parameters: lora or vectors, or scopes/block",
        "optimizer": "strategies/zero1 on more devices, strategies/zero2_offload, model.parameters: lora, or "
        "scopes/block",
        "activations": "model.gradient_checkpointing: true, a smaller data.batch_size with "
        "trainer.accumulate_grad_batches in its place, or --trainer.precision bf16-mixed",
        "calibration": "a smaller data.num_sequences",
        "gram": "model.start: pruned, which needs none",
        "masks": "pruning.exclude for matrices that need no mask, or scopes/block",
        "other": "a smaller data.batch_size with trainer.accumulate_grad_batches, or a smaller data.seq_len",
    }
}
FULL_CURES["host"] = {
    **FULL_CURES["device"],
    "weights": "a local scope with model.offload: disk, or model.partitioned: true with strategies/zero3",
    "optimizer": "strategies/zero1 on more devices, model.parameters: lora, or scopes/block",
}


def full_side(error: BaseException | None) -> Side | None:
    """Return the side on which `error` is a failed allocation; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):  # of torch's own allocator
        return "device"
    if isinstance(error, MemoryError):
        return "host"
    if isinstance(error, RuntimeError):
        return "device" if ON_DEVICE.search(str(error)) else "host" if ON_HOST.search(str(error)) else None
    return None


def live_by_category(entries: Iterable[Entry]) -> dict[Side, dict[Category, int]]:
    """Side -> category -> live bytes."""
    sums: dict[Side, Counter[Category]] = {side: Counter() for side in SIDES}
    for entry in entries:
        sums[entry.side][entry.category or "other"] += entry.nbytes
    return {side: {name: sizes[name] for name in CATEGORIES} for side, sizes in sums.items()}


def largest_owners(live: dict[int, Entry], model: nn.Module | None, optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """List the parameters and modules with most live bytes, largest first.

    Args:
        live: Entries of `Ledger.live`.
        model: The model, for names of its modules and parameters; gradients and optimizer state count for these.
        optimizers: Optimizers with that state.
    """
    names: dict[int, str] = {}
    modules: dict[nn.Module, str] = {}
    if model is not None:
        modules = {module: name for name, module in model.named_modules()}
        states: dict[Any, Any] = {}
        for optimizer in optimizers:
            states |= getattr(optimizer, "state", {})
        for name, parameter in model.named_parameters():
            for tensor in tensors_in([parameter, parameter.grad, states.get(parameter, {})]):
                names[id(tensor.untyped_storage())] = name
    sums: Counter[tuple[str, Category, Side]] = Counter()
    for key, entry in live.items():
        module = entry.module and entry.module()
        owner = names.get(key) or (modules.get(module) or type(module).__name__ if module is not None else "no module")
        sums[owner, entry.category or "other", entry.side] += entry.nbytes
    return [
        {"owner": owner, "category": category, "side": side, "bytes": size}
        for (owner, category, side), size in sums.most_common(NUM_OWNERS)
    ]


def advice(
    live: Mapping[Side, Mapping[Category, int]], full: Side | None, phase: str, cures: Mapping[Side, Cures]
) -> str:
    """Write the error's text: the largest live category, and options that would shrink it.

    Args:
        live: Side -> category -> bytes.
        full: The full side; None if both are in one memory, the host's.
        phase: The phase of the failure.
        cures: `LOCAL_CURES` or `FULL_CURES`.
    """
    sides = SIDES if full is None else (full,)
    sizes = {name: sum(live[side][name] for side in sides) for name in CATEGORIES}
    largest = max(CATEGORIES, key=lambda name: sizes[name])
    mib = {name: f"{size / 2**20:,.1f} MiB" for name, size in sizes.items()}
    split = ", ".join(f"{name} {mib[name]}" for name in CATEGORIES if sizes[name] > 0)
    return (
        f"memory{f' of the {full}' if full else ''} ran out in phase {phase!r}; live tensors were {split}. Most were "
        f"{NAMES[largest]} ({mib[largest]}); smaller with {cures[full or 'host'][largest]}"
    )

"""A model with synthetic numbers: its own code, runnable at once whatever its size, device and weights.

An experiment on the code of a model needs some numbers, not the trained ones, which may be elsewhere (on disk, in the
memory of other processes) or nowhere (in a plan). Every parameter becomes an overlapping view of a short random vector,
and each output of a linear map reads one input. So a block of any width costs milliseconds and kilobytes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from recon.distributed.parameters import whole_shape
from recon.models.forwards import evaluating, forward_replaced
from recon.models.matrices import LINEAR_MAPS, Matrix, is_matrix

IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Fields of a configuration that name the kernels of attention and experts; the eager ones run everywhere."""

CHUNK, SHORT = "chunk_size", 8
"""A scan over chunks of 256 tokens takes gigabytes for one token in models of usual width."""


def run_synthetic(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Run `model` on a CPU in fp32 with synthetic numbers in place of its parameters and buffers.

    The numbers depend on the architecture alone. Forwards that are replaced at that moment are run as they are.

    Args:
        model: On any device, or on none.
        tokens: The token ids of one sequence.
    """
    with _plain_torch(), evaluating(model), _eager(model), ExitStack() as stack:
        generator = torch.Generator().manual_seed(0)
        numbers = {name: numbers_like(one, generator) for name, one in model.named_parameters()}
        numbers |= {name: ones_like(one) for name, one in model.named_buffers()}
        for module in model.modules():
            if is_matrix(module) and type(module).forward in [kind.forward for kind in LINEAR_MAPS]:
                stack.enter_context(forward_replaced(module, sparse_map(module, generator)))
        functional_call(model, numbers, kwargs={"input_ids": torch.tensor([tokens]), "use_cache": False})


def numbers_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Make fp32 numbers of the shape of a parameter, or `ones_like` if it is not of floating point."""
    shape = tuple(whole_shape(tensor))
    if not tensor.is_floating_point():
        return ones_like(tensor)
    strides = tuple(reversed(range(1, len(shape) + 1)))  # all different: a view tells its axes
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    values = torch.rand(max(length, 1), generator=generator) + 0.5  # vectors are gains, decays and biases
    if len(shape) > 1:
        signs = torch.randint(2, values.shape, generator=generator) * 2 - 1
        values = values * signs / math.sqrt(max(shape[-2:]))
    return values.as_strided(shape, strides)


def ones_like(tensor: Tensor) -> Tensor:
    """Make ones of the shape of `tensor`, which as a mask hide nothing; zeros for integers, which may be positions."""
    if tensor.is_floating_point():
        return torch.ones(()).expand(tensor.shape)
    one = torch.ones if tensor.dtype == torch.bool or tensor.is_complex() else torch.zeros
    return one((), dtype=tensor.dtype).expand(tensor.shape)


def sparse_map(module: nn.Module, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Make a linear map of the shape of `module` whose outputs read one input each."""
    out, in_ = Matrix.of_module("", module).shape
    read = torch.randperm(in_, generator=generator)[torch.arange(out) % in_]
    gains = torch.randn(out, generator=generator)
    return lambda input: input[..., read] * gains


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Compute real fp32 numbers on the CPU, without gradients, whatever modes the caller has set."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Let attention and experts take their eager implementations, and scans short chunks, which are padded to size."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    before = [(config, name, vars(config)[name], "eager") for config in configs.values() for name in IMPLEMENTATIONS]
    chunked = [module for module in model.modules() if isinstance(vars(module).get(CHUNK), int)]
    before += [(module, CHUNK, vars(module)[CHUNK], min(vars(module)[CHUNK], SHORT)) for module in chunked]
    try:
        for owner, name, _, value in before:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value, _ in before:
            setattr(owner, name, value)

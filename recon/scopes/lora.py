"""Masked LoRA: a low-rank update of each pruned matrix learns, only where its mask keeps weights.

The forward pass uses W + (alpha / r) (B A) * 1[kept] with W frozen; merged into W in the end, the update leaves every
pruned weight at zero (PERP, arXiv 2312.15230).

The code is our own, since peft's cannot be used: its layer computes B(A x), in which the product B A never exists and
so cannot be masked, and it wraps modules, which renames `weight` to `base_layer.weight`: masks, replay, checkpoints and
the written model go by names. Here the adapters are parameters `lora_A` and `lora_B` of the linear map itself and only
its forward is shadowed. Nothing is renamed, and a strategy that shards gathers all three at once, since they belong to
one module.

Masking has its price: the masked weight is one more tensor of the size of the weight, which the backward pass needs.
What shrinks are gradients and optimizer state.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from recon.basics.seeds import derived_seed
from recon.distributed.parameters import whole_shape
from recon.models.matrices import Matrix
from recon.pruning.bits import unpack
from recon.pruning.masks import Masks

A, B = "lora_A", "lora_B"
"""Names of the adapters in their module, as peft has them: rank x in and out x rank."""


@dataclass(frozen=True)
class Lora:
    """How large the low-rank updates are.

    Args:
        rank: r, the columns of B and rows of A.
        alpha: The update is multiplied by alpha / r.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"model.lora needs a rank of at least 1 and a positive alpha, got rank {self.rank}, alpha {self.alpha}"
            )


DEFAULT_LORA = Lora()
"""For signatures; it cannot change."""


class Adapted:
    """The forward of a linear map that has adapters; takes its place as `module.forward`.

    Args:
        module: An `nn.Linear` or `Conv1D` with `lora_A` and `lora_B`.
        packed: The mask of its weight, as `Masks.packed` gives it.
        scale: alpha / r.
    """

    def __init__(self, module: nn.Module, packed: Tensor, scale: float) -> None:
        self.module, self.scale, self._matrix = module, scale, Matrix.of_module("", module)
        self._packed, self._shape = packed, tuple(whole_shape(module.get_parameter("weight")))
        self.merged_dtype: torch.dtype | None = None  # that of the weight
        self._on_device: dict[torch.device, Tensor] = {}  # no buffer: DDP would send it at every step

    def __call__(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """As the linear map, with the sum of weight and masked update, in the weight's dtype."""
        module = self.module
        weight, bias = module.weight, module.bias  # looked up now: FSDP2 puts gathered ones there for the call
        merged = weight + self._update(module.lora_A, module.lora_B)  # pyright: ignore
        updated = merged.to(self.merged_dtype or weight.dtype).to(weight.dtype)  # pyright: ignore
        return F.linear(input, self._matrix.out_in(updated), bias)  # pyright: ignore[reportArgumentType]

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The sum of `weight` and its update, computed in fp32 and rounded to the weight's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.float() + self._update(a.float(), b.float())).to(weight.dtype)

    def _update(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> Float[Tensor, "rows columns"]:
        """(alpha / r) (B A) * 1[kept], laid out as the weight."""
        product = self._matrix.out_in((self.scale * b) @ a)
        return torch.where(self.keep(product.device), product, 0)

    def keep(self, device: torch.device) -> Bool[Tensor, "rows columns"]:
        """The mask, unpacked, which stays on the device."""
        if device not in self._on_device:
            self._on_device = {device: unpack(self._packed.to(device), self._shape)}  # a model is on one at a time
        return self._on_device[device]


def require_linear_maps(matrices: Iterable[Matrix]) -> None:
    """Refuse to learn updates of fused experts, whose products run in a kernel that takes no module's place.

    Raises:
        ValueError: Naming the first of `matrices` that is a slice.
    """
    if slices := [one for one in matrices if one.index is not None]:
        raise ValueError(
            f"model.parameters: lora learns updates of Linear and Conv1D modules, got {len(slices)} matrices of fused "
            f"experts, {slices[0].name} the first; leave them dense by pruning.exclude, such as "
            f"*.{slices[0].parameter_name.rpartition('.')[2]}, or choose model.parameters: all or weights"
        )


def attach(model: nn.Module, masks: Masks, names: Iterable[str], lora: Lora, seed: int) -> list[str]:
    """Give linear maps adapters that learn; the model computes as before until they do.

    A is drawn as in peft, uniform in +-1/sqrt(in), by `seed` and the name of the weight alone; B is zero. Both are
    fp32, even if the weight is not. The weights are not frozen here.

    Args:
        model: Its linear maps get the adapters; may be partitioned by ZeRO-3, not yet sharded by FSDP2.
        masks: Which weights survive.
        names: Names of parameters; those that have a mask get adapters.
        lora: Rank and alpha.
        seed: The run's.

    Returns:
        The names of the adapters in `model.named_parameters()`, for `merge`.

    Raises:
        ValueError: If none of `names` has a mask, or a masked weight belongs to no plain linear map.
    """
    masked = [name for name in names if name in masks]
    if not masked:
        raise ValueError(
            "model.parameters: lora learns updates of pruned matrices, got none; give a criterion and a pattern, or "
            "choose model.parameters: all"
        )
    adapters = []
    for name in masked:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward) or "forward" in vars(module):
            raise ValueError(
                f"model.parameters: lora needs linear maps that compute as nn.Linear or Conv1D do, got "
                f"{type(module).__name__} with a forward of its own at {path}; leave it dense by pruning.exclude, or "
                f"choose another model.parameters"
            )
        weight = module.get_parameter("weight")
        out, in_ = Matrix.of_module(path, module).shape
        generator = torch.Generator().manual_seed(derived_seed(seed, *name.encode()))
        a = nn.init.kaiming_uniform_(torch.empty(lora.rank, in_), a=math.sqrt(5), generator=generator)
        module.register_parameter(A, nn.Parameter(a.to(weight.device)))
        module.register_parameter(B, nn.Parameter(torch.zeros(out, lora.rank, device=weight.device)))
        module.forward = Adapted(module, masks.packed(name), lora.alpha / lora.rank)
        adapters += [f"{path}.{A}", f"{path}.{B}"]
    return adapters


def is_adapted(module: nn.Module) -> bool:
    """Whether `module` has adapters."""
    return isinstance(vars(module).get("forward"), Adapted)


@torch.no_grad()
def merge(model: nn.Module, names: Iterable[str]) -> None:
    """Add the updates to their weights and remove the adapters: the model has its own parameters and code again.

    Args:
        model: Not sharded; `merge_state` is for what was gathered from one that is.
        names: Of the adapters, as `attach` returned them.
    """
    for _, module, adapted in _adapted(model, names):
        weight, a, b = (module.get_parameter(name) for name in ("weight", A, B))
        weight.copy_(adapted.merged(weight, a, b))
        _detach(module)


@torch.no_grad()
def merge_state(model: nn.Module, names: Iterable[str], state: dict[str, Tensor]) -> None:
    """As `merge`, into the weights of `state`, which loses the adapters; those of `model` are only removed.

    Args:
        model: Has the adapters; its weights may be sharded or without data.
        names: Of the adapters, as `attach` returned them.
        state: The whole state dict of `model`.
    """
    for path, module, adapted in _adapted(model, names):
        weight = state[f"{path}.weight"]
        weight.copy_(adapted.merged(weight, state.pop(f"{path}.{A}"), state.pop(f"{path}.{B}")))
        _detach(module)


def round_merged(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """From now on compute with merged weights that are rounded to `dtype`, as the model will be written."""
    for _, _, adapted in _adapted(model, names):
        adapted.merged_dtype = dtype


def _adapted(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module, Adapted]]:
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(path)
        adapted = vars(module).get("forward")
        assert isinstance(adapted, Adapted), path
        yield path, module, adapted


def _detach(module: nn.Module) -> None:
    del module.forward
    delattr(module, A)
    delattr(module, B)

"""A model with fewer experts: the same architecture, one number of its configuration smaller.

Nothing is named. The number is the field of the configuration whose change makes all stacks shorter, and else only what
has an entry for each expert: the router's weight and bias, the biases of experts, corrections of scores. Two models
without weights, one of each number of experts, show which tensors are to be cut and along which dimension.

Recovery needs the dense and the smaller model in turn. `route_among` therefore lets a mixture compute with views of its
survivors as long as the weights of removed experts are zero, by the smaller model's own code: the router cannot choose
a removed expert. `Smaller.model` makes the smaller model that is written in the end.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from recon.models.anatomy import Anatomy, Block
from recon.models.loading import empty

Kept = Mapping[int, Sequence[int]]
"""Index of a block with a mixture -> its surviving experts, in order."""


@dataclass(frozen=True, eq=False)
class Smaller:
    """The smaller architecture of a model.

    Args:
        num_experts: Experts of each mixture.
        skeleton: The smaller model, without weights.
        cut: Full name of each parameter and buffer that becomes smaller -> the dimension of experts.
    """

    num_experts: int
    skeleton: PreTrainedModel
    cut: dict[str, int]

    def narrowed(self, name: str, tensor: Tensor, block: Block, kept: Kept) -> Tensor:
        """Cut the parameter or buffer `name` of `block` to its surviving experts."""
        if name not in self.cut:
            return tensor
        return tensor.index_select(self.cut[name], torch.tensor(kept[block.index], device=tensor.device))

    def model(
        self, model: PreTrainedModel, state: Mapping[str, Tensor] | None, kept: Kept
    ) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Make the smaller model.

        Args:
            model: The model with all experts.
            state: Its weights, if it is without them.
            kept: Survivors of all mixtures.

        Returns:
            The model without weights, and its weights.
        """
        state = model.state_dict() if state is None else state
        blocks = Anatomy.of(model).blocks
        owner = {name: next(one for one in blocks if name.startswith(f"{one.name}.")) for name in self.cut}
        smaller = empty(type(model), self.skeleton.config, model.dtype)
        smaller.generation_config = model.generation_config
        found = {
            name: self.narrowed(name, one, owner[name], kept) if name in self.cut else one
            for name, one in state.items()
        }
        return smaller, found


_known: WeakKeyDictionary[PreTrainedModel, dict[int, Smaller]] = WeakKeyDictionary()


def smaller(model: PreTrainedModel, num_experts: int) -> Smaller:
    """Find the architecture of `model` with another number of experts, and try it out on seven tokens.

    Args:
        model: Has mixtures of experts; it may be without weights.
        num_experts: Experts that each mixture keeps.

    Raises:
        ValueError: If there are no experts, mixtures differ in their number, or no such model can be built or run.
    """
    known = _known.setdefault(model, {})
    if num_experts not in known:
        known[num_experts] = _found(model, num_experts)
    return known[num_experts]


def stacks(block: Block) -> dict[str, int]:
    """Return name -> number of slices, of the stacked parameters of a block."""
    found: dict[str, int] = {}
    for one in block.matrices.values():
        if one.index is not None:
            found[one.parameter_name] = found.get(one.parameter_name, 0) + 1
    return found


def num_experts_of(anatomy: Anatomy) -> int:
    """Return the number of experts of every mixture.

    Raises:
        ValueError: If there is no mixture, or mixtures differ.
    """
    numbers = sorted({num for block in anatomy.blocks for num in stacks(block).values()})
    if len(numbers) != 1:
        got = "none" if not numbers else f"stacks of {' and '.join(map(str, numbers))}"
        raise ValueError(
            f"removing experts needs a model whose mixtures have one number of experts, stacked in parameters of three "
            f"dimensions, got {got}; choose a pattern of weights, such as --pattern 2:4"
        )
    return numbers[0]


def experts_per_token(anatomy: Anatomy) -> int:
    """Return the largest number of experts that a mixture sends a token to."""
    per_token: dict[str, float] = {}
    for block in anatomy.blocks:
        for one in block.matrices.values():
            if one.index is not None:
                per_token[one.parameter_name] = per_token.get(one.parameter_name, 0.0) + one.rows_per_token
    return round(max(per_token.values()))


def _found(model: PreTrainedModel, num_experts: int) -> Smaller:
    anatomy = Anatomy.of(model)
    num, of_token = num_experts_of(anatomy), experts_per_token(anatomy)
    if num_experts >= num:
        raise ValueError(
            f"removing experts needs fewer than the {num} of each mixture, got {num_experts} that are kept; keep fewer"
        )
    if of_token == num:
        raise ValueError(
            f"removing experts needs mixtures that multiply with the chosen experts alone, got one that computes all "
            f"{num} for every token, so that its choice cannot be seen; choose a pattern of weights, such as 2:4"
        )
    if num_experts < of_token:
        raise ValueError(
            f"a mixture needs as many experts as a token is sent to, {of_token} of {num}, got {num_experts} that are "
            f"kept; keep more"
        )
    names = [name for block in anatomy.blocks for name in stacks(block)]
    for config in _configurations(model.config, num, num_experts):
        try:
            skeleton = empty(type(model), config, model.dtype)
        except Exception:  # of the model's own code: the field counts something else
            continue
        cut = _differing(model, skeleton, num, num_experts)
        if cut is not None and all(cut.get(name) == 0 for name in names):
            break
    else:
        raise ValueError(
            f"removing experts needs a field of the configuration that sets their number, {num}, and nothing else, "
            f"found none in {type(model.config).__name__}; choose a pattern of weights, such as --pattern 2:4"
        )
    try:
        Anatomy.of(skeleton)
    except ValueError as error:
        raise ValueError(
            f"the router of {type(model).__name__} must work with the experts that are kept, it does not with "
            f"{num_experts} of {num}: {error}; where it chooses groups first, keep a multiple of their number"
        ) from error
    return Smaller(num_experts, skeleton, cut)


def _configurations(config: PreTrainedConfig, num: int, num_experts: int) -> list[PreTrainedConfig]:
    """List copies of `config` with `num_experts` in place of `num`: in one field, and last in all."""
    fields = [name for name, value in vars(config.get_text_config()).items() if type(value) is int and value == num]
    found = []
    for names in [*([name] for name in fields), fields]:
        changed = copy.deepcopy(config)
        for name in names:
            setattr(changed.get_text_config(), name, num_experts)
        found.append(changed)
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _differing(model: nn.Module, skeleton: nn.Module, num: int, num_experts: int) -> dict[str, int] | None:
    """Name -> dimension, of tensors that differ from `num` to `num_experts`; None if another difference is there."""
    ours, theirs = _tensors(model), _tensors(skeleton)
    if ours.keys() != theirs.keys():
        return None
    cut = {}
    for name, tensor in ours.items():
        before, after = list(tensor.shape), list(theirs[name].shape)
        if len(before) != len(after):
            return None
        places = [at for at, sizes in enumerate(zip(before, after, strict=True)) if sizes[0] != sizes[1]]
        if places and (len(places) > 1 or (before[places[0]], after[places[0]]) != (num, num_experts)):
            return None
        if places:
            cut[name] = places[0]
    return cut


def route_among(model: PreTrainedModel, kept: Kept) -> None:
    """Let mixtures compute with their survivors alone whenever the weights of their removed experts are zero.

    The parameters stay whole. A mixture is the innermost module of a block that holds all that has an entry for each
    expert; its forward is replaced.

    Args:
        model: With all experts, in memory; recovery may exchange its weights for the dense ones at any time.
        kept: Survivors of some mixtures.
    """
    anatomy = Anatomy.of(model)
    for index, survivors in kept.items():
        block = anatomy.blocks[index]
        found = smaller(model, len(survivors))
        cut = {
            name.removeprefix(f"{block.name}."): at
            for name, at in found.cut.items()
            if name.startswith(f"{block.name}.")
        }
        inside = _common([name.rpartition(".")[0] for name in cut])
        mixture = block.module.get_submodule(inside)
        if isinstance(vars(mixture).get("forward"), _Routed):
            continue
        twin = found.skeleton.get_submodule(f"{block.name}.{inside}".rstrip("."))
        first = next(name for name in stacks(block)).removeprefix(f"{block.name}.{inside}.")
        own = {name.removeprefix(f"{inside}."): at for name, at in cut.items()}
        mixture.forward = _Routed(mixture, mixture.forward, twin, own, first, survivors)


class _Routed:
    """The forward of a mixture, dense or with its survivors alone."""

    def __init__(
        self, mixture: nn.Module, dense: Any, twin: nn.Module, cut: Mapping[str, int], stack: str, kept: Sequence[int]
    ) -> None:
        num = len(mixture.get_parameter(stack))
        self.mixture, self.dense, self.twin, self.cut, self.stack = mixture, dense, twin, cut, stack
        self.kept, self.removed = list(kept), next(index for index in range(num) if index not in set(kept))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mixture.get_parameter(self.stack)[self.removed].any():
            return self.dense(*args, **kwargs)
        mixture = _with_survivors(self.mixture, self.twin, self.cut, self.kept)
        return type(mixture).forward(mixture, *args, **kwargs)


def _with_survivors(module: nn.Module, twin: nn.Module, cut: Mapping[str, int], kept: Sequence[int]) -> nn.Module:
    """Copy a module without its weights; what has an entry for each expert is a selection of the original's.

    Gradients reach the original. What `cut` leaves alone is shared, hooks included.
    """
    copied = copy.copy(module)
    own = vars(copied)
    own.pop("forward", None)
    for kind in ("_parameters", "_buffers", "_modules"):
        own[kind] = dict(own[kind])
    for name, value in vars(twin).items():
        if type(value) is int and own.get(name) != value:
            own[name] = value
        elif isinstance(value, PreTrainedConfig):
            own[name] = copy.copy(value)
            own[name]._experts_implementation = getattr(vars(module)[name], "_experts_implementation", None)
    inner: dict[str, dict[str, int]] = {}
    for name, dimension in cut.items():
        child, _, rest = name.partition(".")
        if rest:
            inner.setdefault(child, {})[rest] = dimension
            continue
        whole = getattr(module, name)
        for kind in ("_parameters", "_buffers"):
            own[kind].pop(name, None)
        own[name] = whole.index_select(dimension, torch.tensor(kept, device=whole.device))
    for child, rest in inner.items():
        own["_modules"][child] = _with_survivors(module.get_submodule(child), twin.get_submodule(child), rest, kept)
    return copied


def _common(paths: Sequence[str]) -> str:
    """The longest dotted path that all of `paths` begin with."""
    parts = [path.split(".") for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)

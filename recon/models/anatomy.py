"""The anatomy of a causal language model: its blocks, their token mixers and their prunable matrices.

This file alone knows about architectures, and knows none by name: it reads the module tree and three fields of the
config, and finds token mixers by experiment. It refuses a model that it cannot read and lists the modules that it
found; no block and no matrix is ever skipped in silence. Embeddings and the head lie outside the blocks and are
therefore never prunable.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from recon.distributed.parameters import whole_shape
from recon.models.matrices import Matrix, is_matrix
from recon.models.mixers import Findings, entered_first, examine

MAX_LISTED = 8  # names an error message lists before it only counts the rest


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block.

    Args:
        index: Depth, from 0.
        name: Full module name, such as `model.layers.3`.
        module: The block itself.
        matrices: Full name -> matrix, for every prunable one, in module order.
        mixer_name: Full module name of the token mixer that divides the block, such as `model.layers.3.self_attn`;
            None if the block has none, several in parallel, or no weights outside it.
        kind: Blocks of the same kind have equal modules.
        routers: Full names of the parameters of routers, which choose among experts.
    """

    index: int
    name: str
    module: nn.Module
    matrices: dict[str, Matrix]
    mixer_name: str | None = None
    kind: str = ""
    routers: frozenset[str] = frozenset()

    @property
    def mixer(self) -> nn.Module | None:
        """The token mixer itself: attention, a state-space mixer, a linear recurrence, a convolution."""
        if self.mixer_name is None:
            return None
        return self.module.get_submodule(self.mixer_name.removeprefix(f"{self.name}."))

    @property
    def mixer_kind(self) -> str:
        """What windows call the mixer: `attention` where its class does, `mixer` otherwise."""
        kind = type(self.mixer).__name__.lower()
        return "attention" if "attention" in kind or "attn" in kind else "mixer"

    def weights_among(self, names: Container[str]) -> dict[str, Matrix]:
        """Return name of the weight -> matrix, for those whose weight or parameter is one of `names`."""
        return {
            one.weight_name: one
            for one in self.matrices.values()
            if one.weight_name in names or one.parameter_name in names
        }

    @property
    def experts(self) -> list[nn.Module]:
        """The modules that hold stacks of matrices."""
        return list({id(one.module): one.module for one in self.matrices.values() if one.index is not None}.values())

    def left_dense(self) -> dict[str, list[int]]:
        """Return name within the block -> shape, of parameters of two or more dimensions that are never pruned.

        They are kernels of convolutions, states, routers, and linear maps that the model does not call.
        """
        prunable = {one.parameter_name for one in self.matrices.values()}
        shapes = {name: whole_shape(one) for name, one in self.parameters().items() if name not in prunable}
        return {name.removeprefix(f"{self.name}."): list(one) for name, one in shapes.items() if rank(one) > 1}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all floating-point parameters, under their names in `model.named_parameters()`."""
        return {
            f"{self.name}.{name}": parameter
            for name, parameter in self.module.named_parameters()
            if parameter.is_floating_point()
        }


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The blocks of a model, in the order of depth."""

    blocks: list[Block]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Anatomy":
        """Read the module tree of `model`.

        Raises:
            ValueError: If the model is an encoder-decoder, has no block list, is quantised, cannot be run on a CPU
                with synthetic numbers, has blocks without matrices that it calls, or shares parameters between blocks.
        """
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"recon needs a decoder-only model (config.is_encoder_decoder=False), got "
                f"{type(model).__name__}, an encoder-decoder. Load a causal language model."
            )
        list_name, modules = _block_list(model)
        names = [f"{list_name}.{index}" for index in range(len(modules))]
        _refuse_shared_parameters(names, modules)
        _refuse_quantised(names, modules)
        found = examine(model, names, modules)
        blocks = [_block(index, *of_block) for index, of_block in enumerate(zip(names, modules, found, strict=True))]
        _refuse_blocks_without_matrices(blocks)
        return cls(blocks)

    def weights_among(self, names: Container[str]) -> dict[str, Matrix]:
        """As `Block.weights_among`, of all blocks."""
        return {name: one for block in self.blocks for name, one in block.weights_among(names).items()}

    def left_dense(self) -> dict[str, list[int]]:
        """As `Block.left_dense`, of all blocks, under full parameter names."""
        return {f"{block.name}.{name}": shape for block in self.blocks for name, shape in block.left_dense().items()}

    def prunable(self, exclude: Sequence[str] = ()) -> dict[str, Matrix]:
        """Find the weights that may be pruned.

        Args:
            exclude: Shell patterns (`fnmatch`, case-sensitive) of full names of matrices to leave dense, such as
                `*.down_proj` or `model.layers.0.*`; the name of a stacked parameter stands for all its slices.

        Returns:
            Name of the weight, such as `model.layers.0.mlp.up_proj.weight`, -> the matrix it belongs to.

        Raises:
            ValueError: If a pattern matches no prunable matrix, or if nothing is left to prune.
        """
        matrices = [matrix for block in self.blocks for matrix in block.matrices.values()]
        for pattern in exclude:
            if not any(_is_named(matrix, pattern) for matrix in matrices):
                raise ValueError(
                    f"Each pattern of pruning.exclude must match the name of a prunable matrix, {pattern!r} matches "
                    f"none of {_listed([matrix.name for matrix in matrices])}. Embeddings, routers and the head are "
                    f"never pruned and need no pattern; correct it."
                )
        kept = {
            matrix.weight_name: matrix
            for matrix in matrices
            if not any(_is_named(matrix, pattern) for pattern in exclude)
        }
        if not kept:
            raise ValueError(
                f"At least one matrix must be left to prune, got pruning.exclude {list(exclude)}, which matches all "
                f"{len(matrices)}; exclude less."
            )
        return kept


def _is_named(matrix: Matrix, pattern: str) -> bool:
    names = [matrix.name] if matrix.index is None else [matrix.name, matrix.parameter_name]
    return any(fnmatchcase(name, pattern) for name in names)


def _block(index: int, name: str, module: nn.Module, found: Findings) -> Block:
    if found.divided is not None:
        shape = list(whole_shape(module.get_parameter(found.divided)))
        raise ValueError(
            f"recon prunes linear maps and experts that are stacked along a dimension of their own, got "
            f"{name}.{found.divided} {shape}, which multiplies in parts. This model is not supported."
        )
    matrices = {matrix.name: matrix for matrix in _matrices(name, module, found)}
    mixer_name = f"{name}.{found.mixer}" if found.mixer is not None else None
    routers = frozenset(
        f"{name}.{router}.{own}"
        for router in found.routers
        for own, one in module.get_submodule(router).named_parameters()
        if one.is_floating_point()
    )
    return Block(index, name, module, matrices, mixer_name, found.kind, routers)


def _matrices(name: str, block: nn.Module, found: Findings) -> Iterator[Matrix]:
    """Yield the matrices of the block called `name`, in module order; routers and uncalled linear maps are none."""
    for inner, module in block.named_modules():
        full = f"{name}.{inner}" if inner else name
        if is_matrix(module):
            if inner not in found.routers | found.uncalled:
                yield Matrix.of_module(full, module)
            continue
        for own, _ in module.named_parameters(recurse=False):
            if stack := found.stacks.get(f"{inner}.{own}".lstrip(".")):
                yield from Matrix.slices(f"{full}.{own}", module, stack.is_transposed, stack.rows_per_token)


def _block_list(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Find name and items of the `ModuleList` of blocks.

    It is the one with the config's number of layers, or the only one outside all others; of several, the one that the
    model enters first (an encoder of images is not entered), then the one with the shortest name.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    candidates = [name for name, one in lists.items() if len(one) == depth] or (
        outermost if len(outermost) == 1 else []
    )
    if not candidates:
        found = _listed([f"{name} ({len(one)})" for name, one in lists.items()]) or "no ModuleList"
        raise ValueError(
            f"recon needs a ModuleList of blocks as long as config.num_hidden_layers ({depth}), or one outside all "
            f"others, found {found} in {type(model).__name__}. Load a causal language model with one list of blocks."
        )
    name = min(candidates, key=len)
    if len(candidates) > 1:
        name = entered_first(model, {other: lists[other] for other in sorted(candidates, key=len)}) or name
    return name, list(lists[name].children())


def rank(shape: Sequence[int]) -> int:
    """Count the dimensions that are larger than 1: [1, 1, 64] is a vector."""
    return sum(size > 1 for size in shape)


def _refuse_shared_parameters(names: list[str], modules: list[nn.Module]) -> None:
    owner: dict[int, str] = {}
    for name, module in zip(names, modules, strict=True):
        for inner, parameter in module.named_parameters():
            full = f"{name}.{inner}"
            first = owner.setdefault(id(parameter), full)
            if first != full:
                raise ValueError(
                    f"recon needs blocks that share no parameters, since each is recovered by itself, but "
                    f"{full} is {first}. Models with shared blocks are not supported."
                )


def _refuse_quantised(names: list[str], modules: list[nn.Module]) -> None:
    for name, module in zip(names, modules, strict=True):
        for inner, weight in module.named_parameters():
            if not weight.is_floating_point() and rank(whole_shape(weight)) > 1:
                raise ValueError(
                    f"recon needs floating-point weights, got {weight.dtype} for {name}.{inner}. Load the "
                    f"model without quantisation."
                )


def _refuse_blocks_without_matrices(blocks: list[Block]) -> None:
    for block in blocks:
        if not block.matrices:
            kinds = sorted({type(module).__name__ for module in block.module.modules()})
            raise ValueError(
                f"recon prunes Linear and Conv1D modules and stacks of experts, found none that is called in "
                f"{block.name}, which holds {_listed(kinds)}."
            )


def _listed(names: Sequence[str]) -> str:
    """Join the first names, and the number of the others."""
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")

"""The anatomy of a causal language model: its blocks, their attention submodules and their prunable matrices.

This file alone knows about architectures, and knows none by name: it reads the module tree and three fields of the
config. It refuses a model that it cannot read and lists the modules that it found; no block and no matrix is ever
skipped in silence. Embeddings and the head lie outside the blocks and are therefore never prunable.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from recon.distributed.parameters import whole_shape
from recon.models.experts import FusedExperts, find_experts
from recon.models.matrices import Matrix, is_matrix, parameters_of

MAX_LISTED = 8  # names an error message lists before it only counts the rest


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block.

    Args:
        index: Depth, from 0.
        name: Full module name, such as `model.layers.3`.
        module: The block itself.
        attention_name: Full module name of the attention submodule, such as `model.layers.3.self_attn`.
        attention: The attention submodule itself.
        matrices: Full name -> matrix, for every prunable one, in module order.
    """

    index: int
    name: str
    module: nn.Module
    attention_name: str
    attention: nn.Module
    matrices: dict[str, Matrix]

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
            ValueError: If the model is an encoder-decoder, has no block list, has blocks without exactly
                one attention submodule or without linear maps, shares parameters between blocks, or has fused
                experts that cannot be found.
        """
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"recon needs a decoder-only model (config.is_encoder_decoder=False), got "
                f"{type(model).__name__}, an encoder-decoder. Load a causal language model."
            )
        list_name, modules = _block_list(model)
        names = [f"{list_name}.{index}" for index in range(len(modules))]
        _refuse_shared_parameters(names, modules)
        attentions = _attentions(names, modules)
        experts = find_experts(model, names)
        blocks = []
        for index, (name, module, attention) in enumerate(zip(names, modules, attentions, strict=True)):
            matrices = {matrix.name: matrix for matrix in _matrices(name, module, experts)}
            blocks.append(Block(index, name, module, *attention, matrices))
        _refuse_unreadable_matrices(blocks)
        return cls(blocks)

    def weights_among(self, names: Container[str]) -> dict[str, Matrix]:
        """As `Block.weights_among`, of all blocks."""
        return {name: one for block in self.blocks for name, one in block.weights_among(names).items()}

    def matrix_parameters(self) -> set[str]:
        """Names of the parameters that hold matrices."""
        return {one.parameter_name for block in self.blocks for one in block.matrices.values()}

    def left_dense(self) -> dict[str, list[int]]:
        """Return parameter name -> shape, of all in blocks with two dimensions or more that hold no matrix."""
        shapes = {name: list(whole_shape(one)) for block in self.blocks for name, one in block.parameters().items()}
        prunable = self.matrix_parameters()
        return {name: shape for name, shape in shapes.items() if len(shape) > 1 and name not in prunable}

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


def _matrices(name: str, block: nn.Module, experts: FusedExperts) -> Iterator[Matrix]:
    """Yield the matrices of the block called `name`, in module order; routers are none."""
    for inner, module in block.named_modules():
        full = f"{name}.{inner}" if inner else name
        if is_matrix(module):
            if full not in experts.routers:
                yield Matrix.of_module(full, module)
            continue
        for own, _ in module.named_parameters(recurse=False):
            if stack := experts.stacks.get(f"{full}.{own}"):
                yield from Matrix.slices(f"{full}.{own}", module, stack.is_transposed, stack.rows_per_token)


def _block_list(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Find name and items of the `ModuleList` with the config's number of layers; of several, the shortest name's."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lengths = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    candidates = [name for name, length in lengths.items() if length and length == depth]
    if not candidates:
        found = _listed([f"{name} ({length})" for name, length in lengths.items()]) or "no ModuleList"
        raise ValueError(
            f"recon needs a ModuleList of blocks as long as config.num_hidden_layers ({depth}), found "
            f"{found} in {type(model).__name__}. Load a causal language model with one list of blocks."
        )
    name = min(candidates, key=len)
    return name, list(model.get_submodule(name).children())


def _attentions(names: list[str], modules: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Find name and module of the one attention submodule of every block."""
    found = [list(_outermost_attentions(n, m)) for n, m in zip(names, modules, strict=True)]
    without = [
        f"{name} ({', '.join(f'{n}: {type(child).__name__}' for n, child in module.named_children())})"
        for name, module, attentions in zip(names, modules, found, strict=True)
        if not attentions
    ]
    if without:
        raise ValueError(
            f"recon needs an attention submodule with parameters (a class whose name contains attention or "
            f"attn) in every block, found none in {len(without)} of {len(names)} blocks: "
            f"{_listed(without)}. State-space and hybrid models are not supported."
        )
    for name, attentions in zip(names, found, strict=True):
        if len(attentions) > 1:
            listed = _listed([f"{n} ({type(child).__name__})" for n, child in attentions])
            raise ValueError(
                f"recon needs exactly one attention submodule in every block, found {len(attentions)} in "
                f"{name}: {listed}. Models with cross-attention are not supported."
            )
    return [attentions[0] for attentions in found]


def _outermost_attentions(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attention submodules below `module` that lie in no other one (GPT-Neo nests them)."""
    for inner, child in module.named_children():
        kind = type(child).__name__.lower()
        is_attention = "attention" in kind or "attn" in kind
        if is_attention and any(True for _ in child.parameters()):
            yield f"{name}.{inner}", child
        else:
            yield from _outermost_attentions(f"{name}.{inner}", child)


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


def _refuse_unreadable_matrices(blocks: list[Block]) -> None:
    for block in blocks:
        if not block.matrices:
            kinds = sorted({type(module).__name__ for module in block.module.modules()})
            raise ValueError(
                f"recon prunes Linear and Conv1D modules, found none in {block.name}, which holds {_listed(kinds)}."
            )
        for name, weight in parameters_of(block.matrices.values()).items():
            if not weight.is_floating_point():
                raise ValueError(
                    f"recon needs floating-point weights, got {weight.dtype} for {name}. Load the "
                    f"model without quantisation."
                )


def _listed(names: Sequence[str]) -> str:
    """Join the first names, and the number of the others."""
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")

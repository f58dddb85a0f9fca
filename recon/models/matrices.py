"""The matrices of a model: the weights of Linear and Conv1D modules, and the slices of three-dimensional parameters.

`torch.nn.Linear` keeps its weight as out x in, transformers' `Conv1D` (GPT-2) as in x out. A fused mixture of experts
keeps one parameter for all experts, a stack of matrices in one of both layouts. Criteria and solvers speak of single
matrices, out x in; masks and weights are stored by parameter, in its own layout. This file is the one place that knows
the difference.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recon.distributed.parameters import whole_shape

LINEAR_MAPS = (nn.Linear, Conv1D)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One linear map, and the place of its weight.

    Args:
        name: Full name, for patterns of names: that of its module, such as `model.layers.3.mlp.up_proj`, or that of the
            parameter with the number of the slice, such as `model.layers.3.mlp.experts.down_proj.7`.
        parameter_name: Full name of the parameter that holds the weight.
        module: The module that has this parameter.
        index: Number of the slice; None if the weight is the whole parameter.
        is_transposed: Whether the parameter holds the weight as in x out.
        rows_per_token: Rows that the weight multiplies with for each token: 1, or of an expert a fraction on average.
    """

    name: str
    parameter_name: str
    module: nn.Module
    index: int | None = None
    is_transposed: bool = False
    rows_per_token: float = 1.0

    @classmethod
    def of_module(cls, name: str, module: nn.Module) -> "Matrix":
        """The matrix of the Linear or Conv1D module called `name`."""
        return cls(name, f"{name}.weight", module, is_transposed=isinstance(module, Conv1D))

    @classmethod
    def slices(
        cls, parameter_name: str, module: nn.Module, is_transposed: bool, rows_per_token: float = 1.0
    ) -> "list[Matrix]":
        """The matrices in a three-dimensional parameter of `module`; the rows are those of all of them together."""
        num = whole_shape(module.get_parameter(parameter_name.rpartition(".")[2]))[0]
        return [
            cls(f"{parameter_name}.{index}", parameter_name, module, index, is_transposed, rows_per_token / num)
            for index in range(num)
        ]

    @property
    def weight_name(self) -> str:
        """Name of the weight: that of its parameter, or of a slice its own."""
        return self.parameter_name if self.index is None else self.name

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return self.module.get_parameter(self.parameter_name.rpartition(".")[2])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs and of inputs, whole under ZeRO-3, too."""
        rows, columns = whole_shape(self.parameter)[-2:]
        return (columns, rows) if self.is_transposed else (rows, columns)

    @property
    def weight(self) -> Tensor:
        """The weight as an out x in view without gradient; writing to it writes the parameter."""
        return self.part_of(self.parameter.detach())

    def part_of(self, tensor: Tensor) -> Tensor:
        """View the part of `tensor`, laid out as the parameter, that belongs to this matrix, as out x in."""
        return self.out_in(tensor if self.index is None else tensor[self.index])

    def out_in(self, tensor: Tensor) -> Tensor:
        """View `tensor`, laid out as the weight is stored, as out x in; its own inverse."""
        return tensor.T if self.is_transposed else tensor


def is_matrix(module: nn.Module) -> bool:
    """Whether `module` is one linear map with a two-dimensional weight."""
    return isinstance(module, LINEAR_MAPS)


def parameters_of(matrices: Iterable[Matrix]) -> dict[str, nn.Parameter]:
    """Name -> parameter, of all that hold one of these matrices."""
    return {matrix.parameter_name: matrix.parameter for matrix in matrices}


def by_parameter(matrices: Mapping[str, Matrix]) -> list[dict[str, Matrix]]:
    """Split matrices by the parameters that hold them, in order."""
    groups: dict[str, dict[str, Matrix]] = {}
    for name, matrix in matrices.items():
        groups.setdefault(matrix.parameter_name, {})[name] = matrix
    return list(groups.values())


def joined(
    matrices: Mapping[str, Matrix], parts: Mapping[str, Tensor], rest: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Lay out one tensor for each matrix as the parameters are.

    Args:
        matrices: Name of the weight -> matrix.
        parts: Name of the weight -> tensor, out x in.
        rest: Makes a tensor from a stacked parameter; slices without a part are left as they are in it.

    Returns:
        Parameter name -> tensor.
    """
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        matrix = matrices[name]
        if matrix.index is None:
            found[matrix.parameter_name] = matrix.out_in(part)
            continue
        if matrix.parameter_name not in found:
            found[matrix.parameter_name] = rest(matrix.parameter.detach())
        found[matrix.parameter_name][matrix.index] = matrix.out_in(part)
    return found

"""Which parameters learn: everything, the matrices alone, the vectors alone, or adapters in place of all of them.

What is recovered (a window, the blocks, the whole model) is chosen elsewhere; this is the choice among its parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from recon.distributed.parameters import whole_shape
from recon.models.anatomy import Block

Parameters = Literal["all", "weights", "vectors", "routers", "lora"]
"""`all`: every parameter. `weights`: the matrices in the blocks, without routers. `vectors`: norms and biases, which
have one dimension. `routers`: those that choose among experts. `lora`: none of them; the adapters of `recon.lora` learn
instead."""


def chosen(
    parameters: Mapping[str, nn.Parameter], blocks: Sequence[Block], which: Parameters, where: str = "the model"
) -> list[str]:
    """The names of those that learn, in the order given.

    Args:
        parameters: Name -> parameter, of what is recovered; under ZeRO-3 they may be partitioned.
        blocks: Blocks that hold these parameters; they tell matrices and routers.
        which: The choice; empty for `lora`, whose adapters are not there yet.
        where: What is recovered, for the message.

    Raises:
        ValueError: If nothing is left to learn.
    """
    matrices = {one.parameter_name for block in blocks for one in block.matrices.values()}
    routers = {name for block in blocks for name in block.routers}
    learning = {
        "all": lambda name, parameter: True,
        "weights": lambda name, parameter: name in matrices,
        "vectors": lambda name, parameter: len(whole_shape(parameter)) == 1,
        "routers": lambda name, parameter: name in routers,
        "lora": lambda name, parameter: False,
    }[which]
    names = [name for name, one in parameters.items() if one.is_floating_point() and learning(name, one)]
    if not names and which != "lora":
        what = {"all": "floating-point parameters", "weights": "matrices of linear maps", "vectors": "norms or biases"}
        what["routers"] = "routers of experts"
        raise ValueError(
            f"model.parameters: {which} needs {what[which]} to learn, got none among the {len(parameters)} parameters "
            f"of {where}; choose another model.parameters"
        )
    return names

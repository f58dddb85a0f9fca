"""Windows: the parts of a model that are recovered at once.

A window answers for itself: how it is run, which hidden states enter it, which it should reproduce. No forward pass is
rewritten. A mixer window is a tapped block; an MLP window is a stubbed one, so norms, residuals and multipliers
all come from the model; a block window is one or more replayed blocks; a group window is a block halted after some of
its linear maps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch

from recon.models.anatomy import MAX_LISTED, Anatomy, Block
from recon.models.calls import Hidden
from recon.models.matrices import Matrix
from recon.models.replay import Outputs, Replay

Target = Literal["attention", "output", "recorded"]
"""Output that a window should reproduce:

- `attention`: that of the token mixer;
- `output`: that of the last block;
- `recorded`: that of the dense window, which is recorded before the window is pruned.
"""


@dataclass(frozen=True, eq=False)
class Window(ABC):
    """A part of the model that is recovered at once.

    Args:
        name: Such as `003.attention`, `003.mixer`, `003.mlp`, `003.1-o_proj`, `002-004`; names sort in the order of
            recovery.
        blocks: The consecutive blocks that it lies in.
        owned: The parameters that it trains, under their names in `model.named_parameters()`.
        shared: Parameters that it depends on but leaves frozen, since the other window of its block
            depends on them too.

    Attributes:
        target: Output that it should reproduce.
        takes_attention: Whether it takes the output of the token mixer as an input, which is known once the mixer is
            recovered.
        needs_dense_block: Whether the rest of its block must be dense while it is recovered. Windows of the block that
            are recovered already then give their weights back only after the block's last window.
    """

    target: ClassVar[Target] = "output"
    takes_attention: ClassVar[bool] = False
    needs_dense_block: ClassVar[bool] = False

    name: str
    blocks: list[Block]
    owned: list[str]
    shared: list[str]

    @property
    def indices(self) -> list[int]:
        """Indices of its blocks."""
        return [block.index for block in self.blocks]

    @property
    def kind(self) -> str:
        """See `kind_of`."""
        return kind_of(self.name)

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says about the window beside its errors; JSON."""
        return {}

    @abstractmethod
    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Outputs:
        """Compute the output of the window.

        Args:
            replay: The model that holds the window.
            hidden: Hidden states that enter its first block.
            attention: Output of the token mixer; read only where the window `takes_attention`.
        """


class MixerWindow(Window):
    """One block up to the point where its token mixer returns."""

    target: ClassVar[Target] = "attention"

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """Compute the output of the token mixer."""
        return replay.tap(self.blocks[0].index, hidden)


class MLPWindow(Window):
    """One block with the output of its token mixer given."""

    takes_attention: ClassVar[bool] = True

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """Compute the output of the block; `attention` is required."""
        if attention is None:
            raise ValueError(
                f"Window {self.name} needs the output of {self.blocks[0].mixer_name} as `attention`, got "
                f"None. Record it with `Replay.tap` or `Replay.run_and_tap`."
            )
        return replay.stub(self.blocks[0].index, hidden, attention)


class BlockWindow(Window):
    """One or more consecutive blocks."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """Compute the output of the last block."""
        for block in self.blocks:
            hidden = replay.run(block.index, hidden)
        return hidden


@dataclass(frozen=True, eq=False)
class GroupWindow(Window):
    """Some linear maps of one block.

    The modules between them in the block are used as they are at that moment and not trained.

    Args:
        matrices: Full module names of the linear maps.
        ends: Those of them whose output no other of them reads.
    """

    target: ClassVar[Target] = "recorded"
    needs_dense_block: ClassVar[bool] = True

    matrices: list[str]
    ends: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """Whether the group holds a non-linearity."""
        return {"holds_nonlinearity": self.holds_nonlinearity}

    @property
    def holds_nonlinearity(self) -> bool:
        """Whether one of its maps reads another's output; attention, an activation function or a norm lies between."""
        return len(self.ends) < len(self.matrices)

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Outputs:
        """Compute the outputs of the ends, concatenated along the last dimension."""
        return torch.cat(replay.outputs(self.blocks[0].index, hidden, self.ends), dim=-1)


@dataclass(frozen=True)
class Windows:
    """Which linear maps of a block are recovered together.

    Args:
        groups: Lists of shell patterns (`fnmatch`, case-sensitive) of full module names, one list a window of each
            block, in the order of recovery: `[["*.q_proj", "*.k_proj", "*.v_proj"], ["*.o_proj"]]`. A group whose
            maps do not read each other holds no non-linearity; with `*.o_proj` the first would hold attention.
    """

    groups: list[list[str]]

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups):
            raise ValueError(f"windows.groups needs at least one group of at least one pattern, got {self.groups}")


def kind_of(name: str) -> str:
    """The name that a window shares with those at the same place of other blocks: `attention` of `003.attention`."""
    return name.partition(".")[2] or "block"


def submodule_windows(replay: Replay) -> list[Window]:
    """Lay out the mixer and the MLP window of every block, in the order of depth.

    The mixer window owns the parameters that its output depends on, the MLP window all others of the block. Neither
    owns parameters that both depend on (the input norm, where attention and MLP run in parallel). A block that no mixer
    divides is one window.
    """
    windows: list[Window] = []
    for block in replay.anatomy.blocks:
        if block.mixer is None:
            windows.append(BlockWindow(f"{block.index:03d}", [block], list(block.parameters()), []))
            continue
        by_attention, by_mlp = replay.dependencies(block.index)
        shared = [name for name in block.parameters() if name in by_attention & by_mlp]
        attention = [name for name in block.parameters() if name in by_attention - by_mlp]
        # Not `by_mlp`: an expert to which the probe routes no token is the MLP's all the same.
        mlp = [name for name in block.parameters() if name not in by_attention]
        windows.append(MixerWindow(f"{block.index:03d}.{block.mixer_kind}", [block], attention, shared))
        windows.append(MLPWindow(f"{block.index:03d}.mlp", [block], mlp, shared))
    return windows


def block_windows(anatomy: Anatomy, size: int, stride: int | None = None) -> list[BlockWindow]:
    """Lay out windows of `size` consecutive blocks that cover the model.

    Args:
        anatomy: The blocks.
        size: Blocks a window, at least 1. The last window is shorter where fewer are left; a size beyond the
            depth gives one window over all blocks.
        stride: Blocks from one window's start to the next one's, `size` if None. Where it is smaller, windows
            overlap, and both own the blocks that they share.
    """
    if size < 1:
        raise ValueError(f"A block window holds at least one block, got size {size}.")
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"Block windows need a stride of at least 1 and at most their size {size}, got {stride}.")
    windows = []
    # The last start is the first whose window reaches the last block.
    for start in range(0, max(len(anatomy.blocks) - size, 0) + stride, stride):
        blocks = anatomy.blocks[start : start + size]
        name = "-".join(f"{index:03d}" for index in sorted({blocks[0].index, blocks[-1].index}))
        owned = [parameter for block in blocks for parameter in block.parameters()]
        windows.append(BlockWindow(name, blocks, owned, shared=[]))
    return windows


def group_windows(replay: Replay, groups: Sequence[Sequence[str]]) -> list[GroupWindow]:
    """Lay out one window per block and group of linear maps, in the order of depth, then of `groups`.

    Each owns the weights and biases of its maps and nothing else. A block in which a group matches nothing has
    no window of this group.

    Args:
        replay: The model.
        groups: Shell patterns of full module names: see `Windows`.

    Raises:
        ValueError: If a pattern matches no linear map, two groups match the same one, or one is not called once
            for all tokens.
    """
    require_groups(replay.anatomy, groups)
    digits = len(str(len(groups) - 1))  # so that names sort as groups do
    windows = []
    for block in replay.anatomy.blocks:
        for number, group in enumerate(groups):
            found = [name for name in block.matrices if _matches(name, group)]
            if not found:
                continue
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in found)  # one for all experts
            owned = [name for name in block.parameters() if name.rpartition(".")[0] in found]
            name = f"{block.index:03d}.{number:0{digits}d}-{'-'.join(kinds)}"
            windows.append(GroupWindow(name, [block], owned, [], found, replay.ends(block.index, found)))
    return windows


def require_groups(anatomy: Anatomy, groups: Sequence[Sequence[str]]) -> list[Matrix]:
    """Refuse groups that do not fit a model.

    Args:
        anatomy: The blocks of the model.
        groups: Shell patterns of full module names: see `Windows`.

    Returns:
        The matrices in a group.

    Raises:
        ValueError: If a pattern matches no linear map, or two groups match the same one.
    """
    matrices = [name for block in anatomy.blocks for name in block.matrices]
    for pattern in (pattern for group in groups for pattern in group):
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ValueError(
                f"Each pattern of windows.groups must match the module name of a linear map in a block, {pattern!r} "
                f"matches none of {len(matrices)}, which begin with {', '.join(matrices[:MAX_LISTED])}."
            )
    for name in matrices:
        matching = [list(group) for group in groups if _matches(name, group)]
        if len(matching) > 1:
            raise ValueError(
                f"Each linear map may belong to only one group of windows.groups, {name} matches {len(matching)}: "
                f"{' and '.join(map(str, matching))}. Make their patterns narrower, such as `*.mlp.c_proj`."
            )
    grouped = (one for block in anatomy.blocks for one in block.matrices.values())
    return [one for one in grouped if any(_matches(one.name, group) for group in groups)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

"""Windows: the parts of a model that are recovered at once.

No forward pass is rewritten here. An attention window is a tapped block, an MLP window a stubbed one (so
norms, residuals and multipliers all come from the model), a block window one or more replayed blocks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from recon.anatomy import Anatomy, Block
from recon.calls import Hidden
from recon.replay import Replay


@dataclass(frozen=True, eq=False)
class Window(ABC):
    """A part of the model that is recovered at once.

    Args:
        name: Such as `003.attention`, `003.mlp`, `002-004`; names sort in the order of depth.
        blocks: The consecutive blocks that it lies in.
        owned: The parameters that it trains, under their names in `model.named_parameters()`.
        shared: Parameters that it depends on but leaves frozen, since the other window of its block
            depends on them too.
    """

    name: str
    blocks: list[Block]
    owned: list[str]
    shared: list[str]

    @property
    def indices(self) -> list[int]:
        """Indices of its blocks."""
        return [block.index for block in self.blocks]

    @abstractmethod
    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """What the window makes of its inputs.

        Args:
            replay: The model that holds the window.
            hidden: What enters its first block.
            attention: What the attention submodule returned; only an `MLPWindow` reads it.
        """


class AttentionWindow(Window):
    """One block up to the point where its attention submodule returns."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """The output of the attention submodule."""
        return replay.tap(self.blocks[0].index, hidden)


class MLPWindow(Window):
    """One block with the output of its attention submodule given."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """The output of the block; `attention` is required."""
        if attention is None:
            raise ValueError(
                f"Window {self.name} needs the output of {self.blocks[0].attention_name} as `attention`, got "
                f"None. Record it with `Replay.tap` or `Replay.run_and_tap`."
            )
        return replay.stub(self.blocks[0].index, hidden, attention)


class BlockWindow(Window):
    """One or more consecutive blocks."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """The output of the last block."""
        for block in self.blocks:
            hidden = replay.run(block.index, hidden)
        return hidden


def submodule_windows(replay: Replay) -> list[Window]:
    """Attention and MLP window of every block, in the order of depth.

    The attention window owns what its output depends on, the MLP window everything else in the block.
    What both depend on (the input norm, where attention and MLP run in parallel) neither owns.
    """
    windows: list[Window] = []
    for block in replay.anatomy.blocks:
        by_attention, by_mlp = replay.dependencies(block.index)
        shared = [name for name in block.parameters() if name in by_attention & by_mlp]
        attention = [name for name in block.parameters() if name in by_attention - by_mlp]
        # Not `by_mlp`: an expert to which the probe routes no token is the MLP's all the same.
        mlp = [name for name in block.parameters() if name not in by_attention]
        windows.append(AttentionWindow(f"{block.index:03d}.attention", [block], attention, shared))
        windows.append(MLPWindow(f"{block.index:03d}.mlp", [block], mlp, shared))
    return windows


def block_windows(anatomy: Anatomy, size: int) -> list[BlockWindow]:
    """Windows of `size` consecutive blocks that cover the model.

    Args:
        anatomy: The blocks.
        size: Blocks a window, at least 1. The last window is shorter if the depth is no multiple of it;
            a size beyond the depth gives one window over all blocks.
    """
    if size < 1:
        raise ValueError(f"A block window holds at least one block, got size {size}.")
    windows = []
    for start in range(0, len(anatomy.blocks), size):
        blocks = anatomy.blocks[start : start + size]
        name = "-".join(f"{index:03d}" for index in sorted({blocks[0].index, blocks[-1].index}))
        owned = [parameter for block in blocks for parameter in block.parameters()]
        windows.append(BlockWindow(name, blocks, owned, shared=[]))
    return windows

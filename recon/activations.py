"""What enters a window and what it should produce, for every calibration sequence.

The dense model is walked from the first block to the last, once. At any time there are at most two
copies of the hidden states (before and after the current blocks) and one attention output.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recon.replay import Replay


class Activations:
    """Dense inputs and outputs of the blocks under way.

    Args:
        replay: The model, its weights dense in every block not yet passed.
        tokens: Calibration sequences, int64[num_sequences, seq_len].
        batch_size: Sequences per forward pass.
        device: Where the model computes; the activations are kept there too.

    Attributes:
        hidden: What enters the current blocks, [num_sequences, seq_len, dim].
        attention: What the attention submodule of the current block returns; None before `enter`.
        output: What the current blocks return; None before `enter`.
    """

    def __init__(self, replay: Replay, tokens: Int[Tensor, "num seq"], batch_size: int, device: torch.device) -> None:
        self.replay = replay
        self.batch_size = batch_size
        with torch.no_grad():
            pieces = [replay.embed(batch.to(device)) for batch in tokens.split(batch_size)]
        self.hidden: Float[Tensor, "num seq dim"] = torch.cat(pieces)
        self.attention: Float[Tensor, "num seq dim"] | None = None
        self.output: Float[Tensor, "num seq dim"] | None = None
        self.blocks: Sequence[int] = ()

    def enter(self, blocks: Sequence[int]) -> None:
        """Go on to consecutive `blocks` and compute what they return; nothing happens if they are current.

        The attention output is recorded where there is one block. `hidden` is then what these blocks
        take in. Blocks between the current ones and these are passed on the way.
        """
        if list(blocks) == list(self.blocks):
            return
        following = self.blocks[-1] + 1 if self.blocks else 0
        assert blocks[0] >= following, f"blocks are walked in order: {blocks} cannot follow {self.blocks}"
        for passed in range(following, blocks[0]):
            self._advance([passed])
        self._advance(blocks)

    def _advance(self, blocks: Sequence[int]) -> None:
        if self.output is not None:
            self.hidden = self.output
        self.blocks = list(blocks)
        self.attention = torch.empty_like(self.hidden) if len(blocks) == 1 else None
        self.output = torch.empty_like(self.hidden)
        self.compute()

    @torch.no_grad()
    def compute(self) -> None:
        """Compute what the current blocks return with the weights that they have now.

        Raises:
            FloatingPointError: If an output is no number, naming the block and the batch.
        """
        assert self.output is not None, "enter blocks first"
        for start in range(0, len(self.hidden), self.batch_size):
            rows = slice(start, start + self.batch_size)
            hidden = self.hidden[rows]
            if self.attention is not None:
                self.attention[rows], hidden = self.replay.run_and_tap(self.blocks[0], hidden)
            else:
                for block in self.blocks:
                    hidden = self.replay.run(block, hidden)
            if not hidden.isfinite().all():  # a sum of finite fp16 numbers may be infinite
                raise FloatingPointError(
                    f"hidden states must be finite, got NaN or infinity after block {self.blocks[-1]} in the "
                    f"batch that begins with sequence {start}; check the weights, or load the model in a wider dtype"
                )
            self.output[rows] = hidden

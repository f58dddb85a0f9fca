"""Inputs and targets of the windows, for every calibration sequence.

The hidden states walk through the model once, from the first block to the last, while the blocks behind them are
recovered. At most two copies of them exist at a time (inputs and targets), and one copy of attention's outputs.
Overlapping windows on dense inputs keep one copy more for each window that begins inside another.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recon.calibration.collection import collect
from recon.calibration.pairs import collect_pairs
from recon.calibration.prefetch import Batch, Key, Prefetch
from recon.calibration.rows import Rows
from recon.calibration.statistics import InputStatistics, Need
from recon.calibration.storage import ON_DEVICE, Storage
from recon.models.matrices import Matrix
from recon.models.replay import Replay
from recon.models.windows import Window
from recon.profiling.entries import Held
from recon.profiling.ledger import sampled

Propagation = Literal["dense", "recovered_local", "recovered"]
"""Inputs and targets of a window:

- `dense`: hidden states of the dense model, and the dense window's output for them. Windows are independent;
- `recovered_local`: outputs of the recovered blocks before the window, and the dense window's output for them. The
  window is repaired, and passes on the error that enters it;
- `recovered`: outputs of the recovered blocks before the window, and hidden states of the dense model behind it. The
  window makes up for the error that enters it, too.
"""

Observation = Need | Literal["cross"]
"""Statistics of the inputs of matrices; `cross` are Gram matrices of recovered and dense inputs together."""


def _walking(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compute without gradients, and expert by expert, in every walk: hidden states must not depend on statistics."""

    @wraps(method)
    def walk(self: "Activations", *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.replay.expert_by_expert():
            return method(self, *args, **kwargs)

    return walk


class Activations:
    """Inputs and targets of the blocks under way.

    Args:
        replay: The model, its weights dense in every block not yet entered.
        tokens: Calibration sequences, int64[num_sequences, seq_len].
        batch_size: Sequences per forward pass.
        device: Device that the model computes on.
        propagation: Which inputs and targets windows have.
        tap: Whether to record the outputs of the token mixer where a single block is entered that it divides.
        starts: Indices of blocks at which later windows begin. If windows overlap, the inputs of these blocks are kept
            from the time when the blocks before them were dense.
        storage: Place and precision of the activations.

    Attributes:
        hidden: Inputs of the current blocks, [num_sequences, seq_len, dim].
        attention: Targets of the token mixer of the current block, and after `pass_attention` its outputs;
            None where they are not recorded.
        output: Targets of the current blocks; None before `enter`.
        recorded: Targets of a window that ends elsewhere, after `record`.
        blocks: Indices of the current blocks.
    """

    def __init__(
        self,
        replay: Replay,
        tokens: Int[Tensor, "num seq"],
        batch_size: int,
        device: torch.device,
        propagation: Propagation = "dense",
        tap: bool = False,
        starts: Collection[int] = (),
        storage: Storage = ON_DEVICE,
    ) -> None:
        self.replay, self.batch_size, self.propagation = replay, batch_size, propagation
        self.tap, self.starts = tap, frozenset(starts)
        self.device, self.storage = device, storage
        self._prefetch = Prefetch(device) if device.type == "cuda" and storage.may_leave else None
        self.hidden: Float[Tensor, "num seq dim"] = self._embed(tokens, storage.dtype)
        self.attention: Float[Tensor, "num seq dim"] | None = None
        self.output: Float[Tensor, "num seq dim"] | None = None
        self.recorded: Float[Tensor, "num seq features"] | None = None
        self.blocks: list[int] = []
        self._at = 0  # the block that `hidden` enters
        self._ahead = 0  # the block that the dense stream enters; weights are dense from here on
        self._adds = False  # whether the current block adds attention's output to its input
        self._kept: dict[int, Tensor] = {}  # block -> its dense inputs

    @torch.no_grad()
    def _embed(self, tokens: Int[Tensor, "num seq"], dtype: torch.dtype | None) -> Float[Tensor, "num seq dim"]:
        for start in sampled(range(0, len(tokens), self.batch_size), "embed"):
            piece = self.replay.embed(tokens[start : start + self.batch_size].to(self.device))
            if start == 0:
                self.dtype = piece.dtype  # of the model's computation
                hidden = self.storage.empty((len(tokens), *piece.shape[1:]), dtype or piece.dtype, self.device)
            hidden[start : start + self.batch_size] = piece
        return hidden

    def load(self, kept: Tensor, rows: slice | Rows) -> Tensor:
        """Load these sequences onto the compute device, in the model's dtype."""
        if kept.device == self.device:
            found = kept[rows] if isinstance(rows, slice) else kept[rows.on_device]
        elif kept.is_pinned():
            found = self._upload(kept, rows)
        else:  # the mapped pages of a file
            found = self._upload(self._pinned(kept, rows), slice(None))
        # Cast on the compute device: a copy that casts, too, would not overlap with computation.
        return found.to(self.dtype)

    def _upload(self, pinned: Tensor, rows: slice | Rows) -> Tensor:
        if isinstance(rows, slice):
            return pinned[rows].to(self.device, non_blocking=True)
        # One by one: gathered first, they would be copied twice.
        found = torch.empty((len(rows), *pinned.shape[1:]), dtype=pinned.dtype, device=self.device)
        for room, row in zip(found, rows.on_host.tolist(), strict=True):
            room.copy_(pinned[row], non_blocking=True)
        return found

    def _pinned(self, kept: Tensor, rows: slice | Rows) -> Tensor:
        """Gather sequences in pinned memory: a copy from elsewhere would wait for the computation."""
        found = kept[rows if isinstance(rows, slice) else rows.on_host]
        return torch.empty(found.shape, dtype=kept.dtype, pin_memory=True).copy_(found)

    def batch(self, window: Window, rows: slice | Rows) -> dict[str, Tensor]:
        """Load inputs and target of `window`, in the current blocks, for some sequences.

        Returns:
            `hidden` and `target`, and `attention` where the window takes it, each [batch, seq, dim].
        """
        batch = {"hidden": self.load(self.hidden, rows)}
        if window.takes_attention:
            assert self.attention is not None, "enter one block first, with `tap`"
            batch["attention"] = self.load(self.attention, rows)
        kept = {"attention": self.attention, "output": self.output, "recorded": self.recorded}[window.target]
        assert kept is not None, f"the target of {window.name} is there only once its blocks are entered"
        return batch | {"target": self.load(kept, rows)}

    def batches(self, keys: Iterable[Key], load: Callable[[Key], Batch]) -> Iterator[tuple[Key, Batch]]:
        """Yield each key with its batch, which `load` makes; one batch ahead where that is a copy to a CUDA device."""
        if self._prefetch is not None:
            return self._prefetch.batches(keys, load)
        return ((key, load(key)) for key in keys)

    def rows(self) -> Iterator[slice]:
        """Yield the rows of each batch, in order."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield slice(start, start + self.batch_size)

    @_walking
    def enter(
        self, blocks: Sequence[int], matrices: Mapping[str, Matrix] | None = None, need: Observation = "none"
    ) -> dict[str, InputStatistics]:
        """Go on to consecutive `blocks`; do nothing if they are current.

        Blocks between the current ones and these are passed on the way, with the weights that they have now.

        Args:
            blocks: Indices; the first may lie among the current blocks, the last may not.
            matrices: Name -> matrix, of blocks that were never entered before and are still dense.
            need: Statistics to collect of their inputs; `cross` only with `recovered`.

        Returns:
            Name of each matrix -> statistics of its inputs.

        Raises:
            FloatingPointError: If hidden states are no numbers, naming the block and the batch.
        """
        if list(blocks) == self.blocks:
            return {}
        matrices, start, stop = dict(matrices or {}), blocks[0], blocks[-1] + 1
        assert start >= self._at, f"blocks are walked in order: {blocks} cannot follow {self.blocks}"
        assert stop > self._ahead, f"blocks are walked in order: {blocks} cannot follow {self.blocks}"
        self.replay.keep(range(start, stop))
        tapped = self.tap and len(blocks) == 1 and self.replay.anatomy.blocks[start].mixer is not None
        self.attention = (self.attention if self.attention is not None else self._room()) if tapped else None
        if self.propagation != "dense":
            for index in range(self._at, start):
                self._pass(index, self.hidden, self.hidden)
        if self.propagation == "recovered":
            found = self._pass_both(start, stop, matrices, need)
        else:
            assert need != "cross", "there is one stream"
            with collect(matrices, need, self.replay.experts.rows) as found:
                (self._pass_dense if self.propagation == "dense" else self._pass_local)(start, stop)
        self.replay.hold(range(start, stop))
        self.blocks, self._at, self._ahead = list(blocks), start, stop
        self.recorded = None
        return self._noted(matrices, found)

    def _noted(
        self, matrices: Mapping[str, Matrix], statistics: dict[str, InputStatistics]
    ) -> dict[str, InputStatistics]:
        """Note the experts with fewer rows than inputs, and return the statistics."""
        for name, one in matrices.items():
            found = statistics[name]
            if one.index is not None and found.has_sums and found.num_tokens < one.shape[1]:
                self.replay.experts.few[name] = found.num_tokens
        return statistics

    def held(self) -> list[Held]:
        """List the copies of all sequences, for the memory ledger; those that exist, before `__init__` has ended."""
        own = vars(self)
        copies = [own.get(name) for name in ("hidden", "attention", "output", "recorded")]
        copies = [one for one in (*copies, *own.get("_kept", {}).values()) if one is not None]
        return [Held("calibration", one, on_host=self.storage.is_on_host(one)) for one in copies]

    def prepare(
        self, window: Window, matrices: Mapping[str, Matrix] | None = None, need: Need = "none"
    ) -> dict[str, InputStatistics]:
        """Complete inputs and target of `window`, whose blocks are entered and which is still dense.

        Args:
            window: The next window to recover.
            matrices: Matrices of the window whose inputs are known only after attention is recovered.
            need: Statistics to collect of their inputs.

        Returns:
            Name of each matrix -> statistics of its inputs.
        """
        if window.target == "recorded":
            self.record(window)
        return self.pass_attention(matrices, need) if window.takes_attention else {}

    @_walking
    def record(self, window: Window) -> None:
        """Record the outputs of `window`, with its present weights, for the inputs of the current blocks."""
        self.recorded = None  # frees the last one
        for rows, hidden in self._loaded(self.hidden, "record"):
            piece = window.forward(self.replay, hidden)
            if self.recorded is None:
                self.recorded = self._room(piece.shape[1:])
            self.recorded[rows] = piece

    @_walking
    def pass_attention(
        self, matrices: Mapping[str, Matrix] | None = None, need: Need = "none"
    ) -> dict[str, InputStatistics]:
        """Replace the targets of attention by its outputs, now that it is recovered; do nothing for dense inputs.

        Args:
            matrices: Matrices of the current block behind its attention, still dense.
            need: Statistics to collect of their inputs.

        Returns:
            Name of each matrix -> statistics of its inputs.
        """
        if self.propagation == "dense":
            return {}
        assert self.attention is not None, "enter one block first, with `tap`"
        assert self.output is not None
        matrices, (block,) = dict(matrices or {}), self.blocks
        with collect(matrices, need, self.replay.experts.rows) as found:
            for rows, hidden in self._loaded(self.hidden, "pass attention"):
                attention = self.replay.tap(block, hidden)
                self.attention[rows] = attention
                if self.propagation == "recovered_local":
                    self.output[rows] = self.replay.stub(block, hidden, attention)
                elif need != "none":
                    self.replay.stub(block, hidden, attention)
        return self._noted(matrices, found)

    @_walking
    def compute(self) -> None:
        """Replace the targets of the current blocks by their outputs, with their present weights.

        Raises:
            FloatingPointError: If an output is no number, naming the block and the batch.
        """
        assert self.output is not None, "enter blocks first"
        source = self.hidden
        for index in self.blocks:
            self._pass(index, source, self.output)
            source = self.output

    def _pass_dense(self, start: int, stop: int) -> None:
        """Walk the one dense stream on, and keep the inputs of block `start` and of the starts behind it."""
        assert start >= self._ahead or start in self._kept, f"walked in order: block {start} was not to be kept"
        stream = self.hidden if self.output is None else self.output
        self.hidden = stream  # frees the inputs of the blocks before
        for index in range(self._ahead, stop):
            output = stream
            if index == start or index in self.starts:
                self._kept[index] = stream
                output = self._room()
            self._pass(index, stream, output, self.attention if index == start else None)
            stream = output
        self.hidden, self.output = self._kept.pop(start), stream

    def _pass_local(self, start: int, stop: int) -> None:
        """Compute the dense blocks' outputs for recovered hidden states."""
        assert start >= self._ahead, "windows overlap: the dense weights are gone"
        self.output = self.output if self.output is not None else self._room()
        source = self.hidden
        for index in range(start, stop):
            self._pass(index, source, self.output, self.attention)
            source = self.output

    def _pass_both(
        self, start: int, stop: int, matrices: dict[str, Matrix], need: Observation
    ) -> dict[str, InputStatistics]:
        """Walk the dense stream on; send the recovered one through the dense blocks if its statistics are needed."""
        if self.output is None:
            self.output = self._room().copy_(self.hidden)
        for index in range(self._ahead, start):
            self._pass(index, self.output, self.output)
        self._adds = self.attention is not None and self.replay.adds_attention(start)
        passed, fresh = range(start, self._ahead), range(max(start, self._ahead), stop)
        if need == "cross":
            with collect_pairs(matrices, self.replay.experts.rows) as pairs:
                for rows, hidden in self._loaded(self.hidden, "walk both"):
                    hidden = self._through(passed, hidden)
                    for index in fresh:  # both streams block by block: only one block's dense inputs are held
                        with pairs.dense():
                            self._pass_rows(index, rows, self.load(self.output, rows))
                        with pairs.recovered():
                            hidden = self.replay.run(index, hidden)
            return pairs.statistics
        with collect(matrices, need, self.replay.experts.rows) as found:
            for _, hidden in self._loaded(self.hidden, "walk recovered") if need != "none" else ():
                self._through([*passed, *fresh], hidden)
        for index in fresh:
            for rows, dense in self._loaded(self.output, "walk"):
                self._pass_rows(index, rows, dense)
        return found

    def _pass_rows(self, index: int, rows: slice, dense: Tensor) -> None:
        """Send some sequences of the dense stream through a block, in place, and record the targets of attention."""
        assert self.output is not None
        if self.attention is not None and self._adds:
            # The stream behind attention then becomes the dense one: attention makes up for the error of its input.
            attention, output = self.replay.run_and_tap(index, dense)
            self.attention[rows] = attention + (dense - self.load(self.hidden, rows))
            self._require_finite(output, index, rows)
        else:
            output = self._run(index, rows, dense, self.attention)
        self.output[rows] = output

    def _through(self, blocks: Iterable[int], hidden: Tensor) -> Tensor:
        for index in blocks:
            hidden = self.replay.run(index, hidden)
        return hidden

    def _pass(self, index: int, source: Tensor, output: Tensor, attention: Tensor | None = None) -> None:
        for rows, hidden in self._loaded(source, "walk"):
            output[rows] = self._run(index, rows, hidden, attention)

    def _run(self, index: int, rows: slice, hidden: Tensor, attention: Tensor | None) -> Tensor:
        """Run one block on some sequences, and record attention's outputs in `attention` unless that is None."""
        if attention is not None:
            attention[rows], output = self.replay.run_and_tap(index, hidden)
        else:
            output = self.replay.run(index, hidden)
        self._require_finite(output, index, rows)
        return output

    def _require_finite(self, output: Tensor, index: int, rows: slice) -> None:
        if not output.isfinite().all():  # a sum of finite fp16 numbers may be infinite
            raise FloatingPointError(
                f"hidden states must be finite, got NaN or infinity after block {index} in the batch that begins "
                f"with sequence {rows.start}; check the weights, or load the model in a wider dtype"
            )

    def _loaded(self, kept: Tensor, stage: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and hidden states of each batch; `stage` is the pass's name in the memory ledger.

        A batch may be overwritten in `kept` while it is in use, but none behind it.
        """
        return sampled(self.batches(self.rows(), lambda rows: self.load(kept, rows)), stage)

    def _room(self, shape: Sequence[int] | None = None) -> Tensor:
        """Allocate a copy of the hidden states, or one of `shape` for each sequence."""
        shape = self.hidden.shape if shape is None else (len(self.hidden), *shape)
        return self.storage.empty(shape, self.hidden.dtype, self.device)

"""Collecting statistics of two streams of the same tokens: the dense model's, and the recovered model's.

A matrix that takes recovered inputs X and should return the dense matrix's output for dense inputs X_d poses a
least-squares problem of X^T X, X_d^T X and X_d^T X_d. The sums are made batch by batch; of the inputs themselves only
the dense ones of one batch are held.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from recon.calibration.collection import Collector, SharedInput
from recon.calibration.statistics import InputStatistics, full_fp32
from recon.models.experts import ExpertRows
from recon.models.matrices import Matrix
from recon.profiling.ledger import claim


@contextmanager
def collect_pairs(matrices: Mapping[str, Matrix], experts: ExpertRows = "routed") -> "Iterator[Pairs]":
    """Sum the Gram and cross-Gram matrices of the inputs of `matrices` in two streams of the same tokens.

    Matrices that share their input share the tensors of their statistics too; treat those as read-only.

    Args:
        matrices: Name -> matrix. Inputs may have any shape (..., in).
        experts: Rows of slices; two routers choose differently, so slices need `all`.

    Yields:
        Contexts to run each batch in, the dense stream first. Its `statistics` are filled when the context ends
        without an exception: name -> the Gram matrix of the recovered inputs, `cross` and `dense_gram`.

    Raises:
        ValueError: If an input holds NaN or Inf, if a matrix was never called or does not see as many tokens in both
            streams, if matrices that shared their first input do not share a later one, or for routed rows of slices.
    """
    if experts == "routed" and (slices := [name for name, one in matrices.items() if one.index is not None]):
        raise ValueError(
            f"recovered inputs with dense targets need the same tokens to enter `{slices[0]}` in both streams, got "
            f"pruning.experts: routed, where the router of each stream chooses; choose pruning.experts: all, or "
            f"model.propagation: dense or recovered_local"
        )
    pairs = Pairs(matrices, experts)
    yield pairs
    pairs.finish()


class Pairs:
    """Two streams of inputs side by side; see `collect_pairs`.

    Attributes:
        statistics: Name -> statistics, empty until both streams have ended.
    """

    def __init__(self, matrices: Mapping[str, Matrix], experts: ExpertRows = "routed") -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._matrices = matrices
        self._dense = _DenseCollector(matrices, experts)
        self._recovered = _RecoveredCollector(matrices, experts, self._dense)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the dense stream of a batch, or of a part of the model, inside."""
        assert not self._dense.waiting(), "the recovered stream follows each dense one"
        with self._dense.watching(self._matrices):
            yield

    @contextmanager
    def recovered(self) -> Iterator[None]:
        """Run the recovered stream of the same batch and part inside.

        Raises:
            ValueError: If a matrix that was called in the dense stream was not called in this one.
        """
        with self._recovered.watching(self._matrices):
            yield
        if waiting := self._dense.waiting():
            raise _not_aligned(waiting[0], "it was called more often in the dense stream")

    def finish(self) -> None:
        """Fill `statistics`."""
        assert not self._dense.waiting(), "the recovered stream follows each dense one"
        for name in self._matrices:
            self.statistics[name] = self._recovered.result(name)


class _DenseInput(SharedInput):
    """Accumulates G_d, and holds the tokens until their recovered twins come."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__("gram", in_features, device)
        self.held: deque[Tensor] = deque()  # one for each call; a matrix may be called several times

    def add(self, x: Tensor) -> bool:
        self.held.append(x.detach().reshape(-1, x.shape[-1]).clone())  # the model may go on to edit x in place
        claim("calibration", self.held[-1])
        return super().add(x)


class _RecoveredInput(SharedInput):
    """Accumulates G, and C with the tokens that its dense twin holds."""

    def __init__(self, twin: _DenseInput) -> None:
        super().__init__("gram", len(twin.total), twin.total.device)
        self.twin = twin
        self.cross = torch.zeros_like(self.total)
        claim("gram", self.cross)

    def add(self, x: Tensor) -> bool:
        with full_fp32(x.device):  # finite wherever both Gram matrices are
            tokens = x.detach().reshape(-1, x.shape[-1]).float()
            self.cross.addmm_(self.twin.held.popleft().float().T, tokens)
        return super().add(x)


class _DenseCollector(Collector):
    inputs = "dense inputs"

    def __init__(self, matrices: Mapping[str, Matrix], experts: ExpertRows) -> None:
        super().__init__("gram", matrices, experts)

    def waiting(self) -> list[str]:
        """The matrices whose dense inputs still wait for the recovered ones."""
        return [name for name, shared in self.input_of.items() if isinstance(shared, _DenseInput) and shared.held]

    def _start(self, in_features: int, device: torch.device) -> SharedInput:
        return _DenseInput(in_features, device)


class _RecoveredCollector(Collector):
    """Shares what the dense stream shares."""

    inputs = "recovered inputs"

    def __init__(self, matrices: Mapping[str, Matrix], experts: ExpertRows, dense: _DenseCollector) -> None:
        super().__init__("gram", matrices, experts)
        self._dense = dense
        self._of_twin: dict[SharedInput, _RecoveredInput] = {}

    def result(self, name: str) -> InputStatistics:
        """All sums of the matrix `name` once all calls were made."""
        found, dense = super().result(name), self._dense.result(name)
        shared = self.input_of[name]
        assert isinstance(shared, _RecoveredInput)
        return InputStatistics(found.num_tokens, gram=found.gram, cross=shared.cross, dense_gram=dense.gram)

    def _find_or_start(self, name: str, x: Tensor, in_features: int) -> SharedInput:
        twin = self._dense.input_of.get(name)
        if not isinstance(twin, _DenseInput):
            raise _not_aligned(name, "it was not called in the dense stream")
        if twin not in self._of_twin:
            self._of_twin[twin] = _RecoveredInput(twin)
        return self._of_twin[twin]

    def _add(self, shared: SharedInput, x: Tensor, name: str, batch: int) -> None:
        assert isinstance(shared, _RecoveredInput)
        held, received = shared.twin.held, x.numel() // x.shape[-1]
        if not held or len(held[0]) != received:
            expected = f"{len(held[0])} tokens" if held else "no call"
            raise _not_aligned(name, f"{expected} in the dense stream, {received} tokens in the other, batch {batch}")
        super()._add(shared, x, name, batch)


def _not_aligned(name: str, what: str) -> ValueError:
    return ValueError(
        f"recovered inputs with dense targets need the same tokens to enter `{name}` in both streams, got something "
        f"else: {what}; exclude it with `pruning.exclude` or choose model.propagation: dense or recovered_local"
    )

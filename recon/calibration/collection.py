"""Collecting statistics of the inputs of matrices while a model runs.

Matrices that read the same tensor (query, key and value; gate and up) share one sum, so a block costs four Gram
matrices instead of seven. The first forward call shows which matrices share, for any architecture.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recon.calibration.gram import StartGram
from recon.calibration.statistics import InputStatistics, Need, full_fp32
from recon.models.linear import weight_out_in
from recon.profiling.ledger import claim


@contextmanager
def collect(matrices: dict[str, nn.Module], need: Need) -> Iterator[dict[str, InputStatistics]]:
    """Accumulate the statistics of the inputs of `matrices` over all forward calls inside the context.

    Every position counts as a token: run sequences without padding. Matrices that share their input share the
    tensors of their statistics too; treat those as read-only.

    Args:
        matrices: Name -> Linear or Conv1D module. Inputs may have any shape (..., in).
        need: "gram" collects G (the norms are its diagonal), "start gram" G as exact as a start needs it, "norms" the
            sums of squares, "none" nothing.

    Yields:
        A dict that is filled when the context ends without an exception: name -> statistics.

    Raises:
        ValueError: If an input holds NaN or Inf, if a matrix was never called, or if matrices that shared
            their first input do not share a later one.
    """
    statistics: dict[str, InputStatistics] = {}
    collector = Collector(need)
    with collector.watching(matrices if need != "none" else {}):
        yield statistics
    for name in matrices:
        statistics[name] = collector.result(name) if need != "none" else InputStatistics(num_tokens=0)


class SharedInput:
    """One sum over a stream of inputs, and a reference to the latest of them."""

    def __init__(self, need: Need, in_features: int, device: torch.device) -> None:
        shape = (in_features,) if need == "norms" else (in_features, in_features)
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)
        claim("gram", self.total)
        self._start_gram = StartGram(self.total) if need == "start gram" else None
        self.num_tokens = 0
        self.num_calls = 0
        self._latest: weakref.ref[Tensor] | None = None
        self._version: int | None = None

    def add(self, x: Tensor) -> bool:
        """Add the tokens of `x`; False if the sum has become NaN or infinite."""
        # A weak reference, for id() is reused once a tensor is freed, and a strong one would keep the inputs
        # of a whole model alive (3 GB for 2048 tokens of a 7B model). In-place edits change the version.
        self._latest, self._version = weakref.ref(x), _version(x)
        self.num_calls += 1
        tokens = x.detach().reshape(-1, x.shape[-1])
        self.num_tokens += tokens.shape[0]
        if self._start_gram is not None:
            self._start_gram.add(tokens)
            return bool(self.total.diagonal().sum().isfinite())
        with full_fp32(x.device):
            tokens = tokens.float()
            if self.total.ndim == 2:
                self.total.addmm_(tokens.T, tokens)
                return bool(self.total.diagonal().sum().isfinite())
            self.total += tokens.square().sum(0)
            return bool(self.total.sum().isfinite())

    def finish(self) -> Tensor:
        """Complete the sum after the last call, and return it."""
        if self._start_gram is not None:
            self._start_gram.finish()
        return self.total

    def is_latest(self, x: Tensor) -> bool:
        """Whether `x` is the tensor that was added last, and still holds the same."""
        return self._latest is not None and self._latest() is x and self._version == _version(x)


class Collector:
    """Assigns matrices to shared inputs in their first call, and checks that later calls share alike.

    Attributes:
        inputs: Name of the inputs in error messages.
        input_of: Name of each matrix that was called -> its input.
    """

    inputs = "inputs"

    def __init__(self, need: Need) -> None:
        self._need: Need = need
        self.input_of: dict[str, SharedInput] = {}
        self._num_calls: dict[str, int] = {}

    @contextmanager
    def watching(self, matrices: dict[str, nn.Module]) -> Iterator[None]:
        """Collect from every forward call of `matrices` within the context."""
        hooks = [
            module.register_forward_pre_hook(partial(self.see, name), with_kwargs=True)
            for name, module in matrices.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the matrix `name`."""
        x: Tensor = (*args, *kwargs.values())[0]
        batch = self._num_calls.get(name, 0)
        self._num_calls[name] = batch + 1
        if name not in self.input_of:
            self.input_of[name] = self._find_or_start(name, x, weight_out_in(module).shape[1])
        shared = self.input_of[name]
        if batch == shared.num_calls:
            self._add(shared, x, name, batch)
        elif batch != shared.num_calls - 1 or not shared.is_latest(x):
            raise self._diverged(name, batch)

    def _add(self, shared: SharedInput, x: Tensor, name: str, batch: int) -> None:
        if not shared.add(x):
            raise ValueError(
                f"{self.inputs} need to be finite and their squares to fit fp32, got NaN or Inf in `{name}` in "
                f"batch {batch} (counted from 0); check that batch, the model's weights and its precision"
            )

    def result(self, name: str) -> InputStatistics:
        """Return the statistics of the matrix `name` after the last call."""
        if name not in self.input_of:
            raise ValueError(
                f"statistics need at least one forward call, got none for `{name}`; run the part of the "
                "model that holds it, use more calibration data, or exclude it with `pruning.exclude`"
            )
        shared = self.input_of[name]
        if self._num_calls[name] != shared.num_calls:
            raise self._diverged(name, self._num_calls[name])
        total = shared.finish()
        if self._need == "norms":
            return InputStatistics(shared.num_tokens, sum_squares=total)
        return InputStatistics(shared.num_tokens, gram=total)

    def _find_or_start(self, name: str, x: Tensor, in_features: int) -> SharedInput:
        for shared in self.input_of.values():
            if shared.num_calls == 1 and shared.is_latest(x):
                return shared
        return self._start(in_features, x.device)

    def _start(self, in_features: int, device: torch.device) -> SharedInput:
        return SharedInput(self._need, in_features, device)

    def _diverged(self, name: str, batch: int) -> ValueError:
        partners = [n for n, shared in self.input_of.items() if shared is self.input_of[name] and n != name]
        return ValueError(
            f"`{name}` shared its first input with {', '.join(f'`{n}`' for n in partners)} and needs to "
            f"share every one, but does not in batch {batch} (counted from 0); collect it in its own pass"
        )


def _version(x: Tensor) -> int | None:
    """Count of the in-place edits of `x`; None for inference tensors, which have none."""
    return None if x.is_inference() else x._version

"""Collecting statistics of the inputs of matrices while a model runs.

Matrices that read the same tensor (query, key and value; gate and up) share one sum, so a block costs four Gram
matrices instead of seven. The first forward call shows which matrices share, for any architecture.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recon.calibration.all_rows import visiting_all_experts
from recon.calibration.gram import StartGram
from recon.calibration.statistics import InputStatistics, Need, full_fp32
from recon.models.experts import ExpertRows
from recon.models.matrices import Matrix, parameters_of
from recon.models.products import Product, Products
from recon.profiling.ledger import claim


@contextmanager
def collect(
    matrices: Mapping[str, Matrix], need: Need, experts: ExpertRows = "routed"
) -> Iterator[dict[str, InputStatistics]]:
    """Accumulate the statistics of the inputs of `matrices` over all forward calls inside the context.

    Every position counts as a token: run sequences without padding. Matrices that share their input share the
    tensors of their statistics too; treat those as read-only. An expert without a row has statistics of zeros.

    Args:
        matrices: Name -> matrix. Inputs may have any shape (..., in). The model has to multiply slices one by one:
            see `recon.models.experts.expert_by_expert`.
        need: "gram" collects G (the norms are its diagonal), "start gram" G as exact as a start needs it, "norms" the
            sums of squares, "none" nothing.
        experts: Rows that the statistics of slices are made from.

    Yields:
        A dict that is filled when the context ends without an exception: name -> statistics.

    Raises:
        ValueError: If an input holds NaN or Inf, if a matrix was never called, if matrices that shared their first
            input do not share a later one, or if the rows of `experts` cannot be had.
    """
    statistics: dict[str, InputStatistics] = {}
    collector = Collector(need, matrices, experts)
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

    Args:
        need: See `collect`.
        matrices: Name -> matrix, of all whose result is asked for.
        experts: See `collect`.

    Attributes:
        inputs: Name of the inputs in error messages.
        input_of: Name of each matrix that was called -> its input.
    """

    inputs = "inputs"

    def __init__(self, need: Need, matrices: Mapping[str, Matrix], experts: ExpertRows = "routed") -> None:
        self._need: Need = need
        self._matrices, self._experts = matrices, experts
        self.input_of: dict[str, SharedInput] = {}
        self._num_calls: dict[str, int] = {}
        self._stacks: set[str] = set()  # names of the parameters whose slices were seen
        self._watches_slices = True

    @contextmanager
    def watching(self, matrices: Mapping[str, Matrix]) -> Iterator[None]:
        """Collect from every forward call of `matrices` within the context."""
        slices = {(one.parameter_name, one.index): name for name, one in matrices.items() if one.index is not None}

        def see(product: Product) -> None:
            self._stacks.add(product.name)
            name = slices.get((product.name, product.index))
            if name is not None and self._watches_slices:
                self.take(name, _rows(product), product.inputs.shape[-1])

        with ExitStack() as stack:
            for name, one in matrices.items():
                if one.index is None:
                    hook = partial(self.see, name)
                    stack.callback(one.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if stacked := [matrix for matrix in matrices.values() if matrix.index is not None]:
                stack.enter_context(Products(parameters_of(stacked), see))
                if self._experts == "all":
                    stack.enter_context(visiting_all_experts(stacked, self._watch_slices))
            yield

    def _watch_slices(self, watches: bool) -> None:
        self._watches_slices = watches

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the matrix `name`."""
        self.take(name, (*args, *kwargs.values())[0], self._matrices[name].shape[1])

    def take(self, name: str, x: Tensor, in_features: int) -> None:
        """Add the inputs of one call of the matrix `name`."""
        batch = self._num_calls.get(name, 0)
        self._num_calls[name] = batch + 1
        if name not in self.input_of:
            self.input_of[name] = self._find_or_start(name, x, in_features)
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
            matrix = self._matrices[name]
            if matrix.index is None or matrix.parameter_name not in self._stacks:
                raise ValueError(
                    f"statistics need at least one forward call, got none for `{name}`; run the part of the "
                    "model that holds it, use more calibration data, or exclude it with `pruning.exclude`"
                )
            self.input_of[name] = self._start(matrix.shape[1], matrix.parameter.device)  # no row was routed to it
            self._num_calls[name] = 0
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


def _rows(product: Product) -> Tensor:
    """The inputs of a product, without the rows that are there only for other slices of the same operation."""
    x = product.inputs
    return x[x.any(dim=-1)] if product.is_batched else x


def _version(x: Tensor) -> int | None:
    """Count of the in-place edits of `x`; None for inference tensors, which have none."""
    return None if x.is_inference() else x._version

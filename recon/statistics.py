"""Input statistics: what criteria and solvers know about the inputs X (tokens x in) of a matrix.

`collect` watches a model while somebody runs it. Matrices that read the same tensor (query, key and value;
gate and up) share one accumulation, so a block costs four Gram matrices instead of seven; the sharing is
seen in the first forward call, not read off an architecture.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recon.shapes import weight_out_in

Need = Literal["none", "norms", "gram"]


@dataclass
class InputStatistics:
    """Sums over the tokens that entered one matrix, in fp32.

    Args:
        num_tokens: Number of rows of X.
        sum_squares: sum_t X_tj^2 for each input j; None unless collected.
        gram: G = X^T X; None unless collected.
    """

    num_tokens: int
    sum_squares: Float[Tensor, "in_"] | None = None
    gram: Float[Tensor, "in_ in_"] | None = None

    @property
    def norms(self) -> Float[Tensor, "in_"]:
        """||X_j||_2 for each input j, from the sums of squares or the diagonal of G."""
        if self.sum_squares is not None:
            return self.sum_squares.sqrt()
        if self.gram is not None:
            return self.gram.diagonal().sqrt()
        raise ValueError('norms need statistics collected with need="norms" or need="gram", got neither')


@contextmanager
def collect(matrices: dict[str, nn.Module], need: Need) -> Iterator[dict[str, InputStatistics]]:
    """Accumulate the statistics of the inputs of `matrices` over all forward calls inside the context.

    Every position counts as a token: run sequences without padding. Matrices that share their input share the
    tensors of their statistics too; treat those as read-only.

    Args:
        matrices: Name -> Linear or Conv1D module. Inputs may have any shape (..., in).
        need: "gram" collects G (the norms are its diagonal), "norms" the sums of squares, "none" nothing.

    Yields:
        A dict that is filled when the context ends without an exception: name -> statistics.

    Raises:
        ValueError: If an input holds NaN or Inf, if a matrix was never called, or if matrices that shared
            their first input do not share a later one.
    """
    statistics: dict[str, InputStatistics] = {}
    collector = _Collector(need)
    watched = matrices.items() if need != "none" else ()
    hooks = [
        module.register_forward_pre_hook(partial(collector.see, name), with_kwargs=True) for name, module in watched
    ]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()
    for name in matrices:
        statistics[name] = collector.result(name) if need != "none" else InputStatistics(num_tokens=0)


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Compute fp32 products in fp32: no autocast, no TF32, whatever the training around it has chosen.

    With TF32 a Gram matrix has three digits and conjugate gradients stall at 1e-3.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    chosen = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, chosen, strict=True):
            backend.fp32_precision = precision


class _SharedInput:
    """One accumulation over a stream of inputs, and the latest of them."""

    def __init__(self, need: Need, in_features: int, device: torch.device) -> None:
        shape = (in_features, in_features) if need == "gram" else (in_features,)
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)
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
        with full_fp32(x.device):
            tokens = x.detach().reshape(-1, x.shape[-1]).float()
            self.num_tokens += tokens.shape[0]
            if self.total.ndim == 2:
                self.total.addmm_(tokens.T, tokens)
                return bool(self.total.diagonal().sum().isfinite())
            self.total += tokens.square().sum(0)
            return bool(self.total.sum().isfinite())

    def is_latest(self, x: Tensor) -> bool:
        return self._latest is not None and self._latest() is x and self._version == _version(x)


class _Collector:
    """Assigns matrices to shared inputs in their first call and holds them to it in later ones."""

    def __init__(self, need: Need) -> None:
        self._need: Need = need
        self._inputs: list[_SharedInput] = []
        self._input_of: dict[str, _SharedInput] = {}
        self._num_calls: dict[str, int] = {}

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the matrix `name`."""
        x: Tensor = (*args, *kwargs.values())[0]
        batch = self._num_calls.get(name, 0)
        self._num_calls[name] = batch + 1
        if name not in self._input_of:
            self._input_of[name] = self._find_or_start(x, weight_out_in(module).shape[1])
        shared = self._input_of[name]
        if batch == shared.num_calls:
            if not shared.add(x):
                raise ValueError(
                    f"inputs need to be finite and their squares to fit fp32, got NaN or Inf in `{name}` in "
                    f"batch {batch} (counted from 0); check that batch, the model's weights and its precision"
                )
        elif batch != shared.num_calls - 1 or not shared.is_latest(x):
            raise self._diverged(name, batch)

    def result(self, name: str) -> InputStatistics:
        """The statistics of the matrix `name` once all calls were made."""
        if name not in self._input_of:
            raise ValueError(
                f"statistics need at least one forward call, got none for `{name}`; run the part of the "
                "model that holds it, use more calibration data, or exclude it with `pruning.exclude`"
            )
        shared = self._input_of[name]
        if self._num_calls[name] != shared.num_calls:
            raise self._diverged(name, self._num_calls[name])
        if self._need == "gram":
            return InputStatistics(shared.num_tokens, gram=shared.total)
        return InputStatistics(shared.num_tokens, sum_squares=shared.total)

    def _find_or_start(self, x: Tensor, in_features: int) -> _SharedInput:
        for shared in self._inputs:
            if shared.num_calls == 1 and shared.is_latest(x):
                return shared
        self._inputs.append(_SharedInput(self._need, in_features, x.device))
        return self._inputs[-1]

    def _diverged(self, name: str, batch: int) -> ValueError:
        partners = [n for n, shared in self._input_of.items() if shared is self._input_of[name] and n != name]
        return ValueError(
            f"`{name}` shared its first input with {', '.join(f'`{n}`' for n in partners)} and needs to "
            f"share every one, but does not in batch {batch} (counted from 0); collect it in its own pass"
        )


def _version(x: Tensor) -> int | None:
    """How often `x` was edited in place; unknown for inference tensors."""
    return None if x.is_inference() else x._version

"""The rate of matrix products on a device, alone: what the operations of a fit are compared with."""

import math
import statistics
import time

import torch
from torch import Tensor


def product_rate(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str, seconds: float = 0.5) -> float:
    """Operations per second of [rows, inputs] x [inputs, outputs], the best of many calls in `seconds`."""
    left, right = (torch.randn(shape, dtype=dtype, device=device) for shape in ((rows, inputs), (inputs, outputs)))
    output = torch.empty(rows, outputs, dtype=dtype, device=device)
    operations = 2 * rows * inputs * outputs
    calls, times, end = 1, [], time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        taken = _seconds(calls, left, right, output)
        if taken < 0.01:  # too short for the clock
            calls = math.ceil(calls * 0.02 / max(taken, 1e-4))
        else:
            times.append(taken / calls)
    return operations / statistics.median(times)


def _seconds(calls: int, left: Tensor, right: Tensor, output: Tensor) -> float:
    if left.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        torch.mm(left, right, out=output)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started

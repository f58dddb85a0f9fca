"""Operations per second that a fit reaches, as a share of what this machine's matrix products reach.

Operations are counted as they are dispatched, in a first run of the same fit, and divided by the seconds of a second
one: dense products, pruned weights among them, and attention as if it were not causal; everything else is free.
Two rates of products are measured: of the sizes of the model's largest matrix, and of large square matrices.
"""

import io
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop

from recon.cli.fit import main as recon_fit
from recon.planner.fake.tracker import FORMULAS

from .bare_loop import QUICK, Size
from .fits import arguments, fit, say
from .rates import product_rate

SCOPES = ("matrix", "submodule", "block", "full")

aten = torch.ops.aten
ALL_FORMULAS: dict[Any, Callable[..., int]] = FORMULAS | {aten.addmm_: addmm_flop}


class Operations(TorchDispatchMode):
    """Counts floating-point operations of what is dispatched inside, a multiply-add being two."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if formula := ALL_FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **kwargs, out_val=output)
        return output


@dataclass(frozen=True)
class Work:
    """What is fitted.

    Args:
        options: Of `recon fit`.
        dtype: In which the training multiplies.
        product: Tokens of a step, inputs and outputs of the largest matrix.
        square: Side of the large square matrices.
        counted: Options of a shallower model whose operations are counted instead.
        times: How often the fit has those.
    """

    options: list[str]
    dtype: torch.dtype
    product: tuple[int, int, int]
    square: int
    counted: list[str] | None = None
    times: int = 1


def work(device: str, scope: str, quick: bool) -> Work:
    """The bundled model on a CPU, Llama-2-7B's shape with random weights on a CUDA device."""
    if device == "cuda":
        options = [
            *("-c", "models/llama-2-7b", "-c", "criteria/magnitude", "--model.lr", "1e-4", "--model.epochs", "1"),
            *("--model.dtype", "bfloat16", "--trainer.precision", "bf16-mixed", "--model.start", "pruned"),
            *("--model.offload", "host", "--model.activations", "host", "--model.batch_size", "2"),
            *("--data.num_sequences", "128", "--data.seq_len", "2048", "--data.num_validation", "4"),
            *("--trainer.accelerator", "cuda"),
        ]
        counted = [*options, "--model.shape.num_hidden_layers", "2"]  # all 32 blocks take as many
        return Work(options, torch.bfloat16, (2 * 2048, 4096, 11008), 8192, counted, 16)
    size = QUICK if quick else Size()
    epochs = [] if scope == "matrix" else ["--model.epochs", str(1 if quick else 2)]
    options = [*size.data_options, *epochs, "--trainer.accelerator", "cpu"]
    return Work(options, torch.float32, (8 * size.seq_len, 128, 384), 128 if quick else 2048)


def measure(
    directory: Path, quick: bool = False, device: str = "cpu", scopes: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Operations, seconds and shares, per scope; on CUDA of the submodule scope, for hours of others are not spent."""
    rows = []
    for scope in scopes or (("submodule",) if device == "cuda" else SCOPES):
        what = work(device, scope, quick)
        rates = [product_rate(*what.product, what.dtype, device), product_rate(*[what.square] * 3, what.dtype, device)]
        counted = arguments(scope, directory / f"{scope}-counted", *(what.counted or what.options))
        operations = what.times * count(counted)
        run = fit(scope, directory / scope, *what.options)
        rates.append(product_rate(*what.product, what.dtype, device))
        rates.append(product_rate(*[what.square] * 3, what.dtype, device))
        like_model, square = statistics.mean(rates[::2]), statistics.mean(rates[1::2])
        rate = operations / run.seconds
        rows.append(
            {
                "scope": scope,
                "operations": operations,
                "seconds": run.seconds,
                "rate": rate,
                "product": what.product,
                "product_rate": like_model,
                "share": rate / like_model,
                "square": what.square,
                "square_rate": square,
                "share_of_square": rate / square,
                "peak_device_bytes": run.report["peak_device_bytes"],
                "dtype": str(what.dtype).removeprefix("torch."),
            }
        )
        say(f"flop_rate: {scope}, {rate / 1e9:.1f} GFLOP/s of {like_model / 1e9:.1f}")
    return {"device": device, "rows": rows}


def count(args: list[str]) -> int:
    """Operations of the fit that `recon fit` makes with these arguments; pruning and evaluation are not in it."""
    operations, trainer_fit = Operations(), L.Trainer.fit

    def counted(*args: Any, **options: Any) -> None:
        with operations:
            trainer_fit(*args, **options)

    with mock.patch.object(L.Trainer, "fit", counted), redirect_stdout(io.StringIO()):
        recon_fit(args)
    return operations.total


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per scope."""
    lines = [
        "| scope | GFLOP | seconds | GFLOP/s | products like the model's, GFLOP/s | share | large squares, GFLOP/s | "
        "share | peak on device, GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        peak = "" if row["peak_device_bytes"] is None else f"{row['peak_device_bytes'] / 2**30:.2f}"
        numbers = [row["operations"] / 1e9, row["seconds"], row["rate"] / 1e9, row["product_rate"] / 1e9]
        cells = [*(f"{one:.1f}" for one in numbers), f"{row['share']:.1%}"]
        cells += [f"{row['square_rate'] / 1e9:.1f}", f"{row['share_of_square']:.1%}", peak]
        lines.append(f"| {row['scope']} | {' | '.join(cells)} |")
    if result["rows"]:
        row = result["rows"][0]
        sizes = " x ".join(map(str, row["product"]))
        lines += ["", f"Products like the model's largest: {sizes}, large squares {row['square']}, in {row['dtype']}."]
    return "\n".join(lines)

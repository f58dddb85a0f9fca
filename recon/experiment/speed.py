"""The speed of a run's model: products with one matrix of each shape, dense and in the storages for zeros."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low

import torch
from safetensors import safe_open
from torch import Tensor

from recon.basics.run_paths import RunPaths
from recon.evaluation.products import TOLERANCES, measure_storages
from recon.experiment.environment import environment
from recon.models.anatomy import Anatomy
from recon.models.loading import ModelSource
from recon.models.stored import dtype_of
from recon.models.weight_files import directory_digest, weight_places
from recon.pruning.bits import count_bits, unpack
from recon.pruning.masks import Masks
from recon.pruning.recorded_pattern import matrices_in, transposed_in
from recon.pruning.storages import STORAGES, fits_2_4, missing
from recon.pruning.whole_slices import removes_slices
from recon.report.speed import MatrixSpeed, Speed

log = logging.getLogger("recon")


@dataclass(frozen=True)
class SpeedOptions:
    """How to measure.

    Args:
        tokens: Rows of the inputs of a product.
        dtype: Name of the precision; that of the saved model if None.
        device: The device that computes.
        min_seconds: Least time spent on each product.
        seed: Decides the inputs.
    """

    tokens: tuple[int, ...]
    dtype: str | None
    device: torch.device
    min_seconds: float
    seed: int


def require_measurable(run: RunPaths) -> None:
    """Refuse a directory without a pruned model. Only the manifest is read.

    Raises:
        ValueError: If there is no such directory, or no model or no masks in it.
    """
    needs = f"recon speed needs the directory of a run with a pruned model, got {run.path}"
    if not run.path.is_dir():
        raise ValueError(f"{needs}, which does not exist; correct the path")
    if not run.manifest.records(run.model):
        raise ValueError(
            f"{needs}, which has no model of recon's; let the run end, prune with --save_model, or name a cell of a "
            f"comparison"
        )
    if not run.manifest.records(run.masks):
        raise ValueError(f"{needs}, which has no masks: its model was not pruned; name another run")


def measure_speed(run: RunPaths, options: SpeedOptions) -> Speed:
    """Time the products of a run's model. Nothing is written.

    Args:
        run: Its model and masks are checked first.
        options: How to measure.

    Raises:
        ValueError: If the directory holds no pruned model, a file is damaged, or the saved model is in no precision
            that recon computes in.
    """
    require_measurable(run)
    for path in (run.masks, run.model):
        run.manifest.require(path, "copy it again, or repeat the command of the run")
    masks = Masks.load(run.masks)
    if not masks.num_pruned:
        raise ValueError(f"recon speed needs pruned weights, got {run.masks}, which keeps all; name another run")
    if removes_slices(masks):
        raise ValueError(
            f"recon speed times sparse matrices, got {run.path}, whose model has lost whole experts and keeps dense "
            f"ones; name a run of a pattern of weights"
        )
    dtype = dtype_of(run.model) if options.dtype is None else getattr(torch, options.dtype)
    if dtype is None:
        raise ValueError(
            f"recon speed needs a model in float32, float16 or bfloat16, got {run.model} in another precision; choose "
            f"one, such as --dtype float32"
        )
    pattern = Masks.read_metadata(run.masks).get("pattern", "of an unknown pattern")
    return Speed(
        run_dir=str(run.path),
        pattern=pattern,
        sparsity=masks.sparsity,
        dtype=_name(dtype),
        tolerance=TOLERANCES[dtype],
        tokens=options.tokens,
        seed=options.seed,
        min_seconds=options.min_seconds,
        environment=environment(options.device) | {"capability": _capability(options.device)},
        digests={"masks": masks.fingerprint(), "model": directory_digest(run.model)},
        matrices=list(_matrices(run, masks, pattern, dtype, options)),
    )


def _matrices(
    run: RunPaths, masks: Masks, pattern: str, dtype: torch.dtype, options: SpeedOptions
) -> Iterable[MatrixSpeed]:
    """Measure one matrix of each shape, of several the one of median sparsity."""
    transposed = _transposed(run)
    shapes: dict[tuple[int, ...], list[tuple[float, str, str]]] = {}
    bits: dict[str, Tensor] = {}
    for parameter, whole in masks.shapes.items():
        for name, shape, bits[name] in matrices_in(parameter, masks.packed(parameter), whole):
            sparsity = 1 - count_bits(bits[name]) / math.prod(shape)
            shapes.setdefault(shape[::-1] if parameter in transposed else shape, []).append((sparsity, name, parameter))
    for (rows, columns), found in sorted(shapes.items()):
        sparsity, name, parameter = median_low(found)
        log.info(f"timing {rows} x {columns}: {name}")
        weight = _weight(run.model, parameter, masks.shapes[parameter])
        if count := masks.violations_of(parameter, weight):
            raise ValueError(
                f"recon speed needs pruned weights that are zero, got {count} of `{parameter}` in {run.model} that are "
                f"not; `recon verify {run.path}` tells more"
            )
        if name != parameter:
            weight = weight[int(name.rpartition(".")[2])]
        keep = unpack(bits[name], tuple(weight.shape))
        if parameter in transposed:
            keep, weight = keep.T, weight.T
        keep, weight = keep.contiguous(), weight.to(options.device, dtype).contiguous()
        place = options.device.type, _capability(options.device), _name(dtype)
        makers = {
            storage: missing(storage, *place, fits_2_4(keep), pattern) or partial(kind, weight, keep.to(options.device))
            for storage, kind in STORAGES.items()
        }
        stored = measure_storages(weight, makers, options.tokens, options.min_seconds, options.seed)
        yield MatrixSpeed(name, rows, columns, len(found), sparsity, stored)


def _transposed(run: RunPaths) -> set[str]:
    """Names of the parameters that are stored in x out: from the masks, else from the code of the model."""
    known = transposed_in(Masks.read_metadata(run.masks))
    if known is not None:
        return known
    prunable = Anatomy.of(ModelSource(str(run.model)).skeleton()).prunable()
    return {matrix.parameter_name for matrix in prunable.values() if matrix.is_transposed}


def _weight(model: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read one weight; the whole model is loaded if it saves that under another name or in another shape."""
    places = weight_places(model, "recon speed")
    if name in places:
        with safe_open(places[name], framework="pt") as file:
            weight = file.get_tensor(name)
        if tuple(weight.shape) == shape:
            return weight
    return ModelSource(str(model), dtype="auto").model().get_parameter(name).detach()


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

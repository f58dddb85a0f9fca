"""Options that several commands share, and how results leave a command."""

import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from recon.basics.refusals import UsageError
from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.data import TokenData
from recon.data.module import LARGEST_SEED
from recon.pruning.criteria import Criterion
from recon.pruning.patterns import Pattern
from recon.pruning.prune import Pruning
from recon.pruning.refinement import Refinement

DEFAULT_CRITERION = {"class_path": "recon.criteria.Wanda"}
DEFAULT_PATTERN = {"class_path": "recon.patterns.Unstructured"}
DEFAULT_DATA = {"class_path": "recon.data.TokenData"}


def add_pruning_arguments(parser: ArgumentParser) -> None:
    """Add `criterion`, `refinement`, `pattern` and `pruning`; the first three may be null."""
    parser.add_argument(
        "--criterion", type=Criterion | None, default=DEFAULT_CRITERION, help="How much a weight matters."
    )
    parser.add_argument(
        "--refinement", type=Refinement | None, default=None, help="How masks are improved, with the Gram matrix."
    )
    parser.add_argument("--pattern", type=Pattern | None, default=DEFAULT_PATTERN, help="Which zeros are allowed.")
    parser.add_class_arguments(Pruning, "pruning")


def add_data_arguments(parser: ArgumentParser, skip: set[str] | None = None) -> None:
    """Add `data`: options of `TokenData`, or of a class derived from it.

    Args:
        parser: Gets the options.
        skip: Options to leave out.
    """
    parser.add_subclass_arguments(TokenData, "data", skip=skip, fail_untyped=False)
    default_data(parser)


def add_offload_argument(parser: ArgumentParser) -> None:
    """Add `model.offload`, for commands that open models without a scope."""
    parser.add_argument(
        "--model.offload",
        type=Literal["none", "host", "disk"],
        default="none",
        help="Where the model is: on the device (none), or on the host or disk, with one block on the device at a "
        "time and the hidden states of all sequences on the host.",
    )


def add_device_argument(parser: ArgumentParser) -> None:
    """Add `device`, for `choose_device`."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")


def add_summary_arguments(parser: ArgumentParser) -> None:
    """Add `summary` and `verbose`: the table of the report in the end."""
    parser.add_argument("--summary", type=bool, default=True, help="Print the report as a table in the end.")
    parser.add_argument("--verbose", type=bool, default=False, help="Add tables of memory, predictions and drift.")


def default_data(parser: ArgumentParser) -> None:
    """Make `TokenData` the class of `data`, and find a user's own in the working directory."""
    parser.set_defaults({"data": DEFAULT_DATA})
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as `python -m recon` has it, but behind all that is installed


def plain_data(spec: dict[str, Any]) -> dict[str, Any]:
    """Options of `data` for a fingerprint: without the class where it is the default one."""
    return spec["init_args"] if _is_default(spec["class_path"]) else spec


def _is_default(class_path: str) -> bool:
    return class_path in (DEFAULT_DATA["class_path"], f"{TokenData.__module__}.{TokenData.__name__}")


def parse(parser: ArgumentParser, args: list[str]) -> tuple[Any, Any]:
    """Parse the arguments of a command; the configuration, and what it builds.

    Raises:
        UsageError: If they cannot be understood, or an object cannot be built from them.
    """
    with usage():
        args = arrange(parser.prog.removeprefix("recon "), args)
        config = parser.parse_args(args)
        if keep_own_defaults(parser, config):
            config = parser.parse_args(args)
        if "seed_everything" in config:
            require_seed(config.seed_everything)
        return config, parser.instantiate_classes(config)


def require_seed(seed: int) -> None:
    """Refuse a seed that numpy does not take.

    Raises:
        UsageError: If it is negative or too large.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed_everything must be from 0 to {LARGEST_SEED}, got {seed}; 0 is the default")


def describe(kind: type, spec: dict[str, Any]) -> str:
    """The name of the criterion or pattern that `spec` makes, e.g. `60% per row`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "one")
    built: Any = parser.instantiate_classes(parser.parse_object({"one": spec}))
    return str(built.one)


def keep_own_defaults(parser: ArgumentParser, config: Namespace) -> bool:
    """Give a user's class of `data` its own defaults, where the parser would keep those of `TokenData`.

    Args:
        parser: Has parsed `config`; its default of `data` is changed.
        config: Parsed.

    Returns:
        Whether to parse again.
    """
    data = config.get("data")
    if not isinstance(data, Namespace) or data.class_path == parser.get_default("data")["class_path"]:
        return False
    parser.set_defaults({"data": {"class_path": data.class_path}})
    return True


def choose_device(name: str) -> torch.device:
    """The device called `name`, which becomes the current one; `auto` takes a CUDA device where there is one.

    Raises:
        UsageError: If the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device needs auto, cpu, cuda or cuda:N, got {name!r}; choose one of them")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"--device {name} needs that CUDA device and a CUDA build of torch, got {count} devices; use --device cpu"
            f"{'' if count == 0 else f', or cuda:0 to cuda:{count - 1}'}"
        )
    if device.index is not None:
        torch.cuda.set_device(device)  # or GPU 0 would be measured, and hold what pins memory
    return device

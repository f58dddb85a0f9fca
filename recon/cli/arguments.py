"""Options that several commands share, and how results leave a command."""

from typing import Any

import torch
from jsonargparse import ArgumentParser

from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.pruning.criteria import Criterion
from recon.pruning.patterns import Pattern
from recon.pruning.prune import Pruning

DEFAULT_CRITERION = {"class_path": "recon.criteria.Wanda"}
DEFAULT_PATTERN = {"class_path": "recon.patterns.Unstructured"}


def add_pruning_arguments(parser: ArgumentParser) -> None:
    """Add `criterion`, `pattern` and `pruning`; the first two may be null."""
    parser.add_argument(
        "--criterion", type=Criterion | None, default=DEFAULT_CRITERION, help="How much a weight matters."
    )
    parser.add_argument("--pattern", type=Pattern | None, default=DEFAULT_PATTERN, help="Which zeros are allowed.")
    parser.add_class_arguments(Pruning, "pruning")


def parse(parser: ArgumentParser, args: list[str]) -> tuple[Any, Any]:
    """Parse the arguments of a command; the configuration, and what it builds.

    Raises:
        UsageError: If they cannot be understood, or an object cannot be built from them.
    """
    with usage():
        config = parser.parse_args(arrange(parser.prog.removeprefix("recon "), args))
        return config, parser.instantiate_classes(config)


def describe(kind: type, spec: dict[str, Any]) -> str:
    """The name of the criterion or pattern that `spec` makes, e.g. `60% per row`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "one")
    built: Any = parser.instantiate_classes(parser.parse_object({"one": spec}))
    return str(built.one)


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes a CUDA device where there is one.

    Raises:
        ValueError: If the device is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} needs a CUDA device and a CUDA build of torch, found none; use --device cpu")
    return torch.device(name)

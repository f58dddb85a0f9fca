"""Short names of classes: `sparsegpt` for `recon.criteria.SparseGPT`, `2:4` and `60%` for patterns."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from recon import FACE
from recon.basics.refusals import UsageError
from recon.cli.errors import did_you_mean
from recon.cli.source import SourceClass, descends, full_module, public_classes


@dataclass(frozen=True)
class Choice:
    """Where an option's classes are.

    Args:
        face: The package that exports them.
        bases: Names of the classes that they descend from.
        also: Names of other classes that may be chosen.
        internal: Names of classes that the code makes for itself.
    """

    face: str
    bases: tuple[str, ...]
    also: tuple[str, ...] = ()
    internal: tuple[str, ...] = ()

    def classes(self) -> dict[str, SourceClass]:
        """Name -> class."""
        found = public_classes(full_module(self.face))
        chosen = (one for one in found if one.name in self.also or descends(one, self.bases))
        return {one.name: one for one in chosen if one.name not in self.internal}


CHOICES = {
    "model": Choice("recon.scopes", ("Scope",)),
    "model.solver": Choice("recon.solvers", ("Solver",), ("GradientDescent",)),
    "data": Choice("recon.data", ("LightningDataModule",)),
    "data.source": Choice("recon.data", ("TokenSource",), internal=("TextSource",)),
    "data.source.prompts": Choice("recon.data", ("TokenSource",), internal=("TextSource",)),
    "data.held_out": Choice("recon.data", ("TokenSource",), internal=("TextSource",)),
    "criterion": Choice("recon.criteria", ("Criterion",)),
    "pattern": Choice("recon.patterns", ("Pattern",), internal=("Counted",)),
    "refinement": Choice("recon.refinement", ("Refinement",)),
    "pruning.allocation": Choice("recon.allocation", ("Allocation",)),
}
"""The options that choose a class."""

LISTS = {
    "criteria": "criterion",
    "patterns": "pattern",
    "refinements": "refinement",
    "allocations": "pruning.allocation",
    "data.source.sources": "data.source",
}
"""The options that list classes, those of a comparison and of a mixture, and the option that chooses one."""


def resolve_criterion(text: str) -> dict[str, Any]:
    """The criterion called `text`, such as `sparsegpt`, as class_path and init_args.

    Raises:
        UsageError: If there is none, with the names.
    """
    return {"class_path": resolve_class("criterion", text), "init_args": {}}


def resolve_pattern(text: str) -> dict[str, Any]:
    """The pattern called `text`, such as `2:4`, `60%`, `0.6` or `nm`, as class_path and init_args.

    Raises:
        UsageError: If there is none, with the forms.
    """
    if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return {"class_path": "recon.patterns.NM", "init_args": {"keep": int(found[1]), "of": int(found[2])}}
    if found := re.fullmatch(r"\s*(-?\d*\.?\d+)\s*(%?)\s*", text):
        sparsity = float(Decimal(found[1]) / 100 if found[2] else Decimal(found[1]))
        if not 0 <= sparsity < 1:
            raise UsageError(f"--pattern needs a sparsity from 0 to below 100%, such as 60% or 0.6, or N:M, got {text}")
        return {"class_path": "recon.patterns.Unstructured", "init_args": {"sparsity": sparsity}}
    return {"class_path": resolve_class("pattern", text), "init_args": {}}


def resolve_class(option: str, text: str) -> str:
    """The class path for what an option was given.

    Args:
        option: One of `CHOICES`.
        text: A class's name in any case, its first words (`submodule` for SubmoduleDistillation), or a path. A path
            outside of recon's face is returned as it is: a class of the user's own.

    Raises:
        UsageError: If recon has no such class, with the names.
    """
    choice = CHOICES[option]
    module, _, name = text.rpartition(".")
    if module and full_module(module) != full_module(choice.face):
        return text
    known = choice.classes()
    found = [one for one in known if one.lower() == _joined(name)]
    found = found or [one for one in known if _joined(name) in _beginnings(one)]
    if len(found) == 1:
        return f"{choice.face}.{found[0]}"
    forms = "N:M such as 2:4, a sparsity such as 60%, or " if option == "pattern" else ""
    hint = f"; did you mean {' or '.join(found)}?" if found else did_you_mean(name, known)
    raise UsageError(f"--{option} needs {forms}one of {', '.join(sorted(known))}, got {name or text}{hint}")


def resolve(value: Any, path: str = "") -> Any:
    """A configuration, or the part of one at a dotted path, with short names replaced by class paths.

    Raises:
        UsageError: If a name is unknown.
    """
    if isinstance(value, dict):
        resolved = {}
        for key, item in value.items():
            if key == "class_path" and path in CHOICES and isinstance(item, str):
                resolved[key] = resolve_class(path, item)
            else:
                resolved[key] = resolve(item, path if key == "init_args" else f"{path}.{key}".removeprefix("."))
        return resolved
    if path in LISTS:
        items = value if isinstance(value, list) else [value]
        return [resolve(item, LISTS[path]) for item in items]
    if path not in CHOICES or isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    spec = resolve_pattern(str(value)) if path == "pattern" else {"class_path": resolve_class(path, str(value))}
    return {key: item for key, item in spec.items() if item}


def with_short_paths(value: Any) -> Any:
    """A configuration whose class paths of recon are those of its faces, so that equal classes are equal texts."""
    if isinstance(value, dict):
        return {key: with_short_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_short_paths(item) for item in value]
    if isinstance(value, str):
        for face, module in FACE.items():
            if value.startswith(f"{module}."):
                return f"recon.{face}.{value.removeprefix(f'{module}.')}"
    return value


def _joined(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def _beginnings(name: str) -> set[str]:
    """The first word of a class's name, its first two, and so on: conjugate, conjugategradients."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", name)
    return {"".join(words[:num]).lower() for num in range(1, len(words) + 1)}

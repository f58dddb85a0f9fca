"""Short names of criteria and patterns: `sparsegpt`, `2:4`, `60%`."""

import re
from typing import Any


def resolve_criterion(text: str) -> dict[str, Any]:
    """The criterion called `text`, in any case, as class_path and init_args.

    Raises:
        ValueError: If there is none, with the names.
    """
    from recon.pruning import criteria

    name = _one_of(set(criteria.__all__) - {"Criterion"}, text, "criterion")
    return {"class_path": f"recon.criteria.{name}", "init_args": {}}


def resolve_pattern(text: str) -> dict[str, Any]:
    """The pattern called `text`, such as `2:4`, `60%` or `0.6`, as class_path and init_args.

    Raises:
        ValueError: If there is none, with the forms.
    """
    if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return {"class_path": "recon.patterns.NM", "init_args": {"keep": int(found[1]), "of": int(found[2])}}
    if found := re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", text):
        sparsity = float(found[1]) / 100 if found[2] else float(found[1])
        return {"class_path": "recon.patterns.Unstructured", "init_args": {"sparsity": sparsity}}
    name = _one_of(("NM", "Unstructured"), text, "pattern")
    return {"class_path": f"recon.patterns.{name}", "init_args": {}}


def _one_of(names: Any, text: str, what: str) -> str:
    for name in sorted(names):
        if name.lower() == text.rpartition(".")[2].lower():
            return name
    raise ValueError(f"{what} needs one of {', '.join(sorted(names))}, got {text!r}")

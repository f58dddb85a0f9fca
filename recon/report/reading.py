"""Files of results: found, read as strict JSON, and validated, or refused in one line."""

import json
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from recon.basics.manifest import require_unchanged

CURE = "name another file, or delete this one and run again: a run then only measures"
"""Of a file that cannot be read as results."""


def find_results(path: Path) -> Path:
    """The results.json or report.json at `path`, a file or the directory that holds it.

    Raises:
        FileNotFoundError: If there is neither.
    """
    candidates = [path / "results.json", path / "report.json"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"results need a results.json, or the report.json of a single run; there is no "
        f"{' and no '.join(map(str, candidates))}. Run `recon compare` first, or name its output directory"
    )


def read_strict(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as it was written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds no object of strict JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no report at {path}; run `recon compare` first, or name its output")

    require_unchanged(path, "copy it again, or delete it and repeat the command that made it")

    def refuse(token: str) -> NoReturn:
        raise ValueError(f"{token} is not strict JSON")

    try:
        payload = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(
            f"{path} must hold strict JSON as recon writes it; reading it failed: {error}; {CURE}"
        ) from error
    if not isinstance(payload, dict):
        raise ValueError(f"{path} must hold a JSON object as recon writes it; got {_brief(payload)}; {CURE}")
    return payload


def validated(kind: Any, payload: Any, source: str) -> Any:
    """`payload` as an instance of `kind`.

    Raises:
        ValueError: In one line that names `source` and every field at fault.
    """
    try:
        return TypeAdapter(kind).validate_python(payload)
    except ValidationError as error:
        faults = "; ".join(_fault(one) for one in error.errors(include_url=False))
        raise ValueError(f"{source} is no valid {kind.__name__.lower()}: {faults}; {CURE}") from error


def _fault(error: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "missing":
        return f"it lacks `{place}`"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"`{place}` is an unknown field, read it with the version of recon that wrote it"
    said = error["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"`{place}` {said}, got {_brief(error['input'])}" if place else said


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"

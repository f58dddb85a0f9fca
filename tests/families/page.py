"""The page of families: a table of every causal-LM configuration, with counts at its head."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import transformers

from tests.families.outcome import SCOPES, Outcome, outcome_of
from tests.families.small import MODEL_TYPES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "recon/models/FAMILIES.md"
RECOVERED = Path(__file__).with_name("recovered.json")

Recovered = dict[str, dict[str, str]]
"""Model type -> scope -> `ok` or what went wrong."""

TITLES = {"failed": "Accepted and not recovered", "refused": "Refused", "not built": "Not built by transformers"}
"""What became of a model type -> title of its section."""

HEAD = """# Families

Made by `python -m tests.families --table` with transformers {version}; do not edit. Every row is a small random model
(four layers, width 64), so it tells that the code of the family is understood, not how well it recovers.

{counts}

- **windows**: what `scopes/submodule` recovers at once. `attention` or `mixer` is the part up to the output of the
  token mixer, `mlp` the rest of the block, `block` a block that no mixer divides: it has none, several in parallel, or
  nothing else.
- **dense**: matrices, kernels and states in a block that are trained and never pruned.
- **recovered**: scopes that pruned the model to 2:4 and recovered it by `recon fit`, with zero violations in the
  written model.

"""


def outcomes() -> dict[str, Outcome]:
    """Try every configuration."""
    return {model_type: outcome_of(model_type) for model_type in MODEL_TYPES}


def read_recovered() -> Recovered:
    """Read what earlier walks have recovered."""
    return json.loads(RECOVERED.read_text()) if RECOVERED.exists() else {}


def counts(found: Mapping[str, Outcome], recovered: Recovered) -> str:
    """Say how many configurations are accepted and recovered."""
    number = Counter(one.status for one in found.values())
    built = number["accepted"] + number["refused"]
    accepted = [name for name, one in found.items() if one.status == "accepted"]
    whole = [name for name in accepted if _scopes(recovered.get(name, {})) == SCOPES]
    return (
        f"Of {len(found)} causal-LM configurations {built} can be built; **{number['accepted']} of {built} are "
        f"accepted**,\n{len(whole)} of them were recovered at all three local scopes; {number['refused']} are refused, "
        f"with the reason."
    )


def page(found: Mapping[str, Outcome], recovered: Recovered) -> str:
    """Write the page."""
    lines = [HEAD.format(version=transformers.__version__, counts=counts(found, recovered))]
    lines += ["| model type | windows | dense | recovered |\n", "|---|---|---|---|\n"]
    failed: dict[str, str] = {}
    for name, one in found.items():
        if one.status == "accepted":
            dense = ", ".join(f"`{path}`" for path in _folded(one.dense)) or "-"
            scopes = recovered.get(name, {})
            lines.append(f"| {name} | {one.text} | {dense} | {', '.join(_scopes(scopes)) or '-'} |\n")
            if wrong := [said for said in scopes.values() if said != "ok"]:
                failed[name] = wrong[0]
    reasons = {status: {n: one.text for n, one in found.items() if one.status == status} for status in TITLES}
    for status, title in TITLES.items():
        lines += _by_reason(title, failed if status == "failed" else reasons[status])
    return "".join(lines)


def _by_reason(title: str, reasons: Mapping[str, str]) -> list[str]:
    """Write a section: reason -> model types, the most frequent reason first."""
    types: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        types.setdefault(reason.replace("|", " "), []).append(name)
    ordered = sorted(types.items(), key=lambda item: -len(item[1]))
    return [f"\n## {title}\n\n| reason | model types |\n|---|---|\n"] + [
        f"| {reason} | {', '.join(names)} |\n" for reason, names in ordered
    ]


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Read model type -> status and windows off a page; without windows where it is not accepted."""
    accepted, *sections = text.split("\n## ")
    cells = [line.strip("| ").split(" | ") for line in accepted.splitlines() if line.startswith("| ")]
    found = {name: ("accepted", windows) for name, windows, *_ in cells if name != "model type"}
    statuses = {title: status for status, title in TITLES.items() if status != "failed"}
    for section in sections:
        title, *lines = section.splitlines()
        for line in lines[3:] if title in statuses else ():
            if line.startswith("| "):
                found |= dict.fromkeys(line.strip("| ").split(" | ")[-1].split(", "), (statuses[title], ""))
    return found


def _scopes(of_type: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(scope for scope in SCOPES if of_type.get(scope) == "ok")


def _folded(names: tuple[str, ...]) -> list[str]:
    """Name parameters of one parent together: `encoder_attn.{k_proj,q_proj}.weight` as `encoder_attn.*.weight`."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parents.setdefault(name.split(".")[0], []).append(name)
    return [one for parent, inner in parents.items() for one in (inner if len(inner) < 4 else [f"{parent}.*"])]

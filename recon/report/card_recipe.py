"""The command that makes a model again, with its options as a configuration, for the model's card."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import yaml

from recon.report.schema import Report

FILE = "recipe.yaml"
DATA = "recon.data.TokenData"


def recipe(report: Report, made_with: Mapping[str, Any]) -> str:
    """The command, and the options that it needs as YAML in a part of the page that can be opened."""
    if "soup" in made_with:
        runs = " ".join(f"run-{number}" for number in range(1, len(made_with["soup"]) + 1))
        return (
            f"The mean of recoveries under one mask, with cards of their own. Versions: {_versions(made_with)}.\n\n"
            f"    recon soup {runs} --weights {made_with['options']['weights']}"
        )
    command = "prune" if report.scope == "pruned" else "fit"
    masks = " --masks masks.safetensors" if "masks" in made_with else ""
    notes = [f"Save the options below as `{FILE}`. Versions: {_versions(made_with)}."]
    if "from" in made_with:
        masks += " --from first-run"
        notes.append("`first-run` is the directory of the run that recovery started from, with a card of its own.")
    if masks:
        notes.append(
            "`masks.safetensors` is that of the run directory, with `moved.safetensors` beside it if it has one."
        )
    if "weights" in made_with.get("model", {}):
        notes.append("The base model was one in memory, given to `recon.recover`; save it and name its directory.")
    content = yaml.safe_dump(options_of(made_with), sort_keys=False, allow_unicode=True)
    return (
        f"{' '.join(notes)}\n\n    recon {command} -c {FILE}{masks}\n\n"
        f"<details><summary>{FILE}</summary>\n\n```yaml\n{content}```\n\n</details>"
    )


def options_of(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run as a configuration: without the seed of its data, which follows from the run's."""
    options = deepcopy(dict(made_with["options"]))
    data = options["data"]
    if "class_path" not in data:  # as it is written of the default class
        data = options["data"] = {"class_path": DATA, "init_args": data}
    data.get("init_args", {}).pop("seed", None)
    return options


def _versions(made_with: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in made_with["versions"].items())

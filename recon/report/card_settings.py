"""The settings of a run in the words of its model's card: method and calibration data."""

from collections.abc import Mapping
from typing import Any

from recon.report.schema import Report

OF_RECOVERY = ("start", "propagation", "epochs", "lr", "batch_size", "loss", "parameters", "solver", "save_dtype")
"""Options of scopes that a card tells; a scope has some of them, the recipe has all."""


def method(report: Report, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Criterion, pattern, scope and its options, by the words for them."""
    options = made_with["options"]
    pruned = report.criterion != "none"
    found: dict[str, Any] = {"criterion": report.criterion, "pattern": report.pattern} if pruned else {}
    if pruned:
        pruning = options.get("pruning", {})
        named = {f"{name} of pruning": pruning.get(name) for name in ("inputs", "allocation", "exclude")}
        found |= {name: brief(value) for name, value in named.items() if value not in (None, [])}
    if report.scope != "pruned":
        scope = options["model"].get("init_args", {})
        found["scope"] = report.label
        scope = {} if "soup" in made_with else scope  # its runs have options, which may differ
        found |= {name.replace("_", " "): brief(scope[name]) for name in OF_RECOVERY if scope.get(name) is not None}
        others = {name: options[name] for name in ("optimizer", "lr_scheduler") if name in options}
        found |= {name.replace("_", " "): brief(one) for name, one in others.items()}
        found["training tokens, epochs counted"] = f"{report.train_tokens:,}"
    if report.windows:
        found["windows"] = f"{len(report.windows)}, of which {len(report.reset_windows)} kept their start"
    return found | {"seed": report.seed}


def calibration(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Source, sequences and tokens of the calibration data, and the seed that chose them."""
    options, identity = made_with["options"], made_with.get("data", {})
    data = options["data"].get("init_args", options["data"])
    found: dict[str, Any] = {"source": brief(data.get("source")) if data.get("source") else identity.get("source")}
    found |= {f"{name} of the source": one for name, one in identity.items() if name != "source" and one}
    num, length = data.get("num_sequences"), data.get("seq_len")
    found |= {"sequences": num, "tokens per sequence": length}
    if isinstance(num, int) and isinstance(length, int):
        found["tokens"] = f"{num * length:,}"
    found["seed"] = options.get("seed_everything", data.get("seed"))
    return {name: value for name, value in found.items() if value is not None}


def brief(value: Any) -> str:
    """An option's value; a class by its name and arguments."""
    if isinstance(value, Mapping) and "class_path" in value:
        given = ", ".join(f"{name}={brief(one)}" for name, one in (value.get("init_args") or {}).items())
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name}({given})" if given else name
    return str(value)

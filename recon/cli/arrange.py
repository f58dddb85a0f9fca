"""A command line checked and completed for its parser, before torch and Lightning are imported."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from recon.basics.refusals import UsageError
from recon.cli.command_line import CommandLine, Config, Item, classes_in, load_value
from recon.cli.errors import closest, did_you_mean
from recon.cli.names import CHOICES
from recon.cli.options import ALWAYS, BOOL, DEFAULTS, LIST, Option, options, scope_names
from recon.cli.source import parameters

SWITCH = ("true", "false", "null", "none", "yes", "no", "0", "1")
"""Values of a switch, on a command line where something else could stand behind it."""


def arrange(command: str, args: list[str]) -> list[str]:
    """The arguments of a command for its parser: in order, names of classes resolved, lists and switches completed.

    Raises:
        UsageError: If the command has no such option, or a configuration or class is unknown.
    """
    line = CommandLine.read(args)
    known = options(command, line.chosen)
    _check(command, line, known)
    return CommandLine(
        [_with_lists(config, known) for config in line.configs],
        [_completed(item, known) for item in line.items],
    ).arguments()


def _check(command: str, line: CommandLine, known: dict[str, Option]) -> None:
    """Refuse options that a command does not have."""
    chosen = DEFAULTS | ALWAYS.get(command, {}) | line.chosen
    asks = any(item.name.endswith(("help", "print_config")) for item in line.items)
    if command == "fit" and "model" not in chosen and not asks:
        _check_roots(command, line, known)
        raise UsageError(f"recon fit needs a scope to recover at, got none; choose one: -c {', '.join(scope_names())}")
    for config in line.configs:  # by the classes that it names itself, if another class takes its options' place later
        own = classes_in(config.content)
        known_there = options(command, line.chosen | own)
        for name in names_in(config.content, known_there):
            _check_name(command, name, known_there, chosen | own, f" (in {config.path})")
    for item in line.items:
        if item.token.startswith("--"):
            _check_name(command, item.name, known, chosen)
    if not any(option.positional for option in known.values()):
        _refuse_strays(command, line, known)


def _check_roots(command: str, line: CommandLine, known: dict[str, Option]) -> None:
    """Refuse options that no scope has."""
    for item in line.items:
        if item.token.startswith("--") and item.name.partition(".")[0] not in {one.partition(".")[0] for one in known}:
            _check_name(command, item.name, known, {})


def _refuse_strays(command: str, line: CommandLine, known: dict[str, Option]) -> None:
    """Refuse values that belong to no option."""
    for item in line.items:
        takes = 0 if not item.token or item.equals is not None else 1
        if item.name in known and LIST.fullmatch(known[item.name].type):
            continue
        if stray := item.values[takes:]:
            raise UsageError(
                f"recon {command} takes options only, got {stray[0]!r} without one; a configuration needs -c"
            )


def _completed(item: Item, known: dict[str, Option]) -> Item:
    """An option with its value in brackets if that is a list, and with `true` if it is a switch without a value.

    Raises:
        UsageError: If a value is missing.
    """
    negated = item.name.removeprefix("no_")
    if item.name not in known and negated in known and BOOL.fullmatch(known[negated].type) and item.value is None:
        return Item(negated, f"--{negated}", "false")
    option = known.get(item.name)
    if option is None or not item.token.startswith("--") or item.token.endswith("+"):
        return item
    takes_rest = not any(one.positional for one in known.values())
    is_switch = BOOL.fullmatch(option.type) and item.equals is None
    if is_switch and (not item.values or not (takes_rest or item.values[0].lower() in SWITCH)):
        return Item(item.name, item.token, "true", item.values)
    if item.value is None:
        raise UsageError(f"--{item.name} needs a value, got none{f': {option.help}' if option.help else ''}")
    if option.values and item.value not in option.values and not ("None" in option.type and item.value == "null"):
        raise UsageError(
            f"--{item.name} needs {', '.join(option.values[:-1])} or {option.values[-1]}, got {item.value}"
            f"{did_you_mean(item.value, option.values)}"
        )
    if LIST.fullmatch(option.type):
        several = [item.equals] if item.equals is not None else item.values if takes_rest else item.values[:1]
        if len(several) > 1 or not isinstance(load_value(several[0]), list | None):
            texts = "str" in option.type
            content = [one if texts else load_value(one) for one in several]
            rest = item.values if item.equals is not None else item.values[len(several) :]
            return Item(item.name, item.token, json.dumps(content), rest)
    return item


def _with_lists(config: Config, known: dict[str, Option]) -> Config:
    """A configuration with a list of one where an option of lists is given one value."""

    def wrap(content: Any, path: str) -> Any:
        if path in known and LIST.fullmatch(known[path].type) and isinstance(content, str | int | float):
            return [content]
        if not isinstance(content, dict):
            return content
        return {
            key: wrap(item, path if key == "init_args" else f"{path}.{key}".removeprefix("."))
            for key, item in content.items()
        }

    content = wrap(config.content, "")
    return replace(config, content=content, changed=config.changed or content != config.content)


def names_in(content: Any, known: dict[str, Option], path: str = "") -> Iterator[str]:
    """The dotted names of the options that a configuration sets."""
    is_group = path == "" or any(name.startswith(f"{path}.") for name in known)
    if not isinstance(content, dict) or not is_group or (path in known and known[path].open):
        yield path
        return
    for key, item in content.items():
        if key == "class_path":
            continue
        yield from names_in(item, known, path if key == "init_args" else f"{path}.{key}".removeprefix("."))


def _check_name(command: str, given: str, known: dict[str, Option], chosen: dict[str, str], where: str = "") -> None:
    """Refuse one option if the command does not have it."""
    name = given.replace(".init_args.", ".")
    parts = name.split(".")
    if parts[-1] in ("help", "class_path", "init_args", "") or "dict_kwargs" in parts or name.startswith("print_"):
        return
    above = [".".join(parts[:num]) for num in range(1, len(parts))]
    group = next((one for one in reversed(above) if one in known and known[one].choice), None)
    if name in known or any(one.startswith(f"{name}.") for one in known):
        if name in known and group is not None and group not in chosen and (owners := known[name].owners):
            raise UsageError(f"--{name} belongs to {' and '.join(owners)}: choose it by --{group} {owners[0]}{where}")
        return
    if any(one in known and known[one].open for one in above) or _is_negation(name, known):
        return
    if group is None or group not in chosen:
        raise UsageError(f"recon {command} has no option --{name}{where}{_suggestion(name, known)}")
    below = name.removeprefix(f"{group}.")
    owners = [kind for kind, of in CHOICES[group].classes().items() if below in (parameters(of) or {})]
    hint = f"; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else ""
    hint = hint or did_you_mean(name, [one for one in known if one.startswith(f"{group}.")], "--")
    raise UsageError(f"{chosen[group].rpartition('.')[2]} has no option --{name}{where}{hint}")


def _is_negation(name: str, known: dict[str, Option]) -> bool:
    option = known.get(name.removeprefix("no_"))
    return name.startswith("no_") and option is not None and BOOL.fullmatch(option.type) is not None


def _suggestion(name: str, known: dict[str, Option]) -> str:
    """What was probably meant: a name alike, or the part of a name (`--lr` is `--model.lr`)."""
    if hint := did_you_mean(name, [one for one in known if not known[one].positional], "--"):
        return hint
    ends = {one.rpartition(".")[2]: one for one in reversed(known)}
    close = [ends[one] for one in closest(name.rpartition(".")[2], ends, 1)]
    return f"; did you mean --{close[0]}?" if close else ""

"""The options of each command, read from source text: for `--help`, and to answer a typo before the slow imports.

The modules of the commands declare them by calls of `add_argument` and `add_class_arguments`; those calls are read, not
run. A test compares what is read with the parsers that the calls make.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from recon.cli.configs import shipped_configs
from recon.cli.names import CHOICES
from recon.cli.source import Parameter, SourceClass, find, find_in, is_dataclass, literals, parameters, tree

DEFAULTS = {
    "criterion": "recon.criteria.Wanda",
    "pattern": "recon.patterns.Unstructured",
    "data": "recon.data.TokenData",
}
"""The class of an option that names none."""

ALWAYS = {"plan": {"model": "recon.scopes.SubmoduleDistillation"}}
"""The classes that a command chooses if its user does not."""

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"

OF_LIGHTNING = ("fit", "plan")
"""Commands whose parser LightningCLI makes."""

ROOTS = {"add_optimizer_args": "optimizer", "add_lr_scheduler_args": "lr_scheduler"}
"""What these methods declare if they are given no name."""

LIST = re.compile(r"list\[.*\]( \| None)?")
BOOL = re.compile(r"bool( \| None)?|Optional\[bool\]")

SIMPLE = re.compile(r"(bool|int|float|str|None|list|tuple|Literal|Path|'[^']*'|[\[\], |.]|\d)+")


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Args:
        name: Dotted, such as `model.lr`; a positional argument's has no dashes either.
        type: As written; empty if unknown.
        default: As written; None if there is none.
        help: What it means.
        choice: Whether it chooses a class.
        open: Whether it has parts that are not known here.
        positional: Whether it is given without its name.
        values: All values that it may have, if they are few.
        owners: The classes that have it, if it depends on a choice that was not made.
    """

    name: str
    type: str = ""
    default: str | None = None
    help: str = ""
    choice: bool = False
    open: bool = False
    positional: bool = False
    values: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()


def options(command: str, chosen: dict[str, str]) -> dict[str, Option]:
    """The options of a command by name.

    Args:
        command: One of `recon`'s.
        chosen: The classes that were chosen, as `CommandLine.chosen` has them.
    """
    found: dict[str, Option] = {}
    chosen = ALWAYS.get(command, {}) | chosen
    if command in OF_LIGHTNING:
        found["config"] = Option("config", "str")
        found["seed_everything"] = Option(
            "seed_everything", "int", "0", "Seed of the calibration sequences and of training."
        )
        _add_choice(found, "model", chosen)
        _add_choice(found, "data", chosen)
        found["trainer"] = Option("trainer")
        _add_class(found, "trainer", find(TRAINER), chosen)
        found |= {name: Option(name, open=True) for name in ROOTS.values()}
    if command == "plan":
        found |= {name: option for name, option in _declared("fit", chosen).items() if name not in found}
    declared = _declared(command, chosen)
    found |= {name: option for name, option in declared.items() if name not in found}
    for linked in _links(command) + (_links("fit") if command == "plan" else []):
        found.pop(linked, None)
    return found


def scope_names() -> list[str]:
    """The shipped configurations of scopes."""
    return [f"scopes/{path.stem}" for path in shipped_configs() if path.parent.name == "scopes"]


def _declared(command: str, chosen: dict[str, str]) -> dict[str, Option]:
    """The options that the calls in a command's module declare."""
    found: dict[str, Option] = {}
    for call, module in _calls(f"recon.cli.{command}"):
        _declare(found, call, module, chosen)
    return found


def _calls(module: str, within: ast.AST | None = None) -> Iterator[tuple[ast.Call, str]]:
    """The calls in a module, with those of the functions `add_*` of recon that it calls."""
    nodes = [node for node in ast.walk(within or tree(module)) if isinstance(node, ast.Call)]
    for call in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(call.func, ast.Name) and call.func.id.startswith("add_"):
            home, function = _function(module, call.func.id)
            if function is not None and function is not within:
                yield from _calls(home, function)
        yield call, module


def _function(module: str, name: str) -> tuple[str, ast.FunctionDef | None]:
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _function(node.module or "", name)
    return module, None


def _declare(found: dict[str, Option], call: ast.Call, module: str, chosen: dict[str, str]) -> None:
    """Add what one call declares."""
    if not isinstance(call.func, ast.Attribute):
        return
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if call.func.attr == "add_argument" and "-c" in texts:
        found["config"] = Option("config", "str")
    elif call.func.attr == "add_argument" and texts:
        _add_argument(found, texts[0], keywords, chosen)
    elif call.func.attr == "add_class_arguments" and isinstance(call.args[0], ast.Name):
        skip = ast.literal_eval(keywords["skip"]) if "skip" in keywords else set()
        key = texts[0] if texts else ""
        if key:
            found[key] = Option(key)
        _add_class(found, key, find_in(module, call.args[0].id), chosen, skip)
    elif call.func.attr == "add_subclass_arguments" and texts:
        _add_choice(found, texts[0], chosen)


def _add_argument(
    found: dict[str, Option], text: str, keywords: dict[str | None, ast.expr], chosen: dict[str, str]
) -> None:
    name = text.removeprefix("--")
    if name in CHOICES:
        _add_choice(found, name, chosen)
    written = {key: ast.unparse(keywords[key]) for key in ("type", "default") if key in keywords}
    words = keywords.get("help")
    text_of_help = ast.literal_eval(words) if isinstance(words, ast.Constant) else ""
    default = written.get("default", "False" if "action" in keywords else None)
    previous = found.get(name)
    found[name] = Option(
        name,
        "list[str]" if "nargs" in keywords else written.get("type", "" if previous is None else previous.type),
        DEFAULTS.get(name, default),
        text_of_help,
        choice=previous is not None,
        open=previous is not None and previous.open,
        positional=not text.startswith("-"),
        values=literals("", written.get("type", "")),
    )


def _add_choice(found: dict[str, Option], name: str, chosen: dict[str, str]) -> None:
    """Add an option that chooses a class, with the parts that the class has; of all classes if none is chosen."""
    path = chosen.get(name, DEFAULTS.get(name))
    if path is not None:
        of = find(path)
        found[name] = Option(name, choice=True)
        _add_class(found, name, of, chosen)
        return
    known = CHOICES[name].classes() if name in CHOICES else {}
    found[name] = Option(name, choice=True, open=not known)
    for kind, of in known.items():
        for one in (parameters(of) or {}).values():
            full = f"{name}.{one.name}"
            owners = (*(found[full].owners if full in found else ()), kind)
            _add_parameter(found, full, one, chosen, owners)


def _add_class(
    found: dict[str, Option],
    prefix: str,
    of: SourceClass | None,
    chosen: dict[str, str],
    skip: set[str] = frozenset(),  # pyright: ignore[reportArgumentType]
) -> None:
    """Add the parameters of a class."""
    known = None if of is None else parameters(of)
    if known is None:
        found[prefix] = replace(found.get(prefix, Option(prefix)), open=True)
        return
    for one in known.values():
        if one.name not in skip:
            _add_parameter(found, f"{prefix}.{one.name}".removeprefix("."), one, chosen)


def _add_parameter(
    found: dict[str, Option], name: str, one: Parameter, chosen: dict[str, str], owners: tuple[str, ...] = ()
) -> None:
    """Add a parameter, and those of the class that it is of."""
    if name in CHOICES:
        _add_choice(found, name, chosen)
        found[name] = Option(name, one.type, one.default, one.help, True, found[name].open, owners=owners)
        return
    words = [] if LIST.fullmatch(one.type) else re.findall(r"[A-Za-z_]\w*", one.type)
    nested = [find_in(one.module, word) for word in words]
    parts = [of for of in nested if of is not None and is_dataclass(of)]
    values = literals(one.module, one.type)
    is_open = not (parts or values or SIMPLE.fullmatch(one.type))
    found[name] = Option(name, one.type, one.default, one.help, open=is_open, values=values, owners=owners)
    for of in parts:
        for part in (parameters(of) or {}).values():
            _add_parameter(found, f"{name}.{part.name}", part, chosen, owners)


def _links(command: str) -> list[str]:
    """The options that others set."""
    return [
        call.args[1].value
        for call, _ in _calls(f"recon.cli.{command}")
        if isinstance(call.func, ast.Attribute) and call.func.attr == "link_arguments"
        if isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, str)
    ]

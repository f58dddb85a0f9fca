"""`recon COMMAND --help`: the command's options in groups, a line or two each."""

import re
import textwrap
from collections.abc import Iterable

from recon.cli.command_line import CommandLine
from recon.cli.configs import shipped_configs
from recon.cli.names import CHOICES
from recon.cli.options import DEFAULTS, LIST, Option, options, scope_names
from recon.cli.source import find, parameters

WIDTH = 118
NAME_WIDTH = 34

ABOUT_THE_MODEL = ("save_dtype", "offload")
"""Parameters of a scope that say which model, besides those of ModelSource."""

GROUPS = ("What to recover", "Model", "Data", "Pruning", "Run", "Trainer")


def text(command: str, purpose: str, args: list[str]) -> str:
    """The help of a command.

    Args:
        command: One of `recon`'s.
        purpose: What it does.
        args: The arguments beside `--help`: a scope among them narrows its options, `--help.trainer` asks for the
            Trainer's.

    Raises:
        UsageError: If a configuration or a class among the arguments is unknown.
    """
    wants_trainer = "--help.trainer" in args
    line = CommandLine.read([arg for arg in args if arg not in ("-h", "--help", "--help.trainer")])
    known = options(command, line.chosen)
    groups: dict[str, list[Option]] = {name: [] for name in GROUPS}
    for option in known.values():
        if _is_shown(option, known, line.chosen):
            groups[_group(option)].append(option)
    if wants_trainer:
        return _section("Trainer (Lightning)", groups["Trainer"], known)
    does, _, example = purpose.partition(": ")
    lines = [f"usage: recon {command}{_usage(known)}", "", f"{does}, for example: {example}", "", ""]
    sections = [_section(name, groups[name], known) for name in GROUPS[:-1] if groups[name]]
    return "\n".join(lines) + "\n".join([*sections, _more(command, known)])


def _usage(known: dict[str, Option]) -> str:
    places = [option for option in known.values() if option.positional]
    positional = "".join(f" {one.name.upper()}{' ...' if LIST.fullmatch(one.type) else ''}" for one in places)
    configs = " [-c NAME] ..." if "config" in known else ""
    if "model" in known and known["model"].choice:
        configs = f" -c scopes/NAME{configs}"
    return f"{positional}{configs} [--OPTION VALUE] ..."


def _group(option: Option) -> str:
    root, _, rest = option.name.partition(".")
    if root == "trainer":
        return "Trainer"
    if root == "data":
        return "Data"
    if root in ("criterion", "refinement", "pattern", "pruning"):
        return "Pruning"
    if root != "model":
        return "Run"
    source = find("recon.models.loading.ModelSource")
    about = (*(parameters(source) or {} if source else {}), *ABOUT_THE_MODEL)
    return "Model" if rest in about else "What to recover"


def _is_shown(option: Option, known: dict[str, Option], chosen: dict[str, str]) -> bool:
    """Whether an option has a line: not the wholes whose parts have one, nor the parts of a class not chosen."""
    name = option.name
    if name == "config" or (not option.choice and any(one.startswith(f"{name}.") for one in known)):
        return False
    if name in ("data", "optimizer", "lr_scheduler"):
        return False
    parts = name.split(".")
    above = [".".join(parts[:num]) for num in range(2, len(parts))]
    return all(not known[one].choice or one in chosen for one in above if one in known)


def _section(title: str, shown: Iterable[Option], known: dict[str, Option]) -> str:
    rows = [_row(option, known) for option in shown]
    if title == "What to recover":
        recipes = ", ".join(path.stem for path in shipped_configs() if path.parent.name == "recipes")
        stages = f"Stages in place of a scope, also with --device_memory 16GiB and --minutes 30: {recipes}."
        rows.insert(0, _wrapped("-c recipes/NAME", stages))
        rows.insert(0, _wrapped("-c scopes/NAME", f"The scope: {', '.join(scope_names())}."))
    return "\n".join([f"{title}:", *rows, ""])


def _row(option: Option, known: dict[str, Option]) -> str:
    name = option.name if option.positional else f"--{option.name}"
    said = _first_sentence(option.help)
    if option.values:
        what = said.partition(":")[0] if ":" in said and not said.startswith("`") else ""
        what = what or ("" if said.startswith("`") else said.rstrip("."))
        said = f"{what}: {', '.join(option.values)}.".removeprefix(": ")
    if option.choice and option.name in CHOICES:
        said = f"{said} One of {', '.join(sorted(CHOICES[option.name].classes()))}.".strip()
        if option.name == "pattern":
            said += " Or N:M such as 2:4, or a sparsity such as 60%."
    scopes = [one for one in CHOICES["model"].classes() if one != "Pretraining"]
    owners = [one for one in option.owners if one != "Pretraining"]
    if option.name.startswith("model.") and owners and len(owners) < len(scopes) and "model" in known:
        others = [one for one in scopes if one not in owners]
        said += f" (not {_short(others[0])})" if len(others) == 1 else f" ({', '.join(_short(one) for one in owners)})"
    default = DEFAULTS.get(option.name, option.default)
    if default not in (None, "None", "", "[]") and not option.positional:
        said += f" [{_short_value(default)}]"
    return _wrapped(name, said.strip())


def _wrapped(name: str, said: str) -> str:
    lines = textwrap.wrap(said, WIDTH - NAME_WIDTH - 2) or [""]
    first = f"  {name:<{NAME_WIDTH - 2}}  "
    if len(name) > NAME_WIDTH - 2:
        first = f"  {name}\n{' ' * (NAME_WIDTH + 2)}"
    return (first + f"\n{' ' * (NAME_WIDTH + 2)}".join(lines)).rstrip()


def _first_sentence(words: str) -> str:
    """Of an option's help; without what stands in brackets."""
    first = re.split(r"(?<=[a-z0-9`)])[.;](?:\s|$)", words, maxsplit=1)[0].strip().rstrip(".")
    return f"{first}." if first else ""


def _short(name: str) -> str:
    """`block` for BlockDistillation."""
    return re.sub(r"(?<=[a-z])[A-Z].*", "", name).lower()


def _short_value(default: str) -> str:
    return default.rpartition(".")[2] if default.startswith("recon.") else default.strip("'\"")


def _more(command: str, known: dict[str, Option]) -> str:
    """Where there is more to read."""
    lines = []
    if "trainer.devices" in known:
        lines.append(f"recon {command} --help.trainer                   options of Lightning's Trainer")
    if "model" in known and known["model"].choice:
        lines.append(f"recon {command} --model.help BlockDistillation   all that a class takes; also --criterion.help")
    if "config" in known:
        lines.append(f"recon {command} ... --print_config               the configuration that the options make")
    return "\n".join(["More:", *(f"  {line}" for line in lines), ""]) if lines else ""

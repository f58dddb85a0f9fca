"""The options that are read from source text are those of the parsers, and `--help` shows them."""

import importlib

import pytest
from jsonargparse import ArgumentParser
from jsonargparse._link_arguments import ActionLink

from recon.cli import COMMANDS, main
from recon.cli.fit import ParsingCLI, _cli
from recon.cli.names import CHOICES
from recon.cli.options import OF_LIGHTNING, ROOTS, Option, options
from recon.cli.plan import PlanCLI
from recon.cli.source import find, literals, parameters

CLASSES = [f"{option}:{name}" for option in CHOICES for name in CHOICES[option].classes()]


class Stop(Exception):
    """Ends a command when its parser is complete."""


def parser_of(command: str, monkeypatch) -> ArgumentParser:
    if command in OF_LIGHTNING:
        return _cli(["-c", "scopes/block"], {"fit": ParsingCLI, "plan": PlanCLI}[command]).parser
    made = []

    def stop(self, *args, **kwargs):
        made.append(self)
        raise Stop

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    with pytest.raises(Stop):
        importlib.import_module(f"recon.cli.{command}").main(["x"] if "x" in takes_path(command) else [])
    return made[0]


def takes_path(command: str) -> str:
    return "x" if any(option.positional for option in options(command, {}).values()) else ""


def is_part_of_a_class(option: Option, known: dict[str, Option]) -> bool:
    above = [option.name.rsplit(".", num)[0] for num in range(1, option.name.count(".") + 1)]
    return any(known[one].choice for one in above if one in known)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_options_of_its_parser(command, monkeypatch):
    actions = parser_of(command, monkeypatch)._actions
    real = {action.dest.removesuffix(".help") for action in actions if not isinstance(action, ActionLink)}
    known = options(command, {})
    assert {name for name in real if not name.startswith(("help", "print_"))} <= known.keys()
    alone = {name for name, option in known.items() if not is_part_of_a_class(option, known)}
    assert alone - set(ROOTS.values()) <= real


@pytest.mark.parametrize("case", CLASSES)
def test_a_class_has_the_parameters_that_a_parser_finds(case):
    option, name = case.split(":")
    path = f"{CHOICES[option].face}.{name}"
    of = find(path)
    assert of is not None
    ours = parameters(of)
    assert ours is not None
    module = importlib.import_module(of.module)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(module, name), "one")
    real = {action.dest.split(".")[1] for action in parser._actions if action.dest.startswith("one.")}
    assert set(ours) == real


def test_values_of_literals_are_found_where_they_are_named():
    of = find("recon.scopes.BlockDistillation")
    assert of is not None
    known = parameters(of)
    assert known is not None
    assert literals(known["loss"].module, known["loss"].type) == ("normalised", "mse", "cosine")
    assert literals(known["save_dtype"].module, known["save_dtype"].type) == ("float32", "bfloat16", "float16")
    assert literals(known["lr"].module, known["lr"].type) == ()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_complete(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: recon {command}")
    assert len(shown.splitlines()) <= 120
    assert max(map(len, shown.splitlines())) <= 120
    for name, option in options(command, {}).items():
        if "." not in name and not option.open and name not in ("config", "data", "pruning", "model", "trainer"):
            assert f"  {'' if option.positional else '--'}{name}" in shown


def test_help_of_fit_shows_recons_options_first(capsys):
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = ["What to recover:", "Model:", "Data:", "Pruning:", "Run:"]
    assert sorted(titles, key=shown.index) == titles
    assert "--trainer.max_epochs" not in shown
    for reference in ("--help.trainer", "--model.help BlockDistillation", "--print_config"):
        assert reference in shown.partition("More:")[2]
    assert main(["fit", "--help.trainer"]) == 0
    shown = capsys.readouterr().out
    assert "--trainer.max_epochs" in shown
    assert "--model.lr" not in shown


def test_help_beside_a_scope_shows_its_options(capsys):
    assert main(["fit", "-c", "scopes/matrix", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--model.solver" in shown
    assert "--model.lr" not in shown


def test_help_of_a_class_by_its_short_name(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "block"])
    assert stop.value.code == 0
    assert "--model.num_blocks" in capsys.readouterr().out

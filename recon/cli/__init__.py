"""The command `recon`. Sub-commands are imported when asked for, so that `recon --help` is quick."""

import argparse
import importlib
import os
import sys

from recon import __version__
from recon.basics.children import die_with_parent
from recon.basics.refusals import UsageError
from recon.cli.errors import ERRORS, did_you_mean, plain
from recon.cli.interrupt import STATUS, Interrupt, told
from recon.cli.messages import printed_messages

COMMANDS = {
    "fit": "prune a model and recover it at one scope: recon fit -c scopes/submodule",
    "prune": "choose which weights survive and write their masks: recon prune -c criteria/wanda",
    "test": "measure the perplexity of a model or run directory: recon test runs/x",
    "soup": "average recoveries under one mask: recon soup runs/a runs/b",
    "merge": "put windows recovered by several jobs together: recon merge runs/x",
    "consolidate": "write the model in a checkpoint of full retraining: recon consolidate runs/x",
    "compare": "compare scopes, criteria, patterns and seeds: recon compare -c comparisons/demo",
    "plan": "predict memory, disk and FLOPs: recon plan -c models/llama-2-7b --device_memory 24GiB",
    "speed": "time products with a run's matrices, dense and sparse: recon speed runs/x",
    "verify": "check all that a run or comparison has written: recon verify runs/x",
    "push": "upload a run's model with its card, a dry run at first: recon push runs/x org/name",
    "report": "print the results of a run or comparison again: recon report runs/demo",
}

USAGE = f"""recon {__version__}: after pruning a language model, how much should be retrained, and what does it cost?

usage: recon COMMAND [options]      recon COMMAND --help tells its options

{chr(10).join(f"  {name:<12}{text}" for name, text in COMMANDS.items())}

-c NAME takes a YAML file or the name of a shipped configuration; several are merged, options override them.
RECON_TRACEBACK=1 shows where in the code an error arose.
"""


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 if the run failed; 2 if the command line is wrong; 130 if Ctrl-C stopped it.
    """
    interrupt = Interrupt()
    if args is None:  # not where Python code calls this: signals are its own
        interrupt.install()
        args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    command, *rest = args
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        print(f"recon: there is no command {command!r}{hint}", file=sys.stderr)
        return 2
    try:
        die_with_parent()
        return _run(command, rest)
    except (UsageError, argparse.ArgumentError, *ERRORS) as error:
        if os.environ.get("RECON_TRACEBACK"):
            raise
        if (who := _speaker()) is not None:
            print(f"recon {command}: error{who}: {plain(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | argparse.ArgumentError) else 1
    except KeyboardInterrupt:
        return told(command)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning answers it by exit status 1
            return told(command)
        if interrupt.pressed:  # the fit has said so
            return STATUS
        raise


def _run(command: str, args: list[str]) -> int:
    """Answer a mistake or `--help` at once, else import the command and run it."""
    from recon.cli.arrange import arrange

    if {"-h", "--help", "--help.trainer"} & set(args):
        from recon.cli.help import text

        print(text(command, f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}", args), end="")
        return 0
    if command in ("fit", "plan"):
        from recon.cli.recipe_names import split

        if split(args)[0] is not None:
            with printed_messages():
                return importlib.import_module("recon.cli.recipe").main(args, command)
    arrange(command, args)  # for what it refuses; the command does this again, also if it is called from Python
    with printed_messages():
        return importlib.import_module(f"recon.cli.{command}").main(args)


def _speaker() -> str | None:
    """Who reports an error of this process: before the processes of a run are connected, all have the same one."""
    if "lightning" not in sys.modules:  # as it reads them, without the seconds that its import takes
        ranks_known = [os.environ[name] for name in RANKS if name in os.environ]
        return "" if not ranks_known or ranks_known[0] == "0" else None
    from recon.distributed import ranks

    if ranks.size() > 1:
        return f" on rank {ranks.rank()}"
    return "" if ranks.rank() == 0 else None


RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables that tell a process its rank, in Lightning's order."""

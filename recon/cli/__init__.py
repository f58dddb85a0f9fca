"""The command `recon`. Sub-commands are imported when asked for, so that `recon --help` is quick."""

import argparse
import importlib
import os
import re
import sys

from recon import __version__
from recon.cli.messages import printed_messages

COMMANDS = {
    "fit": "prune a model and recover it at one scope: recon fit -c scopes/submodule",
    "prune": "choose which weights survive and write their masks: recon prune -c criteria/wanda",
    "test": "measure the perplexity of a model or run directory: recon test runs/x",
    "merge": "put windows recovered by several jobs together: recon merge runs/x",
    "consolidate": "write the model in a checkpoint of full retraining: recon consolidate runs/x",
    "compare": "compare scopes, criteria, patterns and seeds: recon compare -c comparisons/demo",
    "plan": "predict memory, disk and FLOPs: recon plan -c models/llama-2-7b --device_memory 24GiB",
    "report": "print the results of a run or comparison again: recon report runs/demo",
}

USAGE = f"""recon {__version__}: after pruning a language model, how much should be retrained, and what does it cost?

usage: recon COMMAND [options]      recon COMMAND --help tells its options

{chr(10).join(f"  {name:<12}{text}" for name, text in COMMANDS.items())}

-c NAME takes a YAML file or the name of a shipped configuration; several are merged, options override them.
RECON_TRACEBACK=1 shows where in the code an error arose.
"""

ERRORS = (argparse.ArgumentError, ValueError, OSError, FloatingPointError, MemoryError)
"""What a user can cure; anything else is a fault of ours and keeps its traceback."""


NOISE = re.compile(
    r"\s*(Does not validate against any of the Union|Subtypes: |Errors:$|- Expected a <class 'NoneType'>|Given value)"
)


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(f"recon: there is no command {args[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        with printed_messages():
            return importlib.import_module(f"recon.cli.{args[0]}").main(args[1:])
    except ERRORS as error:
        if os.environ.get("RECON_TRACEBACK"):
            raise
        if (who := _speaker()) is not None:
            print(f"recon {args[0]}: error{who}: {plain(str(error))}", file=sys.stderr)
        return 1


def _speaker() -> str | None:
    """Who reports an error of this process: before the processes of a run are connected, all have the same one."""
    from recon.distributed import ranks

    if ranks.size() > 1:
        return f" on rank {ranks.rank()}"
    return "" if ranks.rank() == 0 else None


def plain(message: str) -> str:
    """`message` without what jsonargparse says of the alternatives to a class that could not be made.

    It tries each type of a union in turn and reports all of them, the trivial ones too; the reason that a
    user can cure is one of many lines.
    """
    return "\n".join(line for line in message.splitlines() if line.strip() and not NOISE.match(line))

"""`recon verify`: whether all that a run or a comparison has written is as it was written, and fits together."""

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from recon.cli.arrange import arrange
from recon.cli.errors import usage
from recon.cli.quiet import quiet
from recon.experiment.verification import verify


def build_parser() -> ArgumentParser:
    """The parser of `recon verify`."""
    parser = ArgumentParser(
        prog="recon verify",
        exit_on_error=False,
        description="Check the files of a run, or of a comparison with all its cells: digests, pruned weights, "
        "patterns, metadata and versions. Prints a line for each that is wrong; writes nothing.",
    )
    parser.add_argument("path", type=str, help="The directory of a run or of a comparison.")
    parser.add_argument("--json", type=bool, default=False, help="Print faults and notes as JSON.")
    return parser


def main(args: list[str]) -> int:
    """Parse, check, print what is wrong.

    Returns:
        The exit status: 0 if nothing is wrong, else 1.
    """
    quiet()
    with usage():
        config = build_parser().parse_args(arrange("verify", args))
    found = verify(Path(config.path))
    if config.json:
        print(json.dumps(asdict(found), indent=2))
        return 1 if found.faults else 0
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for line in [*found.faults, *(f"note: {note}" for note in found.notes)]:
        console.print(line)
    wrong = f"{len(found.faults)} wrong" if found.faults else "nothing wrong"
    console.print(f"{config.path}: {found.num_checked} checks, {wrong}")
    return 1 if found.faults else 0

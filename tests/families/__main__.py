"""Walk through every causal-LM configuration of the installed transformers.

    python -m tests.families --table                 write recon/models/FAMILIES.md: seconds
    python -m tests.families --recover               recover every accepted one that is not yet: as long as an hour
    python -m tests.families --recover lfm2 mamba    recover these again

Run it in the repository's root.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import transformers

from recon.basics.files import write_json

from .outcome import SCOPES, outcome_of, recover
from .page import PAGE, RECOVERED, outcomes, page, read_recovered
from .small import MODEL_TYPES


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the page")
    parser.add_argument(
        "--recover", nargs="*", metavar="TYPE", help="recover these model types, or all that are missing"
    )
    options = parser.parse_args()
    if not options.table and options.recover is None:
        parser.error("give --table or --recover")
    transformers.logging.set_verbosity_error()
    if options.recover is not None:
        _recover(options.recover)
    if options.table:
        PAGE.write_text(page(outcomes(), read_recovered()))
        print(f"written {PAGE}")
    return 0


def _recover(wanted: list[str]) -> None:
    os.environ["RECON_TRACEBACK"] = "1"  # errors are raised, and become the outcome
    for model_type in wanted or MODEL_TYPES:
        done = read_recovered().get(model_type, {})
        if (done and not wanted) or outcome_of(model_type).status != "accepted":
            continue
        found = {}
        for scope in SCOPES:
            with tempfile.TemporaryDirectory() as directory:
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    found[scope] = recover(model_type, scope, Path(directory))
            print(f"{model_type}  {scope}  {found[scope]}", flush=True)
            if found[scope] != "ok":
                print(said.getvalue()[-2000:], flush=True)
        write_json(RECOVERED, dict(sorted((read_recovered() | {model_type: found}).items())))


if __name__ == "__main__":
    sys.exit(main())

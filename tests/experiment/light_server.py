"""`recon.cli.forking` without its seconds of imports; forks run Python that the test gives instead of recon."""

import os
import sys
import time

from recon.basics.children import die_with_parent
from recon.cli import forking


def run() -> int:
    """Run the second argument."""
    die_with_parent()
    exec(sys.argv[1])
    return 3 if "fails" in sys.argv[1] else 0


if __name__ == "__main__":
    time.sleep(float(os.environ.get("SECONDS_OF_IMPORTS", 0)))
    forking.COMMANDS, forking.recon = (), run
    sys.exit(forking.main())

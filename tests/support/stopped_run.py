"""`recon fit` as a command, which tells one of its processes to stop in the middle of the fit.

Run as `python -m tests.support.stopped_run RANK ARGUMENT ...`; Lightning starts the other processes by the same line.
"""

import signal
import sys

from recon.cli import main
from tests.support.distributed_runs import main_with
from tests.support.parallel_runs import Stop

if __name__ == "__main__":
    rank, *args = sys.argv[1:]
    stop = Stop(signal.SIGTERM, batch=4, only_rank=int(rank))  # in step 3 of 8
    main_with(stop, ["fit", *args], lambda args: sys.exit(main(args)))

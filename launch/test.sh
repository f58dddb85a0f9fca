#!/usr/bin/env bash
# bash launch/test.sh [options of pytest]     shellcheck, lint, types, import contracts, tests
# bash launch/test.sh -m slow                 the tests that take minutes
# bash launch/test.sh -m gpu -n 0             the tests that need a CUDA device, in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
recon_install test
shellcheck -x launch/*.sh launch/*.sbatch .ci/run
ruff check .
ruff format --check .
basedpyright
lint-imports
# A file of tests in one process, a process a core, a thread each: with more they would wait for each other.
export OMP_NUM_THREADS=1
exec pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"

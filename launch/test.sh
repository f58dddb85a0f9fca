#!/usr/bin/env bash
# bash launch/test.sh [options of pytest]     shellcheck, lint, types, import contracts, tests
# bash launch/test.sh -m slow                 the tests that take minutes
# bash launch/test.sh -m gpu                  the tests that need a CUDA device
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
recon_install test
shellcheck -x launch/*.sh launch/*.sbatch .ci/run
ruff check .
ruff format --check .
basedpyright
lint-imports
exec pytest "$@"

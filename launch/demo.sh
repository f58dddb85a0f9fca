#!/usr/bin/env bash
# bash launch/demo.sh [options of recon compare]
# The free lunch on the bundled model: all four recovery scopes at 60 % sparsity, in minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
recon_install eval    # the demo scores a task of lm-evaluation-harness
exec recon compare -c comparisons/demo "$@"

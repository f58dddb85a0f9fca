#!/usr/bin/env bash
# bash launch/gpu.sh [--wheels DIRECTORY] [options]       GPU tests and the acceptance table, in nine minutes
# bash launch/gpu.sh --device cpu --tiny                  the same way on a CPU, with models of nothing
#
# Runs from the clone, on a machine with PyTorch, transformers and lightning: no network, nothing is installed. What is
# missing is said at once. --wheels adds the packages of a directory of wheels, which go before those of the machine.
# PYTHON names the interpreter; --help lists the other options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -f .venv/bin/python ]; then
    python=.venv/bin/python
fi
paths="$PWD"
if [ "${1:-}" = --wheels ]; then
    wheels=("${2:?--wheels needs a directory}"/*.whl)
    if [ ! -f "${wheels[0]}" ]; then
        echo "--wheels needs a directory with wheels, got $2" >&2
        exit 2
    fi
    unpacked="$(mktemp -d)"
    trap 'rm -rf "$unpacked"' EXIT
    for wheel in "${wheels[@]}"; do
        "$python" -m zipfile -e "$wheel" "$unpacked/site-packages" # by this name dill tells libraries from scripts
    done
    paths="$paths:$unpacked/site-packages"
    shift 2
fi
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -m tests.benchmarks.gpu "$@"

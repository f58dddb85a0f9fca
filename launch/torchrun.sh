#!/usr/bin/env bash
# bash launch/torchrun.sh scopes/full strategies/zero2 [options of recon fit]
#
# recon fit in several processes, on the machine where this is started or on several. Arguments before the first
# option name configurations. Paths are relative to the current directory; the clone's .venv is used if there is one.
#
# Two nodes: once on each, with the same clone or version, data and --run_dir on a file system that both see.
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash launch/torchrun.sh scopes/full strategies/zero3 --run_dir runs/x
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a bash launch/torchrun.sh scopes/full strategies/zero3 --run_dir runs/x
#
# NPROC_PER_NODE      processes here; by default one per CUDA device that torch sees (so CUDA_VISIBLE_DEVICES counts),
#                     and 1 without any: NPROC_PER_NODE=2 tries a strategy out on CPUs
# NNODES              nodes, 1; if more, NODE_RANK (0, 1, ...) and MASTER_ADDR (node 0) are needed,
#                     MASTER_PORT is 29500
# OMP_NUM_THREADS     threads of each process; by default the node's cores shared out
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT    seconds for saving a checkpoint when stopped by SIGTERM, 180
set -euo pipefail
venv="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/activate"

if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    echo "usage: bash launch/torchrun.sh CONFIGURATION... [options of recon fit]" >&2
    echo "as in: bash launch/torchrun.sh scopes/full strategies/zero2 --model.name facebook/opt-125m" >&2
    exit 2
fi
configurations=()
while [ $# -gt 0 ] && [[ "$1" != -* ]]; do
    configurations+=(-c "$1")
    shift
done

nodes="${NNODES:-1}"
if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
elif [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ]; then
    rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR")
    rendezvous+=(--master-port "${MASTER_PORT:-29500}")
else
    echo "NNODES=$nodes needs NODE_RANK (0 to $((nodes - 1)), another on each node) and MASTER_ADDR (node 0)" >&2
    exit 2
fi

# shellcheck disable=SC1090
[ ! -f "$venv" ] || source "$venv"
if ! command -v torchrun >/dev/null; then
    echo "found no torchrun: install recon (bash launch/demo.sh makes .venv) or activate its environment" >&2
    exit 1
fi
processes="${NPROC_PER_NODE:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}"
exec torchrun "${rendezvous[@]}" --nproc-per-node "$processes" -m recon fit "${configurations[@]}" "$@" \
    --trainer.devices "$processes" --trainer.num_nodes "$nodes"

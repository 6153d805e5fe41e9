#!/usr/bin/env bash
# Train with uar-megatron under torchrun: on this machine, or as one node of several.
#
#   launch/torchrun.sh my.yaml lr=1e-3                                      # all GPUs of this machine
#   launch/torchrun.sh --nproc 2 my.yaml                                    # two processes
#   launch/torchrun.sh --nodes 4 --rendezvous node1:29500 --id my my.yaml   # the same on each node
#
# The nodes meet at HOST:PORT, on the first of them, and torchrun numbers them as they come: rank 0 may
# be on any. A worker that dies has all of them started again, on every node, at most --max-restarts
# times; they go on from the last checkpoint. SIGTERM saves one first and ends the job.
set -euo pipefail

usage="usage: torchrun.sh [--nodes N --rendezvous HOST:PORT --id NAME] [--nproc P] [--max-restarts R]
                   CONFIG.yaml [key=value …]"
nodes=1 rendezvous=localhost:0 id=uar nproc=gpu max_restarts=3
while [[ ${1-} == --* ]]; do
  [[ $# -ge 2 ]] || { echo "$usage" >&2; exit 2; }
  case $1 in
    --nodes) nodes=$2 ;;
    --rendezvous) rendezvous=$2 ;;
    --id) id=$2 ;;
    --nproc) nproc=$2 ;;
    --max-restarts) max_restarts=$2 ;;
    *) echo "torchrun.sh: no option $1" >&2; echo "$usage" >&2; exit 2 ;;
  esac
  shift 2
done
[[ $# -ge 1 ]] || { echo "$usage" >&2; exit 2; }
if [[ $nodes != 1 && $rendezvous == localhost:0 ]]; then
  echo "torchrun.sh: --nodes $nodes needs --rendezvous HOST:PORT, HOST being one of the nodes" >&2
  exit 2
fi

# One thread per rank; torchrun would set it too, with a warning.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Problems between nodes show up as a hang: let NCCL say what it sees.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A store of its own for each start of the workers: in one that they share with torchrun, those that are
# started again find the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long ranks may save after SIGTERM, in seconds: torchrun kills them after 30. (Versions before the
# variable always do.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# On a shared home every rank of every node would compile kernels into the same folder.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}"

exec "${PYTHON:-python3}" -m torch.distributed.run \
  --nnodes="$nodes" --nproc-per-node="$nproc" --max-restarts="$max_restarts" \
  --rdzv-backend=c10d --rdzv-endpoint="$rendezvous" --rdzv-id="$id" \
  -m uar_megatron.pretrain --config "$@"

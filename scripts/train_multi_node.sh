#!/usr/bin/env bash
# Trains on the machines of a hostfile (lines like `node1 slots=8`), over ssh with pdsh, started from one of them;
# docs/multi_node.md. usage: bash scripts/train_multi_node.sh HOSTFILE RECIPE [train_ds.py flags]
#   NODE_RANK=0,1,...  MASTER_ADDR=HOST   without ssh: start this on every machine of the hostfile, in its order
#   MASTER_PORT=29500                     a port that the first machine has free
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
hostfile=$(here "${1:?usage: train_multi_node.sh HOSTFILE RECIPE [flags]}")
recipe=$(here "${2:?usage: train_multi_node.sh HOSTFILE RECIPE [flags]}")
shift 2
cd "$(dirname "$0")/.."
[[ -s $hostfile ]] || { echo "train_multi_node.sh: no hostfile $hostfile: one line per machine, like 'node1 slots=8'" >&2; exit 2; }
source scripts/activate.sh
reach=(--launcher pdsh)  # MPI's launchers do not say which process is which in the way that train_ds.py reads
if [[ -n ${NODE_RANK:-} ]]; then
  reach=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?with NODE_RANK, give the first machine: MASTER_ADDR}")
fi
exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" "${reach[@]}" train_ds.py --config "$recipe" "$@"

#!/usr/bin/env bash
# Two simulated nodes on this machine train together: two launchers, each with its own address on the loopback network
# and its own process; all that they share is the address of the first. Then a single process does the same steps, and
# the losses are compared. A minute of CPU time.
# usage: bash scripts/check_two_nodes.sh [OUT] [train_ds.py flags]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/fresh.sh
out=${1:-runs/two_nodes}
shift $(($# < 1 ? $# : 1))
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo  # as on a cluster: the interface over which the nodes reach each other
port=${MASTER_PORT:-29531}
fresh "$out/together" "$out/alone"
source scripts/activate.sh
python scripts/make_toy_dataset.py "$out/dataset" --force --images 40 --val_images 3 --only reason_seg

train() {  # NAME ACCUMULATION_STEPS LAUNCHER...
  local name=$1 accumulation=$2
  shift 2
  "$@" train_ds.py --config configs/toy/lisa.yaml --dataset_dir "$out/dataset" --log_base_dir "$out" --exp_name "$name" \
    --dataset reason_seg --batch_size 1 --grad_accumulation_steps "$accumulation" --set model.precision=fp32 \
    --set train.steps_per_epoch=3 --set train.print_freq=1 --set train.zero_stage=3 --no_eval "${flags[@]}"
}

flags=("$@")
nodes=()
trap 'kill "${nodes[@]}" 2>/dev/null || true' EXIT
for rank in 0 1; do
  train together 1 torchrun --nnodes 2 --nproc_per_node 1 --node_rank "$rank" --local_addr "127.0.0.$((rank + 1))" \
    --master_addr 127.0.0.1 --master_port "$port" >"$out/node$rank.log" 2>&1 &
  nodes+=($!)
done
for node in "${nodes[@]}"; do
  wait "$node" || { tail -n 20 "$out"/node?.log >&2; exit 1; }
done
train alone 2 python >"$out/alone.log" 2>&1 || { tail -n 20 "$out/alone.log" >&2; exit 1; }

python - "$out" <<'PY'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = {}
for name in ("together", "alone"):
    lines = map(json.loads, (out / name / "log.jsonl").read_text().splitlines())
    rows[name] = [line for line in lines if line["kind"] == "train"]
(meta,) = json.loads((out / "together" / "meta.json").read_text())
print(f"two nodes: {meta['processes']} processes, {len(rows['together'])} steps of ZeRO-3")
print("step  loss of two nodes  loss of one process")
for two, one in zip(rows["together"], rows["alone"], strict=True):
    print(f"{two['step']:4}  {two['loss']:17.6f}  {one['loss']:19.6f}")
worst = max(abs(two["loss"] / one["loss"] - 1) for two, one in zip(rows["together"], rows["alone"], strict=True))
good = meta["processes"] == 2 and len(rows["together"]) == 3 and worst < 1e-4
print(f"largest relative difference {worst:.1e}: {'they train together' if good else 'NOT the same training'}")
sys.exit(not good)
PY

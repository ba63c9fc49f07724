#!/usr/bin/env bash
# Trains LISA on this machine's devices. usage: bash scripts/train_lisa.sh LLAVA SAM DATASET [7b|13b] [train_ds.py flags]
set -euo pipefail
cd "$(dirname "$0")/.."
llava=${1:?usage: train_lisa.sh LLAVA SAM DATASET [7b|13b] [flags]}
sam=${2:?usage: train_lisa.sh LLAVA SAM DATASET [7b|13b] [flags]}
dataset=${3:?usage: train_lisa.sh LLAVA SAM DATASET [7b|13b] [flags]}
size=${4:-7b}
shift $(($# < 4 ? $# : 4))
deepspeed train_ds.py --config "configs/lisa_$size.yaml" --version "$llava" --vision_pretrained "$sam" \
  --dataset_dir "$dataset" "$@"

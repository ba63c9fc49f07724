#!/usr/bin/env bash
# What train_<system>.sh of a system with a SAM does, on this machine's devices.
# usage: bash scripts/train.sh SYSTEM LLAVA SAM DATASET [7b|13b] [train_ds.py flags]
set -euo pipefail
cd "$(dirname "$0")/.."
system=${1:?usage: train.sh SYSTEM LLAVA SAM DATASET [7b|13b] [flags]}
usage="usage: train_$system.sh LLAVA SAM DATASET [7b|13b] [flags]"
llava=${2:?$usage}
sam=${3:?$usage}
dataset=${4:?$usage}
size=${5:-7b}
shift $(($# < 5 ? $# : 5))
deepspeed train_ds.py --config "configs/${system}_$size.yaml" --version "$llava" --vision_pretrained "$sam" \
  --dataset_dir "$dataset" "$@"

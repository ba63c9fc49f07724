#!/usr/bin/env bash
# Trains a system with a SAM on this machine's devices: the shared part of the scripts train_<system>.sh.
# usage: bash scripts/train.sh SYSTEM LLAVA SAM DATASET [7b|13b] [train_ds.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
system=${1:?usage: train.sh SYSTEM LLAVA SAM DATASET [7b|13b] [flags]}
usage="usage: train_$system.sh LLAVA SAM DATASET [7b|13b] [flags]"
llava=$(here "${2:?$usage}")
sam=$(here "${3:?$usage}")
dataset=$(here "${4:?$usage}")
size=${5:-7b}
shift $(($# < 5 ? $# : 5))
cd "$(dirname "$0")/.."
source scripts/activate.sh
deepspeed train_ds.py --config "configs/${system}_$size.yaml" --version "$llava" --vision_pretrained "$sam" \
  --dataset_dir "$dataset" "$@"

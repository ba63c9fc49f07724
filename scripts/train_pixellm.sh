#!/usr/bin/env bash
# Trains PixelLM on this machine's devices. usage: bash scripts/train_pixellm.sh LLAVA DATASET [7b|13b] [train_ds.py flags]
set -euo pipefail
cd "$(dirname "$0")/.."
llava=${1:?usage: train_pixellm.sh LLAVA DATASET [7b|13b] [flags]}
dataset=${2:?usage: train_pixellm.sh LLAVA DATASET [7b|13b] [flags]}
size=${3:-7b}
shift $(($# < 3 ? $# : 3))
source scripts/activate.sh
deepspeed train_ds.py --config "configs/pixellm_$size.yaml" --version "$llava" --dataset_dir "$dataset" "$@"

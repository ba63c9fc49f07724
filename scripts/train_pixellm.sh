#!/usr/bin/env bash
# Trains PixelLM on this machine's devices. usage: bash scripts/train_pixellm.sh LLAVA DATASET [7b|13b] [train_ds.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
llava=$(here "${1:?usage: train_pixellm.sh LLAVA DATASET [7b|13b] [flags]}")
dataset=$(here "${2:?usage: train_pixellm.sh LLAVA DATASET [7b|13b] [flags]}")
size=${3:-7b}
shift $(($# < 3 ? $# : 3))
cd "$(dirname "$0")/.."
source scripts/activate.sh
deepspeed train_ds.py --config "configs/pixellm_$size.yaml" --version "$llava" --dataset_dir "$dataset" "$@"

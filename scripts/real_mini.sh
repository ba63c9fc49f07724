#!/usr/bin/env bash
# Trains configs/real_mini.yaml from scratch on the photographs below DATASET, then scores it on the same photographs, with
# the answers given and with the answers generated, and writes a page with overlays of each. A second run starts afresh.
# usage: bash scripts/real_mini.sh DATASET [OUT]   (OUT: default runs/real_mini)
set -euo pipefail
data=$(realpath "${1:?usage: bash scripts/real_mini.sh DATASET [OUT]}")
cd "$(dirname "$0")/.."
out=${2:-runs/real_mini}
source scripts/fresh.sh
fresh "$out/train" "$out/blank" "$out/teacher_forced" "$out/generate"
source scripts/setup.sh requirements.txt
started=$SECONDS

python -m toy.base.blank "$out/blank"
python train_ds.py --config configs/real_mini.yaml --dataset_dir "$data" --log_base_dir "$out" --exp_name train \
  --version "$out/blank/llava" --vision_pretrained "$out/blank/sam_vit_toy.safetensors"
printf 'Trained in %d s\n' $((SECONDS - started))
for protocol in teacher_forced generate; do
  python test_sem.py --version "$out/train" --dataset_dir "$data" --suites trained_on trained_on_classes --protocol $protocol \
    --batch_size 8 --max_new_tokens 256 --out "$out"
done

printf '\nDone in %d s. Pages: %s/{teacher_forced,generate}/report/index.html\n' $((SECONDS - started)) "$out"

#!/usr/bin/env bash
# Trains from scratch on the photographs below DATASET, then scores the same photographs, with the answers given and with the
# answers generated, and writes a page with overlays of each. A second run starts afresh.
# BACKBONE: llava (default; with SAM, configs/real_mini.yaml) or qwen3_vl (with SAM 2, configs/real_mini_qwen3_vl.yaml).
# usage: bash scripts/real_mini.sh DATASET [OUT] [BACKBONE]   (OUT: default runs/real_mini)
set -euo pipefail
usage='usage: bash scripts/real_mini.sh DATASET [OUT] [llava|qwen3_vl]'
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
data=$(here "${1:?$usage}")
out=${2:+$(here_new "$2")}
cd "$(dirname "$0")/.."
out=${out:-runs/real_mini}
backbone=${3:-llava}
case $backbone in
  llava) recipe=real_mini head=sam_vit_toy.safetensors ;;
  qwen3_vl) recipe=real_mini_qwen3_vl head=sam2 ;;
  *) echo "$usage" >&2 && exit 2 ;;
esac
source scripts/fresh.sh
fresh "$out/train" "$out/blank" "$out/teacher_forced" "$out/generate"
source scripts/setup.sh requirements.txt
started=$SECONDS

python -m toy.base.blank "$out/blank" --backbone "$backbone"
python train_ds.py --config "configs/$recipe.yaml" --dataset_dir "$data" --log_base_dir "$out" --exp_name train \
  --version "$out/blank/$backbone" --vision_pretrained "$out/blank/$head"
printf 'Trained in %d s\n' $((SECONDS - started))
for protocol in teacher_forced generate; do
  python test_sem.py --version "$out/train" --dataset_dir "$data" --suites trained_on trained_on_classes --protocol $protocol \
    --batch_size 8 --max_new_tokens 256 --out "$out"
done

printf '\nDone in %d s. Pages: %s/{teacher_forced,generate}/report/index.html\n' $((SECONDS - started)) "$out"

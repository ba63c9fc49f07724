#!/usr/bin/env bash
# The main job end to end on the embedded toy world: set-up, data, training with LoRA, merge, evaluation, pictures.
# 10 to 15 minutes on two CPU cores. usage: bash scripts/demo.sh [OUT]   (default runs/demo; re-running starts afresh)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
source scripts/fresh.sh
fresh "$out/train"
source scripts/setup.sh requirements.txt
started=$SECONDS

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "1/5 Drawing the toy world"
python scripts/make_toy_dataset.py "$out/dataset" --force --seed 0 --images 5000 --val_images 100 \
  --only ade20k refcoco reason_seg llava_instruct

step "2/5 Training (LoRA on the toy base, the recipe of configs/toy/lasagna.yaml)"
python train_ds.py --config configs/toy/lasagna.yaml --dataset_dir "$out/dataset" --log_base_dir "$out" --exp_name train

step "3/5 Merging into one folder"
python merge_lora_weights_and_save_hf_model.py --run "$out/train" --save_path "$out/merged"

step "4/5 Evaluating before and after, on pictures never trained on"
python scripts/demo_report.py --run "$out/train" --merged "$out/merged" --dataset_dir "$out/dataset" --out "$out/report"

step "5/5 Asking the merged model about one picture"
# not head: it stops reading early, which pipefail takes for an error
picture=$(find "$out/dataset" -path '*validation*' -name '*.jpg' | sort | sed -n 1p)
python chat.py --version "$out/merged" --image "$picture" \
  --classes "sky, water, road, boat, bus, tree, clock" --vis_save_path "$out/chat"

printf '\nDone in %d s. Pictures: %s/report/grid.png, %s/chat\n' $((SECONDS - started)) "$out" "$out"

#!/usr/bin/env bash
# The main job end to end on the embedded toy world: set-up, data, training with LoRA, merge, evaluation, images.
# 5 minutes on two CPU cores with bf16 instructions, 10 to 15 without (by counting). usage: bash scripts/demo.sh [OUT]   (default runs/demo; a second run starts afresh)
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
out=${1:+$(here_new "$1")}
cd "$(dirname "$0")/.."
out=${out:-runs/demo}
source scripts/fresh.sh
fresh "$out/train"
source scripts/setup.sh requirements.txt
started=$SECONDS

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "1/5 Rendering the toy world"
python scripts/make_toy_dataset.py "$out/dataset" --force --seed 0 --images 3000 --val_images 100 \
  --only ade20k refcoco reason_seg llava_instruct

step "2/5 Training (LoRA on the toy base, the recipe of configs/toy/lasagna.yaml)"
python train_ds.py --config configs/toy/lasagna.yaml --dataset_dir "$out/dataset" --log_base_dir "$out" --exp_name train

step "3/5 Merging into one folder"
python merge_lora_weights_and_save_hf_model.py --run "$out/train" --save_path "$out/merged"

step "4/5 Evaluating before and after, on images never trained on"
python scripts/demo_report.py --run "$out/train" --merged "$out/merged" --dataset_dir "$out/dataset" --out "$out/report"

step "5/5 Asking the merged model about one image"
# not head: it stops reading early, which pipefail takes for an error
picture=$(find "$out/dataset" -path '*validation*' -name '*.jpg' | sort | sed -n 1p)
python chat.py --version "$out/merged" --image "$picture" \
  --classes "sky, water, road, boat, bus, tree, clock" --vis_save_path "$out/chat"

cat <<END

Done in $((SECONDS - started)) s. To look at:
  $out/report/grid.png     answers before and after training, next to the truth
  $out/chat                the answer of step 5: masks, an overlay, a JSON
To go further, from $PWD:
  source .venv/bin/activate
  python chat.py --version $(printf %q "$out/merged") --image $(printf %q "$picture") --prompt "Where is the sky in this image?"
  python test_sem.py --version $(printf %q "$out/merged") --dataset_dir $(printf %q "$out/dataset") --suites 'ade20k|val' --limit 20
END

#!/usr/bin/env bash
# Trains configs/camvid.yaml on the 367 training frames of CamVid, in two processes of one thread, then scores all frames of
# val with generated answers and writes a page with overlays. A second run starts afresh; embeddings of the tower are kept.
# usage: bash scripts/camvid.sh DATASET [OUT] [TOWER]   (OUT: default runs/camvid; TOWER: default facebook/dinov2-small)
set -euo pipefail
usage="usage: bash scripts/camvid.sh DATASET [OUT] [TOWER]   (DATASET/camvid holds images, masks and classes.txt)"
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
data=$(here "${1:?$usage}")
out=${2:+$(here_new "$2")}
tower=$(here "${3:-facebook/dinov2-small}")
cd "$(dirname "$0")/.."
out=${out:-runs/camvid}
source scripts/fresh.sh
fresh "$out/train" "$out/language" "$out/generate"
source scripts/setup.sh requirements.txt
export OMP_NUM_THREADS=1
started=$SECONDS

python -m toy.base.language "$out/language/llama"
torchrun --standalone --nproc_per_node 2 train_ds.py --config configs/camvid.yaml --dataset_dir "$data" --log_base_dir "$out" \
  --exp_name train --version "$out/language/llama" --vision_tower "$tower" --set "model.embedding_cache.folder=$out/embeddings"
printf 'Trained in %d s\n' $((SECONDS - started))
python test_sem.py --version "$out/train" --dataset_dir "$data" --suites camvid --protocol generate --batch_size 4 \
  --max_new_tokens 96 --out "$out"

printf '\nDone in %d s. Page: %s/generate/report/index.html\n' $((SECONDS - started)) "$out"

#!/usr/bin/env bash
# Evaluates a GSVA: a run folder, a merged folder or published weights; as published, with the words given, every phrase
# decided, masks of a second pass (published figures are the as_released ones; --protocol generate is the honest answer).
# usage: bash scripts/eval_gsva.sh CHECKPOINT DATASET [test_sem.py flags]
# GSVA's published bare file: bash scripts/eval_gsva.sh LLAVA DATASET --system gsva --weight gsva-7b-ft-gres.bin
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:?usage: eval_gsva.sh CHECKPOINT DATASET [flags]}
dataset=${2:?usage: eval_gsva.sh CHECKPOINT DATASET [flags]}
shift 2
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol teacher_forced \
  --suites 'grefcoco|unc|*' 'refzom|final|test' 'refcoco|unc|*' 'refcoco+|unc|*' 'refcocog|umd|*' "$@"

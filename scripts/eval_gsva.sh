#!/usr/bin/env bash
# Evaluates a GSVA: a run folder, a merged folder or published weights; as published, teacher forced: the words of the
# answers are given, the model decides on every phrase, and the masks come from a second pass. The published figures are
# the as_released ones; --protocol generate scores the model's own answers.
# usage: bash scripts/eval_gsva.sh CHECKPOINT DATASET [test_sem.py flags]
# GSVA's published bare file: bash scripts/eval_gsva.sh LLAVA DATASET --system gsva --weight gsva-7b-ft-gres.bin
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
checkpoint=$(here "${1:?usage: eval_gsva.sh CHECKPOINT DATASET [flags]}")
dataset=$(here "${2:?usage: eval_gsva.sh CHECKPOINT DATASET [flags]}")
shift 2
cd "$(dirname "$0")/.."
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol teacher_forced \
  --suites 'grefcoco|unc|*' 'refzom|final|test' 'refcoco|unc|*' 'refcoco+|unc|*' 'refcocog|umd|*' "$@"

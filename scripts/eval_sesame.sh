#!/usr/bin/env bash
# Evaluates a SESAME: a run folder, a merged folder or published weights; as published, with generated answers.
# usage: bash scripts/eval_sesame.sh CHECKPOINT DATASET [test_sem.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
checkpoint=$(here "${1:?usage: eval_sesame.sh CHECKPOINT DATASET [flags]}")
dataset=$(here "${2:?usage: eval_sesame.sh CHECKPOINT DATASET [flags]}")
shift 2
cd "$(dirname "$0")/.."
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol generate \
  --suites 'fp*|val' 'R-*|val' 'apart-*|val' "$@"

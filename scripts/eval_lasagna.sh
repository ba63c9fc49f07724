#!/usr/bin/env bash
# Evaluates a LaSagnA: a run folder, a merged folder or published weights; generated class lists, then the referring sets.
# usage: bash scripts/eval_lasagna.sh CHECKPOINT DATASET [test_sem.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
checkpoint=$(here "${1:?usage: eval_lasagna.sh CHECKPOINT DATASET [flags]}")
dataset=$(here "${2:?usage: eval_lasagna.sh CHECKPOINT DATASET [flags]}")
shift 2
cd "$(dirname "$0")/.."
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol generate \
  --suites semantic 'refcoco|unc|*' 'refcoco+|unc|*' 'refcocog|umd|*' 'ReasonSeg|val' "$@"

#!/usr/bin/env bash
# Evaluates a unified model: a run folder or a merged folder; every suite that the data allow, with generated answers.
# usage: bash scripts/eval_unified.sh CHECKPOINT DATASET [test_sem.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
checkpoint=$(here "${1:?usage: eval_unified.sh CHECKPOINT DATASET [flags]}")
dataset=$(here "${2:?usage: eval_unified.sh CHECKPOINT DATASET [flags]}")
shift 2
cd "$(dirname "$0")/.."
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol generate --suites all "$@"

#!/usr/bin/env bash
# Evaluates a unified model: a run folder or a merged folder; every suite that the data allow, with generated answers.
# usage: bash scripts/eval_unified.sh CHECKPOINT DATASET [test_sem.py flags]
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:?usage: eval_unified.sh CHECKPOINT DATASET [flags]}
dataset=${2:?usage: eval_unified.sh CHECKPOINT DATASET [flags]}
shift 2
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol generate --suites all "$@"

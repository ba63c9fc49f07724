#!/usr/bin/env bash
# Evaluates a LISA: a run folder, a merged folder or published weights; as published, with the answers given.
# Two published JSONs of ReasonSeg|test have no polygon (LISA issue 157): they are left out, and counted.
# usage: bash scripts/eval_lisa.sh CHECKPOINT DATASET [test_sem.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
checkpoint=$(here "${1:?usage: eval_lisa.sh CHECKPOINT DATASET [flags]}")
dataset=$(here "${2:?usage: eval_lisa.sh CHECKPOINT DATASET [flags]}")
shift 2
cd "$(dirname "$0")/.."
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol teacher_forced --on_bad_sample skip \
  --suites 'refcoco|unc|*' 'refcoco+|unc|*' 'refcocog|umd|*' 'ReasonSeg|val' 'ReasonSeg|test' "$@"

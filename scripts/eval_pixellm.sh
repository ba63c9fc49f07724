#!/usr/bin/env bash
# Evaluates a PixelLM: a run folder, a merged folder or the published weights (their sub-folder hf_model), as published
# with the answers given; MUSE with generated ones, masks alone (the paper's judge of texts was not released).
# usage: bash scripts/eval_pixellm.sh CHECKPOINT DATASET [test_sem.py flags]
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
checkpoint=$(here "${1:?usage: eval_pixellm.sh CHECKPOINT DATASET [flags]}")
dataset=$(here "${2:?usage: eval_pixellm.sh CHECKPOINT DATASET [flags]}")
shift 2
cd "$(dirname "$0")/.."
source scripts/activate.sh
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol teacher_forced \
  --suites 'refcoco|unc|*' 'refcoco+|unc|*' 'refcocog|umd|*' 'ReasonSeg|val' "$@"
python test_sem.py --version "$checkpoint" --dataset_dir "$dataset" --protocol generate --suites muse "$@"

#!/usr/bin/env bash
# All five papers and the unified model in miniature: training, every toy benchmark, table, plots and images.
# Two seeds of every system until it has learned: a night on two CPU cores (a training of 1,000 steps takes 25 to 50 minutes
# on one without bf16 instructions, its evaluation 6); `--seeds 0 --steps 320 --patience 0` takes two hours. usage: bash scripts/miniature.sh [OUT] [flags of `python -m toy.study`]
# (default runs/miniature; an interrupted run resumes)
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python -m toy.study "${@:-runs/miniature}"

#!/usr/bin/env bash
# All five papers and the unified model in miniature: training, every toy benchmark, table, plots and images.
# Two seeds of every system until it has learned: a night on two CPU cores. (Without bf16 instructions 1,000 steps take 40 to 70
# minutes on one of them; `--seeds 0 --steps 320 --patience 0` about two hours in all. Both are estimates.)
# usage: bash scripts/miniature.sh [OUT] [flags of `python -m toy.study`]
# (default runs/miniature; an interrupted run resumes)
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python -m toy.study "${@:-runs/miniature}"

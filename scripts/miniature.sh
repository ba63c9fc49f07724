#!/usr/bin/env bash
# All five papers and the unified model in miniature: training, every toy benchmark, table, plots and images.
# Two seeds of every system until it has learned: 2 h 25 min on two CPU cores with bf16 instructions and `--steps 1200`.
# (The systems alone with `--seeds 0 --steps 1000` take 30 to 50 minutes; without bf16 instructions a step takes two to three times as long.)
# usage: bash scripts/miniature.sh [OUT] [flags of `python -m toy.study`]
# (default runs/miniature; an interrupted run resumes)
set -euo pipefail
# shellcheck source=scripts/paths.sh
source "$(dirname "$0")/paths.sh"
[[ -z ${1:-} || $1 == -* ]] || set -- "$(here_new "$1")" "${@:2}"
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python -m toy.study "${@:-runs/miniature}"

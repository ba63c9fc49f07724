#!/usr/bin/env bash
# All five papers and the unified model in miniature: training, every toy benchmark, table, plots and images.
# At most 90 minutes on two CPU cores. usage: bash scripts/miniature.sh [OUT] [flags of `python -m toy.study`]
# (default runs/miniature; an interrupted run resumes)
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python -m toy.study "${@:-runs/miniature}"

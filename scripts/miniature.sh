#!/usr/bin/env bash
# All five papers and the unified model in miniature: training, every toy benchmark, table, plots and pictures.
# At most 90 minutes on two CPU cores. usage: bash scripts/miniature.sh [OUT] [flags of scripts/miniature.py]
# (default runs/miniature; a cut run goes on where it stopped)
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python scripts/miniature.py "${@:-runs/miniature}"

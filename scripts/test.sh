#!/usr/bin/env bash
# Sets up .venv and runs the checks: ruff, then the tests. Arguments go to pytest (e.g. -m slow, tests/test_golden.py).
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
python -m pytest "$@"

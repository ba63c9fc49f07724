#!/usr/bin/env bash
# Sets up .venv and runs the checks: ruff, ty (types), then the tests. Arguments go to pytest, and choose the tests:
#   bash scripts/test.sh -m slow                  the long proofs, which are left out otherwise
#   bash scripts/test.sh tests/test_golden.py     one file
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
ty check
# Two processes, each with one thread (tests/conftest.py): small enough for any machine. A file stays in one of them.
if [ $# -eq 0 ]; then set -- -m "not slow" -n 2 --dist loadfile; fi
python -m pytest "$@"

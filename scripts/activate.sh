# shellcheck shell=bash
# Sourced by the other scripts, in the root of the repository: a `python` that has the packages of requirements.txt. It is
# the shell's own where that has them (an activated environment, conda, a container), else that of .venv, which is made
# first where it is missing. The demo and the tests use .venv in any case (setup.sh): they need the pinned versions.
has_packages() {
  python -c 'import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("torch", "transformers", "deepspeed"))))' 2>/dev/null
}
# shellcheck source=scripts/setup.sh
has_packages || source scripts/setup.sh requirements.txt

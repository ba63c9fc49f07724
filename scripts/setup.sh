# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with Python 3.11 or newer, installs the given requirements file once, and
# activates .venv.
# usage: source scripts/setup.sh requirements.txt
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
requirements=${1:-requirements.txt}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || {
  echo "Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=.venv/.installed-$({ echo "$requirements"; cat requirements*.txt; } | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  echo "Installing $requirements into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
# shellcheck source=/dev/null
source .venv/bin/activate
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false

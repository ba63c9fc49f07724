# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with Python 3.11 or newer, installs the given requirements file once, and
# activates .venv.
# usage: source scripts/setup.sh requirements.txt
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
requirements=${1:-requirements.txt}
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || {
  echo "Python 3.11 or newer is needed, and there is no python3 on PATH; set PYTHON=/path/to/python3.11" >&2
  exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || {
  echo "Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 1
}
# None yet, or one that an interruption left without pip, or whose Python is gone: venv would keep the links to that.
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  rm -f .venv/bin/python* .venv/.installed-*
  "$python" -m venv .venv
fi
stamp=.venv/.installed-$({ echo "$requirements"; cat requirements*.txt; } | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  echo "Installing $requirements into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
# shellcheck source=/dev/null
source .venv/bin/activate
[[ $VIRTUAL_ENV -ef .venv ]] || {
  echo "$PWD/.venv was made at $VIRTUAL_ENV, and works only there: remove it and start again" >&2
  exit 1
}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false

# shellcheck shell=bash
# Sourced by the other scripts before they enter the root of the repository: `here PATH` prints a path of the folder that
# the script was called from as one that holds there, too. What is no file or folder (a name on the hub) stays as it is.
here() {
  if [[ -e $1 && $1 != /* && ! $PWD -ef "$(dirname "${BASH_SOURCE[0]}")/.." ]]; then
    printf '%s/%s\n' "$PWD" "$1"
  else
    printf '%s\n' "$1"
  fi
}

# shellcheck shell=bash
# Sourced by the other scripts before they enter the root of the repository, where a path of the folder that the script was
# called from holds no more. `here PATH` prints one that does; what is no file or folder (a name on the hub) stays as it is.
# `here_new PATH` is for a folder that is to be made.
here() {
  if [[ -e $1 ]]; then here_new "$1"; else printf '%s\n' "$1"; fi
}
here_new() {
  if [[ $1 == /* || $PWD -ef "$(dirname "${BASH_SOURCE[0]}")/.." ]]; then
    printf '%s\n' "$1"
  else
    printf '%s/%s\n' "$PWD" "$1"
  fi
}

# shellcheck shell=bash
# Sourced by the other scripts: `fresh FOLDER...` leaves these folders empty. It removes only what an earlier run of the
# same script made, which the mark .made_by shows; if one of the folders is not of that kind, nothing is removed and the
# script stops.
fresh() {
  local folder script
  script=$(basename "$0")
  for folder in "$@"; do
    if [[ -L $folder || ( -e $folder && ! -d $folder ) || ( -n $(ls -A "$folder" 2>/dev/null) && $(cat "$folder/.made_by" 2>/dev/null) != "$script" ) ]]; then
      echo "$script: $folder holds what this script did not make; move it, or give another OUT" >&2
      exit 1
    fi
  done
  for folder in "$@"; do
    rm -rf "$folder"
    mkdir -p "$folder"
    echo "$script" >"$folder/.made_by"
  done
}

# What the scripts of this folder share: usage, failures, and where Python is. Sourced, never run.
# shellcheck shell=bash

say() { printf 'visiondrop: %s\n' "$*" >&2; }

fail() {
  printf 'visiondrop: error: %s\n' "$*" >&2
  exit 2
}

# usage SCRIPT: its header, without the marks of a comment.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# is_number TEXT LEAST: a whole number that is not too small. A zero in front would make it octal later.
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (($1 >= $2)); }

# find_python: PYTHON if it is set, else that of the checkout's environment, else the first one found.
find_python() {
  local own
  own=$(dirname "${BASH_SOURCE[0]}")/../../.venv/bin/python
  if [[ -n ${PYTHON:-} ]]; then
    echo "$PYTHON"
  elif [[ -x $own ]]; then
    realpath --no-symlinks "$own"
  else
    command -v python3 || echo python3
  fi
}

# check_python PYTHON: whether the engine is installed there. Not by importing it, which takes long.
check_python() {
  "$1" -I -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("vd_plugin") and u.find_spec("server")))' \
    2>/dev/null || fail "$1 has no VisionDrop; run make setup, or set PYTHON to one that has it"
}

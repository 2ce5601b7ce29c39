#!/usr/bin/env bash
# Installs the clients that the tests of this folder run. Does nothing for what is there already.
#
#   tests/clients/install.sh python javascript     either, or nothing for both
#   PYTHON=python3.12 tests/clients/install.sh     another Python than .venv's for the environment of the Python clients
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=tests/clients
venv=.cache/clients-venv
oldest_node=20

fail() {
  printf 'visiondrop clients: %s\n' "$*" >&2
  exit 1
}

mkdir -p .cache
exec 9>.cache/clients.lock
flock 9

# is_current STAMP FILE WORD: whether STAMP was written for FILE as it is now.
digest() { printf '%s %s\n' "$(sha256sum <"$1" | cut -d' ' -f1)" "$2"; }
is_current() { [[ -f $1 && $(<"$1") == "$(digest "$2" "$3")" ]]; }

install_python() {
  local python=${PYTHON:-.venv/bin/python} lock=$folder/requirements.txt version
  version=$("$python" --version) || fail "$python does not run; run make setup first, or set PYTHON."
  if is_current "$venv/.installed" "$lock" "$version" && "$venv/bin/python" -c ''; then return; fi
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --no-input --no-deps --only-binary :all: --requirement "$lock"
  "$venv/bin/python" -m pip check
  digest "$lock" "$version" >"$venv/.installed"
}

install_javascript() {
  local lock=$folder/js/package-lock.json modules=$folder/js/node_modules version
  command -v node >/dev/null && command -v npm >/dev/null ||
    fail "node and npm are not installed; install Node.js $oldest_node or newer."
  version=$(node --version)
  [[ ${version#v} =~ ^([0-9]+) ]] && ((BASH_REMATCH[1] >= oldest_node)) ||
    fail "this is Node.js $version; install $oldest_node or newer."
  if is_current "$modules/.installed" "$lock" "$version"; then return; fi
  npm ci --prefix "$folder/js" --ignore-scripts --no-audit --no-fund --loglevel error
  digest "$lock" "$version" >"$modules/.installed"
}

(($#)) || set -- python javascript
for part in "$@"; do
  case $part in
    python | javascript) "install_$part" ;;
    *) fail "there is no '$part'; give python, javascript or nothing for both." ;;
  esac
done

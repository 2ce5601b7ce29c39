#!/usr/bin/env bash
# Creates .venv and keeps it in line with the lock. Does nothing if nothing has changed.
#
#   deploy/setup.sh                            CUDA packages if nvidia-smi works, otherwise CPU packages
#   VISIONDROP_BACKEND=cpu deploy/setup.sh     CPU (or cuda: CUDA) packages on any machine, whatever its driver
#   PYTHON=python3.12 deploy/setup.sh          this Python instead of the first one found
#
# Two stamps inside .venv record what is installed: `.locked` (backend, hash of the lock, folder of the project) and
# `.project` (hash of the files that define the project's installation). A stamp is removed before its part changes and
# written afterwards, so an environment without `.locked` was interrupted and is created again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=$venv/bin/python
log=.cache/setup.log
num_steps=5
source deploy/steps.sh

mkdir -p .cache
exec 9>.cache/setup.lock
flock --nonblock 9 || {
  say "Another set-up is running in this folder; waiting for it to finish."
  flock 9
}

backend=${VISIONDROP_BACKEND:-}
if [[ -z $backend && -f $venv/.locked ]]; then
  read -r backend _ <"$venv/.locked"
elif [[ -z $backend ]]; then
  backend=cpu
  if nvidia-smi -L >/dev/null 2>&1; then
    check_driver 580 # the oldest for CUDA 13, which cuda.txt's packages are built for (CUDA's release notes)
    backend=cuda
  fi
fi
[[ $backend == cpu || $backend == cuda ]] || fail "VISIONDROP_BACKEND is '$backend'; set it to cpu or cuda."

lock=requirements/$backend.txt
locked="$backend $(sha256sum <"$lock" | cut -d' ' -f1) $PWD"
project=$(cat pyproject.toml vd_plugin/cpu/visiondrop_cpu.pth | sha256sum | cut -d' ' -f1)

works() { "$python" -c 'import sys' 2>/dev/null; }
is_current() { [[ -f $venv/$1 && $(<"$venv/$1") == "$2" ]]; }
stamp() { printf '%s\n' "$2" >"$venv/$1.new" && mv "$venv/$1.new" "$venv/$1"; }

if works && is_current .locked "$locked" && is_current .project "$project"; then
  exit 0
fi

make_venv() {
  rm -rf "$venv"
  "$1" -m venv "$venv"
}

install_locked() {
  "$python" -m pip install --no-input --no-deps --only-binary :all: --requirement "$lock"
}

# Uninstall packages that are no longer in the lock; then check that all packages are there and built for the backend.
check_locked() {
  "$python" - "$lock" "$backend" <<'PY'
import re, subprocess, sys
from importlib.metadata import distributions

def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()

def pip(*arguments): return subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=subprocess.PIPE, text=True)

lines = open(sys.argv[1]).read().splitlines()
wanted = {canonical(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
left_out = {name for line in lines if line.startswith("# Left out: ") for name in line.split()[3:]}
installed = {canonical(d.metadata["Name"]) for d in distributions()}
strangers = sorted(installed - wanted - {"pip", "setuptools", "visiondrop"})
if strangers:
    print("no longer in the lock:", *strangers)
    pip("uninstall", "--yes", *strangers).check_returncode()
checked = pip("check")
complaints = [line for line in checked.stdout.splitlines() if "which is not installed" not in line
              or line.split(" requires ")[1].split(",")[0] not in left_out]
if checked.returncode and complaints:
    sys.exit("\n".join(complaints))
import torch
if sys.argv[2] == "cpu":
    cuda = sorted(name for name in wanted if name.startswith("nvidia-"))
    sys.exit(f"CUDA packages on a CPU machine: {cuda}, torch {torch.__version__}" if cuda or torch.version.cuda else 0)
sys.exit(0 if torch.version.cuda else f"torch {torch.__version__} has no CUDA")
PY
}

install_project() {
  "$python" -m pip install --no-input --no-deps --no-build-isolation --editable .
}

: >"$log"
if works && is_current .locked "$locked"; then
  num_steps=1
else
  check_platform
  # cuda.txt pins a package without wheels for Python 3.13.
  if [[ $backend == cpu ]]; then needed_gib=6 newest_minor=13; else needed_gib=24 newest_minor=12; fi
  if works && [[ -f $venv/.locked && $(<"$venv/.locked") == "$backend "*" $PWD" ]]; then
    say "The lock has changed: updating $venv ($backend)."
    num_steps=4
    rm -f "$venv/.locked" "$venv/.project"
  else
    interpreter=$(find_python "$newest_minor")
    check_disk "$needed_gib"
    if [[ $backend == cpu ]]; then check_library "$interpreter" libnuma.so.1 libnuma1; fi
    say "Setting up $venv: $("$interpreter" --version), $backend packages. This takes a few minutes, once."
    step "An empty environment" make_venv "$interpreter"
  fi
  if [[ $backend == cpu ]]; then
    step "PyTorch, CPU build (about 190 MB)" install_torch_cpu "$python" "$(grep '^torch==' "$lock")"
  else
    num_steps=$((num_steps - 1))
  fi
  step "The engine and everything else ($(grep -c '==' "$lock") pinned packages)" install_locked
  step "Checking what was installed" check_locked
  stamp .locked "$locked"
fi
rm -f "$venv/.project"
step "VisionDrop itself" install_project
stamp .project "$project"
say "Ready: $venv ($backend), $SECONDS s."

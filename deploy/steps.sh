# What deploy/setup.sh and deploy/lock.sh share: numbered steps, failures that say what to do, Python and PyTorch.
# Sourced, never run. The caller sets `log` (a file) and `num_steps`.
# shellcheck shell=bash
# shellcheck disable=SC2154

uv_pin=uv==0.13.9 # knows PyTorch's own package index by name
step_number=0
child=

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "visiondrop set-up: $*"
  exit 1
}

# step LABEL COMMAND...: run the command with its output in the log, show progress, and explain a failure.
step() {
  local label=$1 started=$SECONDS shown=$SECONDS status=0 first_line
  shift
  step_number=$((step_number + 1))
  first_line=$(($(wc -l <"$log") + 1))
  printf '== %s\n' "$label" >>"$log"
  say "[$step_number/$num_steps] $label"
  set -m # a process group of its own, so that stop_child reaches all of it
  "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  set +m
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - shown >= 10)); then
      shown=$SECONDS
      say "      $((SECONDS - started)) s: $(tail -n "+$first_line" "$log" | progress)"
    fi
  done
  wait "$child" || status=$?
  child=
  if ((status != 0)); then
    explain "$label" "$(tail -n "+$first_line" "$log")"
  fi
  say "      done in $((SECONDS - started)) s"
}

# Summarise pip's log, read from standard input, as one line of progress.
progress() {
  awk '/^(Collecting|Processing) /{n++} /^Installing collected/{last=1} {line=$0}
       END{if (last) print 0+n " packages fetched, unpacking"; else if (n) print n " packages so far"; else print substr(line, 1, 90)}'
}

# explain LABEL OUTPUT: print one sentence about what to do, then exit.
explain() {
  say "      last lines of $log:"
  tail -n 5 <<<"$2" | cut -c1-200 | sed 's/^/      | /' >&2
  case $2 in
    *"No space left on device"* | *"Disk quota exceeded"*)
      fail "the disk is full ($1). Free some space and run make again; 'pip cache purge' removes downloads." ;;
    *"CERTIFICATE_VERIFY_FAILED"* | *"SSLError"*)
      fail "the certificate of the package index was rejected ($1). Point pip at your network's certificates" \
        "(pip config set global.cert FILE) and run make again." ;;
    *"Failed to establish a new connection"* | *"Temporary failure in name resolution"* | *"Network is unreachable"* | \
      *"Read timed out"* | *"ConnectTimeout"* | *"Connection refused"* | *"ProxyError"* | *"Connection aborted"*)
      fail "the package index could not be reached ($1). Check the network and pip's settings (pip config list)," \
        "then run make again; finished downloads are kept." ;;
    *"No matching distribution found"*)
      fail "the package index has no such package for this Python ($1; see the ERROR line above). Check that pip's" \
        "index is the right one (pip config list), or try another Python: make PYTHON=python3.11." ;;
    *)
      fail "failed at: $1. The whole output is in $log; fix the error that it reports and run make again." ;;
  esac
}

stop_child() {
  trap - INT TERM
  if [[ -n $child ]]; then
    kill -- "-$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  say
  fail "interrupted. Run make again: it replaces an incomplete environment."
}
trap stop_child INT TERM

check_platform() {
  [[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
    fail "this is $(uname -s) on $(uname -m); the pinned engine runs on Linux x86-64. Use such a machine," \
      "or install the gateway alone: pip install ."
}

# find_python NEWEST_MINOR: print a Python, 3.11 to 3.NEWEST_MINOR, that has the venv module.
find_python() {
  local name without_venv='' versions="3.11 to 3.$1"
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    "$name" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $1))" 2>/dev/null || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$name"
      return
    fi
    without_venv=$name
  done
  [[ -z $without_venv ]] ||
    fail "$without_venv has no venv module. On Debian or Ubuntu: sudo apt-get install" \
      "$("$without_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'), then run make again."
  [[ -z ${PYTHON:-} ]] || fail "PYTHON=$PYTHON is not Python $versions. Set PYTHON to one that is."
  fail "no Python $versions found. On Debian or Ubuntu: sudo apt-get install python3 python3-venv," \
    "or specify one: make PYTHON=/path/to/python3.11."
}

# check_driver MAJOR: nvidia-smi lists GPUs whose driver is too old for the pinned PyTorch.
check_driver() {
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1) || true
  [[ ! $version =~ ^([0-9]+)\. ]] || ((BASH_REMATCH[1] >= $1)) ||
    fail "the NVIDIA driver is $version, but the CUDA packages need $1 or newer. Update the driver and run make again," \
      "or select the packages yourself: make VISIONDROP_BACKEND=cpu, or =cuda where CUDA's compatibility libraries are" \
      "installed."
}

# check_disk GIB
check_disk() {
  local free_kib
  free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
  ((free_kib >= $1 * 1024 * 1024)) ||
    fail "$((free_kib / 1024 / 1024)) GiB are free on this disk, but the set-up needs $1. Free some space" \
      "and run make again."
}

# check_library PYTHON FILE PACKAGE: a shared library that vLLM's wheel for CPUs needs and does not bring.
check_library() {
  "$1" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$2" 2>/dev/null ||
    fail "the library $2 is missing; vLLM needs it on a CPU. On Debian or Ubuntu: sudo apt-get install $3," \
      "then run make again."
}

# install_torch_cpu PYTHON PIN: install PyTorch's CPU build and no other. Its version ends in +cpu; the main package
# index has no such version. pip's configured sources (a wheel on disk, a mirror) are tried first, then PyTorch's index.
install_torch_cpu() {
  [[ $2 == torch==*+cpu ]] || {
    echo "not a CPU build: '$2'"
    return 1
  }
  "$1" -m pip install --no-input --no-deps --only-binary :all: "$2" && return
  echo "not in pip's configured sources; trying PyTorch's own index"
  "$1" -m pip install --no-input --no-deps --only-binary :all: "$uv_pin"
  "$1" -m uv pip install --python "$1" --no-deps --torch-backend=cpu "${2%+cpu}"
}

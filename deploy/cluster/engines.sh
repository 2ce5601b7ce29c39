#!/usr/bin/env bash
# Runs several engines on this machine, each on its own GPUs, and a gateway before them.
#
#   engines.sh N MODEL [vLLM options]
#
#   engines.sh 4 llava-hf/llava-v1.6-vicuna-7b-hf --max-num-seqs 119
#   GPUS_PER_ENGINE=2 engines.sh 2 llava-hf/llava-v1.6-34b-hf
#
# Engine I gets the I-th GPU, or group of GPUs, of CUDA_VISIBLE_DEVICES (by default 0, 1, 2, ...). The gateway starts
# when all engines are ready. An engine that dies is started again. kill -TERM of one of the printed process ids is a
# restart without a lost request: that engine takes no more work, ends what it has, and is started again.
#
# Ctrl-C or SIGTERM stops the gateway first, which waits for requests in flight, then the engines. Nothing is left
# behind, even if this script is killed.
#
#   HOST=127.0.0.1 PORT=8000   where the gateway listens
#   GPUS_PER_ENGINE=1          tensor parallelism within each engine
#   DRAIN_SECONDS=60           what the requests of an engine get to finish when it is stopped
#   LOGS=FOLDER                for the engines' logs (default: a new folder under /tmp)
#   PYTHON=/path/to/python     of an environment with VisionDrop
#   VISIONDROP_*               the gateway's settings, see docs/operations.md
set -euo pipefail
# shellcheck source=say.sh
source "$(dirname "${BASH_SOURCE[0]}")/say.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage "${BASH_SOURCE[0]}"; exit; }
(($# >= 2)) || fail "usage: engines.sh N MODEL [vLLM options] (engines.sh --help tells more)"
num_engines=$1 model=$2
shift 2
options=("$@")
gpus_per_engine=${GPUS_PER_ENGINE:-1} drain_seconds=${DRAIN_SECONDS:-60}
is_number "$num_engines" 1 || fail "N is the number of engines, 1 or more; got '$num_engines'"
is_number "$gpus_per_engine" 1 || fail "GPUS_PER_ENGINE is a number, 1 or more; got '$gpus_per_engine'"
is_number "$drain_seconds" 1 || fail "DRAIN_SECONDS is a number, 1 or more; got '$drain_seconds'"
for option in "${options[@]}"; do
  case ${option%%=*} in
    --uds | --host | --port | --shutdown-timeout) fail "engine option ${option%%=*}: set by this script" ;;
    --tensor-parallel-size | -tp) fail "engine option ${option%%=*}: set GPUS_PER_ENGINE" ;;
  esac
done
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) ||
  fail "this script needs bash 5.1 or newer; this is $BASH_VERSION"
python=$(find_python)
check_python "$python"
guard=$("$python" -I -c 'import importlib.util as u; print(u.find_spec("server.launcher.guard").origin)')

# gpus PLACE: the devices of one engine.
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
  ((${#devices[@]} >= num_engines * gpus_per_engine)) ||
    fail "$num_engines engines of $gpus_per_engine GPUs need more than CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
else
  mapfile -t devices < <(seq 0 $((num_engines * gpus_per_engine - 1)))
fi
gpus() {
  local IFS=,
  echo "${devices[*]:$1*gpus_per_engine:gpus_per_engine}"
}

# Before the minutes that engines take to load.
reason=$("$python" - "${HOST:-127.0.0.1}" "${PORT:-8000}" 2>&1 <<'PYTHON'
import sys
from server.http.listener import Address, StartError, bound_socket
from server.settings import Settings

try:
    Settings()
    with bound_socket(Address(sys.argv[1], int(sys.argv[2]))):
        pass
except (ValueError, StartError) as error:
    sys.exit(" ".join(str(error).split()))
PYTHON
) || fail "${reason:-the gateway cannot be started}"

logs=${LOGS:-$(mktemp --directory /tmp/visiondrop-logs-XXXXXX)}
mkdir -p "$logs" || fail "the folder of the logs, $logs, cannot be made"
run=$(mktemp --directory /tmp/visiondrop-XXXXXX)

# The guards (server/launcher/guard.py) of engines and gateway read from this pipe. When its other end is closed, by
# this script or by its death, each ends what it guards with all of its processes.
mkfifo "$run/alive"
exec {alive}<>"$run/alive"

declare -A engine_of=() # process id -> place
gateway=
waiter=
stopping=

# guarded GRACE_SECONDS COMMAND...
guarded() {
  local grace=$1
  shift
  exec "$python" -I -S "$guard" "$grace" --remove "$run" "$@" <"$run/alive" {alive}>&-
}

# start_engine PLACE
start_engine() {
  rm -f "$run/$1.sock" # vLLM leaves it behind
  CUDA_VISIBLE_DEVICES=$(gpus "$1") guarded "$((drain_seconds + 15))" \
    "$python" -m vd_plugin.engine "$model" --uds "$run/$1.sock" --shutdown-timeout "$drain_seconds" \
    --tensor-parallel-size "$gpus_per_engine" "${options[@]}" >>"$logs/engine-$1.log" 2>&1 &
  engine_of[$!]=$1
  say "engine $1 is process $!, on GPU $(gpus "$1"), its log: $logs/engine-$1.log"
}

# clean_up: what a dead engine has left behind. The guard leads the process group.
clean_up() { kill -KILL -- "-$1" 2>/dev/null || true; }

stop() {
  local status=$? process
  trap - EXIT
  trap '' INT TERM
  if [[ -n $gateway ]]; then
    kill -TERM "$gateway" 2>/dev/null || true
    wait "$gateway" || true
  fi
  [[ -z $waiter ]] || kill "$waiter" 2>/dev/null || true
  exec {alive}>&-
  for process in "${!engine_of[@]}"; do
    wait "$process" 2>/dev/null || true
    clean_up "$process"
  done
  rm -rf "$run"
  exit "$status"
}
trap stop EXIT
trap 'stopping=yes' INT TERM

for ((place = 0; place < num_engines; place++)); do start_engine "$place"; done

"$python" - "$run" "$num_engines" <<'PYTHON' &
import sys, time, httpx

for place in range(int(sys.argv[2])):
    client = httpx.Client(transport=httpx.HTTPTransport(uds=f"{sys.argv[1]}/{place}.sock"), timeout=3)
    while True:
        try:
            if client.get("http://engine/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.5)
PYTHON
waiter=$!
say "waiting for $num_engines engines"

while [[ -z $stopping ]]; do
  ended=
  status=0
  wait -n -p ended || status=$?
  if [[ -z ${ended:-} ]]; then
    continue # a signal
  elif [[ $ended == "$waiter" ]]; then
    waiter=
    ((status == 0)) || exit "$status"
    urls=()
    for ((place = 0; place < num_engines; place++)); do urls+=(--engine "unix:$run/$place.sock"); done
    guarded 5 "$python" -m server.cli gateway --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "${urls[@]}" &
    gateway=$!
  elif [[ $ended == "$gateway" ]]; then
    gateway=
    exit "$status"
  else
    place=${engine_of[$ended]}
    unset "engine_of[$ended]"
    clean_up "$ended"
    if [[ -n $waiter ]]; then
      tail -n 5 "$logs/engine-$place.log" >&2
      fail "engine $place ended with status $status while it loaded; its log: $logs/engine-$place.log"
    fi
    say "engine $place ended with status $status and is started again"
    sleep 1
    start_engine "$place"
  fi
done

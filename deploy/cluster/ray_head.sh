#!/usr/bin/env bash
# Starts a Ray cluster on this machine, waits for its GPUs, and runs one engine over all of them.
#
#   ray_head.sh MODEL --tensor-parallel-size GPUS [vLLM options]
#
#   ray_head.sh llava-hf/llava-next-72b-hf --tensor-parallel-size 16
#
# Run ray_worker.sh on each of the other machines, before or after. The engine serves HTTP to its own machine:
#
#   visiondrop gateway --engine http://127.0.0.1:8100
#
# When the engine ends, or this script is told to, Ray is stopped on this machine, with all that uses it.
#
#   ENGINE_PORT=8100           HTTP
#   RAY_PORT=6379              where the workers report
#   VLLM_HOST_IP, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
#                              this machine's address and network interface, where it has several
#   PYTHON=/path/to/python     of an environment with VisionDrop and Ray (pip install 'ray[default]')
#
# Whoever reaches Ray's ports can run any code on every node: use a network of their own.
set -euo pipefail
# shellcheck source=say.sh
source "$(dirname "${BASH_SOURCE[0]}")/say.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage "${BASH_SOURCE[0]}"; exit; }
(($# >= 3)) ||
  fail "usage: ray_head.sh MODEL --tensor-parallel-size GPUS [vLLM options] (ray_head.sh --help tells more)"
model=$1
shift
gpus=
previous=
for option in "$@"; do
  case $previous in --tensor-parallel-size | -tp) gpus=$option ;; esac
  case $option in --tensor-parallel-size=* | -tp=*) gpus=${option#*=} ;; esac
  previous=$option
done
is_number "${gpus:-none}" 1 || fail "name the number of all GPUs together: --tensor-parallel-size GPUS"

python=$(find_python)
check_python "$python"
ray=$(dirname "$python")/ray
[[ -x $ray ]] || fail "Ray is not installed beside $python; run: $python -m pip install 'ray[default]'"

engine=
stop() {
  local status=$?
  trap - EXIT
  if [[ -n $engine ]]; then
    kill -TERM "$engine" 2>/dev/null || true
    wait "$engine" 2>/dev/null || true
  fi
  "$ray" stop >/dev/null
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$ray" start --head --port "${RAY_PORT:-6379}" ${VLLM_HOST_IP:+--node-ip-address "$VLLM_HOST_IP"}
say "waiting for $gpus GPUs to join"
"$python" - "$gpus" <<'PYTHON'
import sys, time, ray

ray.init(address="auto", log_to_driver=False)
while ray.cluster_resources().get("GPU", 0) < int(sys.argv[1]):
    time.sleep(1)
PYTHON
"$python" -m vd_plugin.engine "$model" --host 127.0.0.1 --port "${ENGINE_PORT:-8100}" \
  --distributed-executor-backend ray "$@" &
engine=$!
wait "$engine"

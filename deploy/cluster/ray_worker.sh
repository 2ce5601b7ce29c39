#!/usr/bin/env bash
# Joins this machine, with all of its GPUs, to the Ray cluster of an engine, and stays until it is stopped.
#
#   ray_worker.sh HEAD
#
#   ray_worker.sh 10.0.0.1     # the address of the machine that runs ray_head.sh
#
# The environment must be that of the head: the same Python, vLLM, VisionDrop and Ray, and the model at the same path.
#
#   RAY_PORT=6379              the head's port
#   VLLM_HOST_IP, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
#                              this machine's address and network interface, where it has several
#   PYTHON=/path/to/python     of an environment with VisionDrop and Ray
set -euo pipefail
# shellcheck source=say.sh
source "$(dirname "${BASH_SOURCE[0]}")/say.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage "${BASH_SOURCE[0]}"; exit; }
(($# == 1)) || fail "usage: ray_worker.sh HEAD (ray_worker.sh --help tells more)"
python=$(find_python)
check_python "$python"
ray=$(dirname "$python")/ray
[[ -x $ray ]] || fail "Ray is not installed beside $python; run: $python -m pip install 'ray[default]'"
exec "$ray" start --block --address "$1:${RAY_PORT:-6379}" ${VLLM_HOST_IP:+--node-ip-address "$VLLM_HOST_IP"}

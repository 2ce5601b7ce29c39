#!/usr/bin/env bash
# Runs one node of an engine that spans several machines, by vLLM's own multiprocessing back end (no Ray).
#
#   node.sh RANK NODES HEAD MODEL --tensor-parallel-size GPUS [vLLM options]
#
#   node.sh 0 2 10.0.0.1 llava-hf/llava-next-72b-hf --tensor-parallel-size 16    # on 10.0.0.1
#   node.sh 1 2 10.0.0.1 llava-hf/llava-next-72b-hf --tensor-parallel-size 16    # on the second machine
#
# RANK is 0 on the head, whose address is HEAD, and 1, 2, ... on the others. GPUS is the number of all GPUs together.
# Start all nodes with the same model, options and versions, in any order. The head serves HTTP to its own machine:
#
#   visiondrop gateway --engine http://127.0.0.1:8100
#
# If one node dies, the engine dies: stop the others, and start all again.
#
#   ENGINE_PORT=8100           HTTP, on the head
#   MASTER_PORT=29501          the nodes' meeting point, on the head; the nodes also open ports of their own choice
#   VLLM_HOST_IP, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
#                              this node's address and network interface, where it has several
#   PYTHON=/path/to/python     of an environment with VisionDrop
#
# The traffic between the nodes is neither encrypted nor authenticated: use a network of their own.
set -euo pipefail
# shellcheck source=say.sh
source "$(dirname "${BASH_SOURCE[0]}")/say.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage "${BASH_SOURCE[0]}"; exit; }
(($# >= 4)) ||
  fail "usage: node.sh RANK NODES HEAD MODEL --tensor-parallel-size GPUS [vLLM options] (node.sh --help tells more)"
rank=$1 nodes=$2 head=$3 model=$4
shift 4
is_number "$nodes" 2 || fail "NODES is the number of machines, 2 or more; got '$nodes'"
is_number "$rank" 0 && ((rank < nodes)) || fail "RANK is a number from 0 to $((nodes - 1)); got '$rank'"

gpus=
previous=
for option in "$@"; do
  case $previous in --tensor-parallel-size | -tp) gpus=$option ;; esac
  case $option in
    --tensor-parallel-size=* | -tp=*) gpus=${option#*=} ;;
    --pipeline-parallel-size* | -pp*)
      fail "engine option ${option%%=*}: VisionDrop does not support pipeline parallelism" ;;
    --host | --host=* | --port | --port=* | --uds | --uds=*) fail "engine option ${option%%=*}: set ENGINE_PORT" ;;
  esac
  previous=$option
done
[[ -n $gpus ]] || fail "name the number of all GPUs together: --tensor-parallel-size GPUS"
is_number "$gpus" 2 && ((gpus % nodes == 0)) ||
  fail "--tensor-parallel-size is a multiple of the number of nodes, $nodes; got '$gpus'"

python=$(find_python)
check_python "$python"
place=(--nnodes "$nodes" --node-rank "$rank" --master-addr "$head" --master-port "${MASTER_PORT:-29501}")
if ((rank == 0)); then
  place+=(--host 127.0.0.1 --port "${ENGINE_PORT:-8100}")
else
  place+=(--headless)
fi
exec "$python" -m vd_plugin.engine "$model" "${place[@]}" --distributed-executor-backend mp "$@"

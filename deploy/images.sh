#!/usr/bin/env bash
# Builds the images, and prints how large they are and how long it took.
#
#   deploy/images.sh                              gateway and engine (for NVIDIA GPUs)
#   deploy/images.sh gateway engine-cpu           these targets of the Dockerfile
#   BUILDER=podman deploy/images.sh               docker, podman or buildah; otherwise the first one that works
#   VISIONDROP_BUILD_OPTIONS="--pull" ...         more options for the builder
#
# Images are called visiondrop-TARGET:VERSION, with the version of pyproject.toml; TAG=... sets another tag.
# pip's settings on this machine (an index of your own, certificates, folders of wheels) are lent to the build and stay in
# no image. Folders and files among them can be lent by podman and buildah only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'visiondrop images: %s\n' "$*" >&2
  exit 1
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' deploy/images.sh
  exit
fi
targets=("$@")
((${#targets[@]})) || targets=(gateway engine)
for target in "${targets[@]}"; do
  [[ $target =~ ^(gateway|engine|engine-cpu)$ ]] || fail "'$target' is no image; choose gateway, engine or engine-cpu."
done

works() { command -v "$1" >/dev/null && "$1" info >/dev/null 2>&1; }
builder=${BUILDER:-}
if [[ -z $builder ]]; then
  for builder in docker podman buildah none; do works "$builder" && break; done
  [[ $builder != none ]] ||
    fail "no builder works here. Install Docker (and start its daemon), or podman, or buildah; 'docker info' tells why."
fi
[[ $builder =~ ^(docker|podman|buildah)$ ]] || fail "BUILDER is '$builder'; choose docker, podman or buildah."
works "$builder" || fail "'$builder info' fails; install $builder, or start its daemon, or choose another with BUILDER=."

version=$(grep -m 1 '^version = ' pyproject.toml | cut -d '"' -f 2)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[[ -z $(git status --porcelain 2>/dev/null) ]] || revision+=-modified
tag=${TAG:-$version}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=()
read -r -a more_options <<<"${VISIONDROP_BUILD_OPTIONS:-}"

# lend_pip_settings: write pip's settings as one pip.conf, and mount the files and folders that it names.
lend_pip_settings() {
  local name value path
  local -A settings=()
  while IFS='=' read -r name value; do
    name=${name##*.} value=${value#\'} value=${value%\'}
    case $name in
      index-url | extra-index-url | find-links | trusted-host | cert | constraint) ;;
      *) continue ;;
    esac
    settings[$name]=$value # later ones win, as in pip: files, then the environment
  done < <(python3 -m pip config list 2>/dev/null || true)
  echo '[global]' >"$work/pip.conf"
  for name in "${!settings[@]}"; do
    local kept=()
    for value in ${settings[$name]}; do
      path=${value#file://}
      if [[ $path == /* ]]; then
        [[ $builder != docker && -e $path ]] || continue
        # A folder of an index links to its neighbours.
        [[ $value != file://*/simple ]] || path=${path%/simple}
        options+=(--volume "$path:$path:ro")
      fi
      kept+=("$value")
    done
    ((${#kept[@]} == 0)) || echo "$name = ${kept[*]}" >>"$work/pip.conf"
  done
  options+=(--secret "id=pip-conf,src=$work/pip.conf")
}

build() {
  local command=(build)
  if [[ $builder == docker ]]; then
    command=(buildx build --load)
  else
    command+=(--format docker) # health checks are not part of the OCI format
  fi
  "$builder" "${command[@]}" "${options[@]}" "${more_options[@]}" --file Dockerfile --target "$1" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --tag "visiondrop-$1:$tag" .
}

size_mb() {
  local bytes
  if [[ $builder == buildah ]]; then
    bytes=$(buildah images --json "visiondrop-$1:$tag" | grep -m 1 '"size"' | cut -d '"' -f 4)
    printf '%s' "$bytes"
  else
    bytes=$("$builder" image inspect --format '{{.Size}}' "visiondrop-$1:$tag")
    printf '%s MB' "$((bytes / 1000 / 1000))"
  fi
}

lend_pip_settings
report=()
for target in "${targets[@]}"; do
  began=$SECONDS
  build "$target"
  report+=("$(printf '%-32s %10s %6s s' "visiondrop-$target:$tag" "$(size_mb "$target")" "$((SECONDS - began))")")
done
printf '\n%-32s %10s %8s\n' image size built
printf '%s\n' "${report[@]}"

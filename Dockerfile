# The images of VisionDrop; `make images` builds them, deploy/README.md tells how to run them.
#
#   gateway      the HTTP server: neither torch nor vLLM
#   engine       vLLM's own image with the plugin, for NVIDIA GPUs
#   engine-cpu   vLLM for CPUs with the plugin and the demo model, for a trial without a GPU or a network
#
# Every image runs as user 10001 or any other, with a read-only root file system and without capabilities. What an
# engine writes goes to /cache and /tmp, what the gateway writes to /tmp. The processes of an engine share memory, more
# than a container has by default: run it with --shm-size 1g or more. pip's settings of the building machine come in as
# the secret `pip-conf` and stay in no layer.

ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.32.0


# The pip that makes the environments below, so that they need none.
FROM ${PYTHON_IMAGE} AS pip
RUN python3 -m venv /opt/pip


# This project, as a wheel and as the files that it becomes in an environment. The images take it last, so that a change
# of its code costs a small layer.
FROM pip AS project
RUN python3 -m venv --without-pip /opt/visiondrop
WORKDIR /src
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY server server
COPY vd_plugin vd_plugin
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    /opt/pip/bin/pip wheel --no-deps --wheel-dir /wheels .
RUN /opt/pip/bin/pip --python /opt/visiondrop/bin/python3 install --no-deps --no-index --root /staging /wheels/*.whl


# The same without the weights of the demo model, which only an engine loads.
FROM project AS gateway-project
RUN find /staging -name model.safetensors -delete


FROM pip AS gateway-environment
RUN python3 -m venv --without-pip /opt/visiondrop
COPY requirements/gateway.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/visiondrop/bin/python3 install --no-deps --only-binary :all: \
        --requirement /tmp/gateway.txt


FROM ${PYTHON_IMAGE} AS gateway
COPY --from=gateway-environment /opt/visiondrop /opt/visiondrop
COPY --from=gateway-project /staging /
COPY deploy/image/healthcheck.py /opt/visiondrop/
ENV PATH=/opt/visiondrop/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VISIONDROP_METRICS_HOST=0.0.0.0 \
    VISIONDROP_METRICS_PORT=9100 \
    VISIONDROP_ENGINES=http://engine:8000
USER 10001:10001
EXPOSE 8000 9100
# Until the first engine has loaded its model there is nothing to be ready for: failures count after that only.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "/opt/visiondrop/healthcheck.py", "http://127.0.0.1:9100/ready"]
ENTRYPOINT ["visiondrop"]
CMD ["gateway", "--host", "0.0.0.0", "--port", "8000"]
# Last, here and below: they differ from build to build.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="VisionDrop gateway" \
      org.opencontainers.image.description="OpenAI-compatible gateway with a visual token budget for every request" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


# What both engines have in common is written twice: a stage has one base.
FROM ${VLLM_IMAGE} AS engine
# Everything that the plugin needs is there already, at the versions that vLLM's own tests ran with.
COPY --from=project /wheels /opt/visiondrop/wheels
RUN uv pip install --python "$(command -v python3)" --break-system-packages --no-cache --offline --no-deps \
        /opt/visiondrop/wheels/*.whl \
    && install -d -m 1777 /cache
COPY deploy/image/healthcheck.py /opt/visiondrop/
ENV HOME=/cache \
    USER=visiondrop \
    LOGNAME=visiondrop \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache/xdg \
    XDG_CONFIG_HOME=/cache/config \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/cache/config/vllm \
    VLLM_NO_USAGE_STATS=1 \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    FLASHINFER_WORKSPACE_BASE=/cache \
    CUDA_CACHE_PATH=/cache/cuda \
    NUMBA_CACHE_DIR=/cache/numba \
    MPLCONFIGDIR=/cache/matplotlib
WORKDIR /cache
VOLUME /cache
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "/opt/visiondrop/healthcheck.py", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["python3", "-m", "vd_plugin.engine"]
# --trust-request-mm-kwargs lets requests set their budgets: only the gateway may reach this port.
CMD ["llava-hf/llava-v1.6-vicuna-7b-hf", "--host", "0.0.0.0", "--port", "8000", "--trust-request-mm-kwargs", \
     "--shutdown-timeout", "60"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="VisionDrop engine" \
      org.opencontainers.image.description="vLLM with the VisionDrop plugin, for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM pip AS engine-cpu-environment
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python3 -m venv /opt/visiondrop
COPY requirements/engine-cpu.txt deploy/steps.sh /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    source /tmp/steps.sh; install_torch_cpu /opt/visiondrop/bin/python3 "$(grep '^torch==' /tmp/engine-cpu.txt)"
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    /opt/visiondrop/bin/pip install --no-deps --only-binary :all: --requirement /tmp/engine-cpu.txt
RUN /opt/pip/bin/pip --python /opt/visiondrop/bin/python3 uninstall --yes pip


FROM ${PYTHON_IMAGE} AS engine-cpu
# vLLM's kernels for CPUs need libnuma. Its version is Debian's: point releases remove the older ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -m 1777 /cache
COPY --from=engine-cpu-environment /opt/visiondrop /opt/visiondrop
COPY --from=project /staging /
COPY deploy/image/healthcheck.py /opt/visiondrop/
# At a path that has no version of Python in it.
RUN ln -s "$(/opt/visiondrop/bin/python3 -c 'import vd_plugin.demo as demo; print(demo.find_model())')" \
        /opt/visiondrop/demo-model
# VLLM_CPU_KVCACHE_SPACE is in GiB; without it the engine would take a share of the machine's memory, not the container's.
ENV PATH=/opt/visiondrop/bin:$PATH \
    HOME=/cache \
    USER=visiondrop \
    LOGNAME=visiondrop \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/cache/xdg \
    XDG_CONFIG_HOME=/cache/config \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/cache/config/vllm \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_CPU_OMP_THREADS_BIND=nobind \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    NUMBA_CACHE_DIR=/cache/numba \
    MPLCONFIGDIR=/cache/matplotlib
WORKDIR /cache
VOLUME /cache
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "/opt/visiondrop/healthcheck.py", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["python3", "-m", "vd_plugin.engine"]
CMD ["/opt/visiondrop/demo-model", "--host", "0.0.0.0", "--port", "8000", "--trust-request-mm-kwargs", \
     "--shutdown-timeout", "60", "--max-model-len", "6144", "--max-num-seqs", "8", \
     "--served-model-name", "visiondrop-demo"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="VisionDrop engine for CPUs" \
      org.opencontainers.image.description="vLLM for CPUs with the VisionDrop plugin and the demo model, for a trial" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

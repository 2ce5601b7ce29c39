"""What FlashInfer needs on machines with an NVIDIA GPU: it compiles its kernels when they are first used.

For that it calls nvcc and ninja, and where one is missing the call raises. vLLM's sampler uses it wherever the GPU can
run it, at the latest in the warm-up of the start: the engine ended there (vLLM issue 49497).
REMOVE WHEN: vLLM's `flashinfer_sampler_supported` asks whether the sampler's kernels are there or can be compiled.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(f"vllm.{__name__}")

SWITCH = "VLLM_USE_FLASHINFER_SAMPLER"


def find_ninja() -> None:
    """Let `ninja` be found where the lock installs it, beside this Python. Before vLLM is imported: it asks then."""
    if shutil.which("ninja") is None:
        beside = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), beside))


def choose_sampler() -> None:
    """Use FlashInfer's sampler only where its kernels are installed compiled; otherwise vLLM's own. What the user has
    set wins. Idempotent; does nothing on a machine without an NVIDIA GPU.

    A compiler is not enough: one that does not fit FlashInfer's sources ends the engine, too.
    """
    from vllm.platforms import current_platform

    if SWITCH in os.environ or not current_platform.is_cuda():
        return
    if find_spec("flashinfer") is None or find_spec("flashinfer_jit_cache") is None:
        os.environ[SWITCH] = "0"
        logger.info("FlashInfer's compiled kernels are not installed (vllm download-kernels): sampling without them")

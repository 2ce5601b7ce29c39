"""Permission to use AMX, which Linux gives to a process only when it asks (arch/x86/kernel/fpu/xstate.c).

vLLM's CPU kernels use AMX tiles where the processor has them, and rely on oneDNN to have requested them. oneDNN does so
at its first product of two matrices; if the first request of all is a single token, its products are of a matrix and a
vector, and the worker dies of an illegal instruction. So they are requested when the engine's processes start.

REMOVE WHEN: `{"prompt": [1], "max_tokens": 1}` as the first request leaves a CPU engine alive without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Final

_SYS_ARCH_PRCTL: Final = 158  # asm/unistd_64.h
_ARCH_REQ_XCOMP_PERM: Final = 0x1023  # asm/prctl.h
_XFEATURE_XTILEDATA: Final = 18


def request_tiles() -> bool:
    """Ask for AMX tiles for this process and its threads, on a machine without a GPU; whether they may be used.

    Asking again does no harm.
    """
    is_cpu_engine = os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu"
    if not is_cpu_engine or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    status: int = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return status == 0

"""What vLLM would run with on a GPU that is not there: `python cuda_configurations.py MODEL < asked.json`.

A process of its own, since vLLM asks for its platform everywhere and remembers the answer. Its modules load for the
CPU; then the platform is exchanged for vLLM's own CUDA platform with the numbers of a GPU, and configurations are made.

Reads a list of {"gpu": name, "arguments": engine arguments}, and writes for each what `describe` returns, or
{"refused": sentence}.
"""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType
from typing import Any

GPUS: dict[str, tuple[tuple[int, int], int]] = {"H100": ((9, 0), 80), "A100": ((8, 0), 80), "L40": ((8, 9), 48)}
"""Name -> compute capability, GiB."""

FLASH_ATTENTION = (
    "compile_flash_attn_varlen_func_from_specs",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "reshape_and_cache_flash",
)
"""What vLLM's back end imports of the kernels."""


def main() -> None:
    model = sys.argv[1]
    import engines  # noqa: F401  # looks at model classes in this process
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    import vd_plugin

    EngineArgs(**vd_plugin.engine_args(model)).create_engine_config()
    gpu = exchange_platform()
    described: list[dict[str, Any]] = []
    for asked in json.load(sys.stdin):
        gpu.name = asked["gpu"]
        try:
            arguments = EngineArgs(**vd_plugin.engine_args(model, **asked["arguments"]))
            described.append(describe(arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)))
        except (ValueError, NotImplementedError) as error:
            described.append({"refused": str(error)})
    print(json.dumps(described))


def describe(config: Any) -> dict[str, Any]:
    """The settings that matter to pruning."""
    compilation, scheduler = config.compilation_config, config.scheduler_config
    return {
        "mode": compilation.mode.name,
        "graphs": compilation.cudagraph_mode.name,
        "largest_graph": compilation.max_cudagraph_capture_size,
        "asynchronous": scheduler.async_scheduling,
        "scheduler": str(scheduler.scheduler_cls),
        "batched_tokens": scheduler.max_num_batched_tokens,
        "num_seqs": scheduler.max_num_seqs,
        "block_size": config.cache_config.block_size,
        "attention": attention(config),
        "runner": "second" if config.use_v2_model_runner else "first",
        "worker": config.parallel_config.worker_cls,
    }


def attention(config: Any) -> str:
    """Name of the back end that the decoder's layers would get, FlashAttention's with its version."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(config):
        name = str(get_attn_backend(config.model_config.get_head_size(), config.model_config.dtype, "auto").get_name())
        return f"{name} {get_flash_attn_version()}" if name == "FLASH_ATTN" else name


def exchange_platform() -> Any:
    """Put a GPU in the place of the CPU, wherever vLLM holds its platform. Its `name` says which GPU."""
    # Kernels that a CPU build does not have. Nothing here calls them.
    sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")
    versions: Any = ModuleType("vllm.vllm_flash_attn.flash_attn_interface")
    versions.is_fa_version_supported = lambda version: version in (2, 3)
    versions.fa_version_unsupported_reason = lambda version: None
    sys.modules |= {"vllm.vllm_flash_attn": ModuleType("vllm.vllm_flash_attn"), versions.__name__: versions}
    from vllm import envs, platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends import fa_utils

    for name in FLASH_ATTENTION:
        setattr(fa_utils, name, None)

    class Gpu(cuda.CudaPlatformBase):
        name = "H100"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*GPUS[cls.name][0])

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"NVIDIA {cls.name}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return GPUS[cls.name][1] << 30

        @classmethod
        def device_count(cls) -> int:
            return 1

    from vd_plugin.cpu.bootstrap import ENVIRONMENT

    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    envs.disable_envs_cache()
    cpu, gpu = platforms.current_platform, Gpu()
    platforms._current_platform = gpu
    for module in list(sys.modules.values()):
        if vars(module).get("current_platform") is cpu:
            module.current_platform = gpu  # type: ignore[attr-defined]
    return Gpu


if __name__ == "__main__":
    main()

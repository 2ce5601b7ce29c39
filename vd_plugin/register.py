"""Entry point `vllm.general_plugins`: make the architectures known. vLLM calls it in every one of its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vd_plugin.cpu.amx import request_tiles
from vd_plugin.cpu.interpreter import patch_masked_store, patch_top_k_top_p
from vd_plugin.cpu.kernels import replace_kernels
from vd_plugin.flashinfer import choose_sampler
from vd_plugin.options import ARCHITECTURES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def register() -> None:
    """Register models by name, so that torch and the model code load only where a model is built. Idempotent."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class VisionDropConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            from vd_plugin.validation import check_engine, prepare_engine, prepare_staged_engine

            check_engine(vllm_config)
            prepare_engine(vllm_config)
            prepare_staged_engine(vllm_config)

    request_tiles()
    patch_masked_store()
    patch_top_k_top_p()
    replace_kernels()
    choose_sampler()
    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"vd_plugin.model:{architecture}")
        MODELS_CONFIG_MAP.setdefault(architecture, VisionDropConfig)

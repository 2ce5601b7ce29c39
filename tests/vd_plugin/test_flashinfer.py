"""FlashInfer compiles what is not installed compiled: the engine must not depend on it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from vllm import envs, platforms
from vllm.v1.sample.ops import topk_topp_sampler

from vd_plugin import engine, flashinfer, register
from vd_plugin.flashinfer import SWITCH, choose_sampler, find_ninja


class Platform:
    def __init__(self, is_cuda: bool) -> None:
        self.is_cuda = lambda: is_cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A machine with an NVIDIA GPU; the set is of the modules installed."""
    installed: set[str] = set()
    monkeypatch.setattr(platforms, "current_platform", Platform(is_cuda=True), raising=False)
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setenv(SWITCH, "")  # so that it is restored
    monkeypatch.delenv(SWITCH)
    return installed


@pytest.mark.parametrize("modules", [set(), {"flashinfer"}, {"flashinfer_jit_cache"}], ids=str)
def test_without_compiled_kernels_vllm_samples_itself(machine: set[str], modules: set[str]) -> None:
    machine |= modules
    choose_sampler()
    assert os.environ[SWITCH] == "0"


def test_compiled_kernels_are_used(machine: set[str]) -> None:
    machine |= {"flashinfer", "flashinfer_jit_cache"}
    choose_sampler()
    assert SWITCH not in os.environ


def test_what_the_user_has_set_wins(machine: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    choose_sampler()
    assert os.environ[SWITCH] == "1"


def test_other_machines_are_left_alone(machine: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "current_platform", Platform(is_cuda=False))
    choose_sampler()
    assert SWITCH not in os.environ


def test_every_process_of_vllm_chooses(machine: set[str]) -> None:
    register.register()
    assert os.environ[SWITCH] == "0"


def test_vllm_obeys(machine: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The question that its sampler asks, on a GPU that it finds capable."""
    envs.disable_envs_cache()  # which a running engine switches on
    monkeypatch.setattr(topk_topp_sampler, "current_platform", Platform(is_cuda=True))
    choose_sampler()
    assert topk_topp_sampler.flashinfer_sampler_supported() is False


def test_ninja_beside_this_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `visiondrop` runs with whatever PATH it is called with."""
    ninja = tmp_path / "ninja"
    ninja.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/no/such/folder")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("VLLM_PLUGINS", "visiondrop")
    with pytest.raises(SystemExit):
        engine.main(["/no/such/model"])
    assert os.environ["PATH"] == f"/no/such/folder:{tmp_path}"
    assert shutil.which("ninja") == str(ninja)
    find_ninja()
    assert os.environ["PATH"].count(str(tmp_path)) == 1

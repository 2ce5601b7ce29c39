"""The gateway runs where neither torch nor vLLM is installed. Of the plugin it knows arithmetic, literals, the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import server

ROOT = Path(server.__file__).parents[1]

BLOCKED = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder

class Wall(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("torch", "vllm", "transformers", "numpy", "openai", "opentelemetry"):
            raise ImportError(f"{name} is behind the wall")
        if name.startswith("vd_plugin.") and name.split(".")[1] not in ("schedule", "wire", "demo"):
            raise ImportError(f"{name} is behind the wall")

for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "torchvision", "vd_plugin")]:
    del sys.modules[name]  # a .pth file of the environment may have been quicker
sys.meta_path.insert(0, Wall())
{statements}
"""

EVERY_MODULE = """
import server
names = [module.name for module in pkgutil.walk_packages(server.__path__, "server.")]
for name in names:
    importlib.import_module(name)
print(*names)
from server.app import create_app
from server.engine.client import HttpEngineClient
from server.engine.pool import EnginePool
from server.settings import Settings
create_app(Settings(), EnginePool({"0": HttpEngineClient.at("http://127.0.0.1:1")}, Settings()))
"""


def run(statements: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.replace("{statements}", statements)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_gateway_imports_without_torch_vllm_and_the_plugin() -> None:
    result = run(EVERY_MODULE)
    assert result.returncode == 0, result.stderr
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "server").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files}
    assert {"server", *result.stdout.split()} == modules


def test_demo_is_imported_by_its_commands_alone() -> None:
    result = run("import server.app, server.api, server.launcher.serve; print('vd_plugin.demo' in sys.modules)")
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr
    result = run("import server.cli; print('vd_plugin.demo.scenes' in sys.modules)")
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def test_the_wall_of_this_test_holds() -> None:
    for module in ("torch", "vllm", "vd_plugin.selection"):
        result = run(f"import {module}")
        assert result.returncode != 0
        assert "behind the wall" in result.stderr


def test_guard_needs_the_standard_library_alone() -> None:
    guard = ROOT / "server" / "launcher" / "guard.py"
    command = [sys.executable, "-I", "-S", str(guard), "1", sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.wait(timeout=10) == 7

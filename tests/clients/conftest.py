"""Other people's clients, installed on demand.

Without Node.js or a network their tests are skipped; in CI they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _install(part: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(HERE / "install.sh"), part]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = f"the {part} clients cannot be installed: {result.stderr.strip() or result.stdout.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def client_python() -> Path:
    """The interpreter of the environment that LangChain and LiteLLM are in."""
    _install("python")
    return HERE.parents[1] / ".cache" / "clients-venv" / "bin" / "python"


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """Where `node` finds the JavaScript clients."""
    _install("javascript")
    return HERE / "js"

"""LangChain, LiteLLM and OpenAI's JavaScript client against a gateway process.

Each client's laws are written in its own language, for its own test runner, and run in its own environment; here they
are started, and their output is shown when one fails.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from client_engine import TOOL_ARGUMENTS
from fake_engine import GEOMETRY, MODEL, WORDS
from images import image
from served_gateway import serve

from vd_plugin.schedule import PRESETS, resolve

HERE = Path(__file__).parent
WIDTH, HEIGHT = 800, 600
API_KEY = "a-key-for-these-laws"


@pytest.fixture(scope="module")
def laws_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the laws need to know, as a file that every language can read."""
    plans = {name: resolve(GEOMETRY, HEIGHT, WIDTH, budget) for name, budget in PRESETS.items()}
    assert len({plan.kept for plan in plans.values()}) == len(PRESETS), "the picture would not tell budgets apart"
    with serve(api_key=API_KEY) as gateway:
        facts = {
            "api_key": API_KEY,
            "base_url": f"{gateway.url}/v1",
            "engine_socket": str(gateway.engine_socket),
            "model": MODEL,
            "answer": "".join(WORDS),
            "tool_arguments": TOOL_ARGUMENTS,
            "picture": image(WIDTH, HEIGHT),
            "plans": {
                name: {
                    "full": plan.full,
                    "kept": plan.kept,
                    "saved": plan.saved,
                    "placeholders": plan.num_placeholders,
                }
                for name, plan in plans.items()
            },
        }
        path = tmp_path_factory.mktemp("clients") / "laws.json"
        path.write_text(json.dumps(facts))
        yield path


@pytest.mark.parametrize("client", ["langchain", "litellm"])
def test_python_client(client: str, client_python: Path, laws_path: Path) -> None:
    folder = HERE / "python"
    runner = ["-m", "pytest", "-q", "--tb=short", "--capture=sys", "-p", "no:cacheprovider", "-p", "surroundings"]
    place = ["-c", os.devnull, "--rootdir", str(folder), str(folder / f"{client}_laws.py")]
    environment = {"PYTHONPATH": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
    _run([str(client_python), *runner, *place], laws_path, environment)


def test_javascript_client(node_folder: Path, laws_path: Path) -> None:
    command = ["node", "--test", "--test-timeout=20000", str(node_folder / "openai.test.mjs")]
    _run(command, laws_path, {})


def test_locks_name_no_package_host() -> None:
    assert "resolved" not in (HERE / "js" / "package-lock.json").read_text()
    assert "//" not in (HERE / "requirements.txt").read_text()


def _run(command: Sequence[str], laws_path: Path, more: dict[str, str]) -> None:
    # No proxies, keys or tracing of whoever runs the tests.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    result = subprocess.run(
        command,
        env={**environment, **more, "CLIENT_LAWS": str(laws_path)},
        cwd=laws_path.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"

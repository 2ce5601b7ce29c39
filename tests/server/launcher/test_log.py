"""What is read out of an engine's log, and how progress is shown."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.launcher.log import _CORE_LOST, activity, last_error, last_words
from server.launcher.progress import Progress


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


def test_activity_is_the_last_line_that_is_known(log: Path) -> None:
    assert activity(log) == "starting"
    log.write_text("INFO [core.py:1] Initializing a V1 LLM engine\n")
    assert activity(log) == "starting the engine's processes"
    with log.open("a") as file:
        file.write("\rLoading safetensors checkpoint shards:   0%|  |\rLoading safetensors checkpoint shards:  50%|# |")
        file.write("\nsomething else\n")
    assert activity(log) == "loading weights, 50%"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nothing\n", None),
        (
            (
                "(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:9] ValueError: heads do not divide\n"
                "  raise RuntimeError(\n"
                "RuntimeError: Engine core initialization failed. See root cause above.\n"
            ),
            "ValueError: heads do not divide",
        ),
        ("api_server.py: error: unrecognized arguments: --x\n", "error: unrecognized arguments: --x"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", "torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_last_error_is_the_root_cause(log: Path, text: str, error: str | None) -> None:
    log.write_text(text)
    assert last_error(log) == error


def test_last_words_are_the_engine_s_own_sentence(log: Path) -> None:
    log.write_text("INFO x\nvisiondrop: error: no such model\nINFO y\n")
    assert last_words(log) == "no such model"
    log.write_text("INFO visiondrop: error: quoted\n")
    assert last_words(log) is None


def test_long_logs_are_read_from_their_end(log: Path) -> None:
    log.write_text("ValueError: early\n" + "x\n" * 100_000 + "KeyError: 'late'\n")
    assert last_error(log) == "KeyError: 'late'"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_news_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        progress = Progress("starting", out)
        for detail in ("a", "a", "b"):
            progress.show(detail)
        progress.clear()
    assert terminal.getvalue().count("\r\x1b[K") == 4
    assert "\n" not in terminal.getvalue()
    assert file.getvalue() == "starting: 0 s, a\nstarting: 0 s, b\n"


@pytest.mark.parametrize("words", [line for line in _CORE_LOST if " " in line])
def test_words_are_vllms_own(words: str) -> None:
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    assert words in Path(vllm.origin).with_name("v1").joinpath("engine", "core_client.py").read_text()

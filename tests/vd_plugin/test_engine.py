"""What the engine's entry point does before vLLM is imported."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vd_plugin.engine import _remove_stale_socket


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vd-") as folder:  # pytest's folders are too deep for a socket
        yield Path(folder) / "engine.sock"


def test_socket_of_an_engine_that_is_gone_is_removed(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    _remove_stale_socket(str(path))
    assert not path.exists()


def test_socket_of_a_running_engine_stays(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as running:
        running.bind(str(path))
        running.listen()
        _remove_stale_socket(str(path))
        assert path.is_socket()


def test_other_files_and_missing_ones_are_left_alone(path: Path) -> None:
    _remove_stale_socket(str(path))
    path.write_text("precious")
    _remove_stale_socket(str(path))
    assert path.read_text() == "precious"

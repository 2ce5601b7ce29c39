"""deploy/cluster: several engines by one script, each with its own GPUs, and nothing left of them; known options."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gateway_process import wait_for
from images import ask, image
from python_with_fake_engine import write
from served import free_port

from server import cli

CLUSTER = Path(__file__).parents[2] / "deploy" / "cluster"


class Script:
    """`engines.sh` with fake engines; `mode` is one of engine_process.py's."""

    def __init__(self, folder: Path, number: int, mode: str, *options: str, **environment: str) -> None:
        self.folder, self.port = folder, free_port()
        self._said = folder / "said"
        own = {"PYTHON": str(write(folder)), "PORT": str(self.port), "LOGS": str(folder / "logs")}
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [CLUSTER / "engines.sh", str(number), mode, *options],
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, **own, **environment},
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait_said(self, words: str, times: int = 1) -> None:
        def is_said() -> bool:
            assert self.process.poll() is None, self.said
            return self.said.count(words) >= times

        wait_for(is_said, seconds=60)

    def ask(self) -> None:
        answer = httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=ask(image()), timeout=30)
        assert answer.status_code == 200, answer.text

    def up(self) -> list[str]:
        """Whether each engine is up, in the gateway's eyes."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        return re.findall(r'^visiondrop_engine_up\{engine="\d"\} (\d)', text, re.MULTILINE)

    def engines(self) -> list[psutil.Process]:
        """The API servers, in order."""
        found = [item for item in psutil.Process(self.process.pid).children(recursive=True) if is_engine(item)]
        return sorted(found, key=socket_of)

    def family(self) -> list[psutil.Process]:
        return [item for item in psutil.Process(self.process.pid).children(recursive=True) if item.is_running()]


def is_engine(item: psutil.Process) -> bool:
    with suppress(psutil.Error):
        line = item.cmdline()
        return len(line) > 1 and line[1].endswith("engine_process.py")
    return False


def socket_of(item: psutil.Process) -> str:
    return item.cmdline()[item.cmdline().index("--uds") + 1]


def listens(item: psutil.Process) -> bool:
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.connect(socket_of(item))
        return True
    return False


Start = Callable[..., Script]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    scripts: list[Script] = []

    def start_script(*arguments: Any, **environment: str) -> Script:
        scripts.append(Script(tmp_path, *arguments, **environment))
        return scripts[-1]

    yield start_script
    for script in scripts:
        if script.process.poll() is None:
            family = script.family()
            script.process.kill()
            script.process.wait()
            for item in family:
                with suppress(psutil.NoSuchProcess):
                    item.kill()


def assert_all_gone(family: list[psutil.Process], seconds: float = 15) -> None:
    assert len(family) >= 4
    assert not psutil.wait_procs(family, timeout=seconds)[1]


def test_each_engine_has_its_own_gpus_and_all_of_them_serve(start: Start) -> None:
    script = start(2, "serve", "--max-model-len", "4096", CUDA_VISIBLE_DEVICES="4,5,6,7", GPUS_PER_ENGINE="2")
    script.wait_said("serving fake-llava at")
    engines = script.engines()
    assert [item.environ()["CUDA_VISIBLE_DEVICES"] for item in engines] == ["4,5", "6,7"]
    for item in engines:
        assert " ".join(item.cmdline()[-4:]) == "--tensor-parallel-size 2 --max-model-len 4096"
    script.ask()
    assert script.up() == ["1", "1"]
    family = script.family()
    folder = Path(socket_of(engines[0])).parent
    assert folder.is_dir()
    script.process.send_signal(signal.SIGTERM)
    assert script.process.wait(timeout=30) == 0
    assert_all_gone(family)
    assert not folder.exists()
    assert script.said.count("Traceback") == 0


def test_engine_that_dies_or_is_stopped_is_started_again_and_the_gateway_goes_on(start: Start) -> None:
    script = start(2, "serve")
    script.wait_said("serving fake-llava at")
    first, second = script.engines()
    orphan = first.children()
    first.kill()
    script.wait_said("engine 0 ended with status 137 and is started again")
    script.ask()
    wait_for(lambda: len(script.engines()) == 2 and listens(script.engines()[0]), seconds=30)
    wait_for(lambda: script.up() == ["1", "1"], seconds=30)
    assert not psutil.wait_procs(orphan, timeout=5)[1], "what vLLM's API server leaves behind when it is killed"
    guard = re.search(r"engine 1 is process (\d+)", script.said)
    assert guard
    os.kill(int(guard.group(1)), signal.SIGTERM)
    script.wait_said("engine 1 ended with status", 1)
    wait_for(lambda: len(script.engines()) == 2 and second not in script.engines(), seconds=30)
    script.ask()
    family = script.family()
    script.process.send_signal(signal.SIGINT)
    assert script.process.wait(timeout=30) == 0
    assert_all_gone(family)


def test_script_that_is_killed_leaves_nothing_behind(start: Start) -> None:
    script = start(2, "serve", DRAIN_SECONDS="1")
    script.wait_said("serving fake-llava at")
    family = script.family()
    folder = Path(socket_of(script.engines()[0])).parent
    assert folder.is_dir()
    script.process.kill()
    script.process.wait()
    assert_all_gone(family)
    assert not folder.exists()


def test_engine_that_cannot_load_ends_the_script_with_its_sentence(start: Start) -> None:
    script = start(2, "sentence")
    assert script.process.wait(timeout=30) == 2
    assert "visiondrop: error: there is no model 'nowhere'" in script.said
    assert re.search(r"^visiondrop: error: engine [01] ended with status 2 while it loaded", script.said, re.MULTILINE)
    assert "serving" not in script.said


def test_stop_while_the_engines_load_is_a_clean_stop(start: Start) -> None:
    script = start(2, "loading")
    script.wait_said("waiting for 2 engines")
    wait_for(lambda: len(script.engines()) == 2, seconds=30)
    family = script.family()
    began = time.monotonic()
    script.process.send_signal(signal.SIGTERM)
    assert script.process.wait(timeout=30) == 0
    assert time.monotonic() - began < 20
    assert_all_gone(family)


def parse(*arguments: str) -> Any:
    """As vLLM's own server would."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False)).parse_args([*arguments])


@pytest.mark.slow
def test_vllm_knows_every_option_of_the_readme() -> None:
    text = (CLUSTER / "README.md").read_text().replace("\\\n", "")
    serve = re.findall(r"^\$ visiondrop serve MODEL -- (.+)$", text, re.MULTILINE)
    engine = re.findall(r"^\$ python -m vd_plugin.engine MODEL (.+)$", text, re.MULTILINE)
    assert (len(serve), len(engine)) == (2, 1)
    for options in (*serve, *engine):
        parse("--model", "model", *options.split())
    gateways = re.findall(r"visiondrop (gateway .+)$", text, re.MULTILINE)
    assert len(gateways) == 3
    for command in gateways:
        cli._make_parser(with_demo=False).parse_args(command.split())


@pytest.mark.slow
def test_vllm_knows_every_option_that_the_scripts_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(script: str, *arguments: str) -> Any:
        told = tmp_path / "arguments"
        environment = {**os.environ, "PYTHON": str(write(tmp_path)), "VISIONDROP_TEST_ARGUMENTS": str(told)}
        subprocess.run([CLUSTER / script, *arguments], env=environment, check=True, timeout=60)
        model, *options = told.read_text().splitlines()
        assert model == "model"
        return parse("--model", model, *options)

    head = parsed("node.sh", "0", "2", "10.0.0.1", "model", "--tensor-parallel-size", "4")
    worker = parsed("node.sh", "1", "2", "10.0.0.1", "model", "-tp=4")
    for rank, node in enumerate((head, worker)):
        assert (node.nnodes, node.node_rank, node.tensor_parallel_size) == (2, rank, 4)
        assert (node.master_addr, node.master_port, node.headless) == ("10.0.0.1", 29501, rank == 1)
        assert node.distributed_executor_backend == "mp"
    assert (head.host, head.port) == ("127.0.0.1", 8100)

    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\n")
    ray.chmod(0o755)
    (tmp_path / "ray.py").write_text("init = lambda **_: None\ncluster_resources = lambda: {'GPU': 16.0}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = parsed("ray_head.sh", "model", "--tensor-parallel-size", "16")
    assert (found.distributed_executor_backend, found.tensor_parallel_size) == ("ray", 16)

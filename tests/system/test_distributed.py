"""One engine in several processes, by vLLM's own means: data parallel ranks, and a second node. On a CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from engine_server import EXACT, EngineServer
from served import free_port, process, wait_until_ready
from steady_load import Outcome, SteadyLoad, streams

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NODE = Path(__file__).parents[2] / "deploy" / "cluster" / "node.sh"
STREAMS = streams(6)


def ask_all(engine_url: str, folder: Path, *, at_once: bool) -> list[Outcome]:
    """Answers to STREAMS through a gateway, complete each."""
    port, log = free_port(), folder / "gateway.log"
    command = ("-m", "server.cli", "gateway", "--port", str(port), "--engine", engine_url)
    with process(*command, log=log, VISIONDROP_ENGINE_STALL_SECONDS="120") as child:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/ready", child, log)
        load = SteadyLoad(url)
        with ThreadPoolExecutor(len(STREAMS) if at_once else 1) as pool:
            outcomes = list(pool.map(load.ask, STREAMS))
        load.close()
    assert not [outcome for outcome in outcomes if outcome.failure]
    return outcomes


@pytest.fixture(scope="module")
def alone(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Outcome]]:
    """The answers of one engine in one process, one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    engine = EngineServer(random_model, folder / "engine")
    try:
        engine.start()
        engine.wait_ready()
        outcomes = ask_all(engine.url, folder, at_once=False)
        assert not [(one, two) for one in outcomes for two in outcomes if one is not two and one.is_as(two)]
        yield outcomes
    finally:
        engine.close()


def test_two_data_parallel_ranks_answer_as_one_engine_and_both_work(
    random_model: Path, alone: list[Outcome], tmp_path: Path
) -> None:
    engine = EngineServer(random_model, tmp_path / "engine", "--data-parallel-size", "2")
    try:
        engine.start()
        engine.wait_ready()
        for ours, theirs in zip(ask_all(engine.url, tmp_path, at_once=True), alone, strict=True):
            assert ours.is_as(theirs), (ours, theirs)
        text = httpx.get(f"{engine.url}/metrics").text
        pattern = r'^vllm:request_success_total\{engine="(\d)",finished_reason="length"[^}]*\} (\S+)$'
        answered = {rank: float(number) for rank, number in re.findall(pattern, text, re.MULTILINE)}
        assert set(answered) == {"0", "1"}
        assert min(answered.values()) >= 2
        assert engine.stop() == 0
    finally:
        engine.close()


def test_engine_over_two_nodes_answers_as_one_engine(random_model: Path, alone: list[Outcome], tmp_path: Path) -> None:
    """`node.sh` twice on this machine, which stands for two: no GPU, and no network between them."""
    port, log = free_port(), tmp_path / "head.log"
    options = ("--tensor-parallel-size", "2", *EXACT, "--enforce-eager", "--skip-mm-profiling")
    limits = ("--max-model-len", "6144", "--max-num-seqs", "8", "--shutdown-timeout", "20")
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"ENGINE_PORT": str(port), "MASTER_PORT": str(free_port()), "VLLM_LOGGING_LEVEL": "INFO"}
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, path in enumerate((log, tmp_path / "worker.log")):
            command = [NODE, str(rank), "2", "127.0.0.1", str(random_model), *options, *limits]
            with path.open("wb") as output:
                nodes.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                    )
                )
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/health", nodes[0], log)
        for ours, theirs in zip(ask_all(url, tmp_path, at_once=False), alone, strict=True):
            assert ours.is_as(theirs), (ours, theirs)
        assert nodes[1].poll() is None
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()

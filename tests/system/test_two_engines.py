"""Two real engines behind one gateway, under load: one is killed, and both are restarted in turn."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from engine_server import EngineServer
from served import START_SECONDS, free_port, process, wait_until_ready
from steady_load import Outcome, Question, SteadyLoad, long_answers, short_questions, streams

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STREAMS = streams(30)
LONG = long_answers(30)
SHORT = short_questions()


class Cluster:
    """The gateway's view of two engines; the place of an engine is its name."""

    def __init__(self, url: str, engines: list[EngineServer]) -> None:
        self.url, self.engines = url, engines
        self.load = SteadyLoad(url)
        self.alone = {question: self.load.ask(question) for question in (*STREAMS, *LONG, *SHORT)}

    def metric(self, name: str, place: int) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf'^visiondrop_{name}\{{engine="{place}"\}} (\S+)$', text, re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def wait_up(self, place: int, is_up: bool = True, seconds: float = START_SECONDS) -> None:
        wait_for(lambda: self.metric("engine_up", place) == is_up, seconds)

    def assert_is_as_alone(self, outcome: Outcome) -> None:
        alone = self.alone[outcome.question]
        assert outcome.is_as(alone), (outcome, alone)


@pytest.fixture(scope="module")
def cluster(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder, port = tmp_path_factory.mktemp("two_engines"), free_port()
    engines = [EngineServer(random_model, folder / str(place)) for place in range(2)]
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready()
        urls = [option for engine in engines for option in ("--engine", engine.url)]
        # Little room, so that an engine that knows an image is not preferred by much; and slow steps are no stall here.
        settings = {"VISIONDROP_MAX_INFLIGHT_TOKENS": "16384", "VISIONDROP_ENGINE_STALL_SECONDS": "120"}
        command = ("-m", "server.cli", "gateway", "--port", str(port), *urls)
        with process(*command, log=folder / "gateway.log", **settings) as child:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(f"{url}/ready", child, folder / "gateway.log")
            made = Cluster(url, engines)
            made.wait_up(0)
            made.wait_up(1)
            yield made
            made.load.close()
    finally:
        for engine in engines:
            engine.close()


def is_amid(load: SteadyLoad, engine: EngineServer) -> bool:
    """Whether the engine is amid a stream, and at work on a whole answer."""
    own = set(engine.request_ids())
    running = [outcome for outcome in [*load.in_progress.values()] if outcome.request_id in own]
    in_mid_stream = any(2 <= len(outcome.logprobs) < 18 for outcome in running)
    return in_mid_stream and any(outcome.question in LONG for outcome in running)


def wait_for(is_so: Callable[[], bool], seconds: float, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(pause)


def test_answers_alone_are_complete_and_tell_the_questions_apart(cluster: Cluster) -> None:
    assert not [outcome for outcome in cluster.alone.values() if outcome.failure]
    told = [outcome for outcome in cluster.alone.values() if outcome.logprobs]
    assert len(told) == 12, "with images"
    assert not [(one, two) for one in told for two in told if one is not two and one.is_as(two)]
    assert not [outcome for outcome in cluster.alone.values() if not outcome.logprobs and not outcome.text]


def test_killed_engine_loses_its_own_streams_and_nothing_else(cluster: Cluster) -> None:
    victim, survivor = cluster.engines
    taken_before, ids_before = survivor.num_taken(), len(survivor.request_ids())
    assert survivor.num_answered() == taken_before
    cluster.load.outcomes.clear()
    clients: list[list[Question]] = [STREAMS[place:] + STREAMS[:place] for place in range(len(STREAMS))]
    clients.append([question for question in SHORT if question.path != "/v1/responses"])  # its ids are vLLM's own
    clients += [LONG, LONG[::-1]]
    with cluster.load.running(*clients):
        wait_for(lambda: len(cluster.load.outcomes) >= 5, 60)
        wait_for(lambda: is_amid(cluster.load, victim), 60, pause=0.02)
        victim.kill()
        killed_at = time.monotonic()
        cluster.wait_up(0, False, seconds=10)
        on_victim = set(victim.request_ids())
        victim.start()
        wait_for(lambda: sum(outcome.began_at > killed_at for outcome in cluster.load.outcomes) >= 5, 120)

    lost = [outcome for outcome in cluster.load.outcomes if outcome.failure]
    on_victim |= set(victim.request_ids())  # it may be up again by now
    on_survivor = set(survivor.request_ids()[ids_before:])
    for outcome in cluster.load.outcomes:
        if outcome not in lost:
            cluster.assert_is_as_alone(outcome)
    assert not on_victim & on_survivor, "none was sent twice"
    for outcome in cluster.load.outcomes:
        assert (
            outcome.request_id not in on_survivor if outcome in lost else outcome.request_id in on_survivor | on_victim
        )
    assert [outcome for outcome in lost if "event: " in str(outcome.failure) and outcome.logprobs], lost
    assert [outcome for outcome in lost if "status 502: " in str(outcome.failure) and outcome.question in LONG], lost
    for outcome in lost:
        assert outcome.began_at < killed_at, outcome
        assert "engine" in str(outcome.failure), outcome
    survivor.wait_idle()
    assert survivor.num_answered() == survivor.num_taken(), "by vLLM's own count and by its log"
    assert survivor.num_taken() - taken_before == len(on_survivor)

    cluster.wait_up(0)
    outcomes = [cluster.load.ask(question) for question in SHORT]
    assert not [outcome for outcome in outcomes if outcome.failure]
    assert victim.request_ids(), "it gets work again"


def test_engines_are_restarted_in_turn_without_one_failed_request(cluster: Cluster) -> None:
    cluster.load.outcomes.clear()
    statuses = []
    with cluster.load.running(STREAMS, SHORT, pause_seconds=0.3):
        for place, engine in enumerate(cluster.engines):
            wait_for(lambda place=place: cluster.metric("engine_inflight_tokens", place) > 0, 60)
            statuses.append(engine.stop())
            engine.start()
            cluster.wait_up(place, False, seconds=10)
            cluster.wait_up(place)
            wait_for(lambda engine=engine: len(engine.request_ids()) > 0, 60)
    assert not [outcome for outcome in cluster.load.outcomes if outcome.failure]
    for outcome in cluster.load.outcomes:
        cluster.assert_is_as_alone(outcome)
    assert statuses == [0, 0]
    assert {outcome.question for outcome in cluster.load.outcomes} == {*STREAMS, *SHORT}

"""Random mixes on the real engine: whatever else it serves, a request's answer is the one that it gets alone.

A seed gives a scenario: requests that share beginnings, images and conversations, when they come and go, how large a
step and the KV cache are, and which caches are reset meanwhile. Each answer is compared with that of a cold engine, and
after every step the blocks of every group are counted. Block sizes are multiples of 32, as a CPU needs them.

The same seeds run first everywhere, as many as the time allows:

    VISIONDROP_MIX_SECONDS   for each engine; 10 unless said
    VISIONDROP_MIX_SEED      this scenario alone, which a failure has named
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import engines
import pytest
import sabotage
from engines import Answer, Engine
from mixes import CONFIGURATIONS, NUM_TOKENS, Arrival, Configuration, Maker, Prompt, Scenario
from sabotage import Sabotage
from staged import LAYERS, SAME, Stepper, checkpoint, difference, dirty, step_size, wipe

from vd_plugin.spans import read_spans

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SECONDS = float(os.environ.get("VISIONDROP_MIX_SECONDS", "10"))
SEED = os.environ.get("VISIONDROP_MIX_SEED")

MIN_ANSWERS = 15
"""To be compared with each engine, however slow the machine."""
MAX_STEPS = 1500


@dataclass
class Tally:
    scenarios: int = 0
    answers: int = 0
    preemptions: int = 0
    hits: int = 0
    steps: int = 0

    @property
    def is_enough(self) -> bool:
        return self.answers >= MIN_ANSWERS and self.preemptions > 0 and self.hits > 0


class Play(Stepper):
    """One scenario on the engine."""

    def __init__(self, engine: Engine, scenario: Scenario, tally: Tally) -> None:
        super().__init__(engine)
        self.scenario = scenario
        self.tally = tally
        self.lent: list[Any] = []
        self.runner = self.llm_engine.model_executor.driver_worker.worker.model_runner
        self.gone: set[str] = set()

    def run_all(self) -> None:
        waiting = list(self.scenario.arrivals)
        resets = list(self.scenario.resets)
        added: dict[str, int] = {}
        self._lend()
        with self._watched(), step_size(self.engine, self.scenario.num_tokens):
            for now in range(MAX_STEPS):
                is_idle = not self.llm_engine.has_unfinished_requests()
                draining = False
                for reset in [reset for reset in resets if reset[0] <= now]:
                    if reset[1] in ("images", "encoder") and not is_idle:
                        draining = True  # vLLM has these two reset while nothing runs
                        continue
                    self._reset(reset[1])
                    resets.remove(reset)
                for arrival in [] if draining else list(waiting):
                    if arrival.step <= now and (arrival.after is None or self.is_done(arrival.after)):
                        waiting.remove(arrival)
                        self._arrive(arrival, len(added))
                        added[arrival.name] = now
                self._abort_whose_time_has_come(added, now)
                self.step()
                self.assert_blocks_are_counted()
                if not waiting and not self.llm_engine.has_unfinished_requests():
                    break
            else:
                raise AssertionError(f"not done after {MAX_STEPS} steps")
        self.tally.steps += now + 1
        self.assert_nothing_is_held()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Count preemptions, and see to it that a step writes every block that it offers to the prefix cache."""
        scheduler = self.scheduler

        def preempt(*args: Any, **kwargs: Any) -> None:
            self.tally.preemptions += 1
            type(scheduler)._preempt_request(scheduler, *args, **kwargs)

        def schedule(*args: Any, **kwargs: Any) -> Any:
            before = self._offered()
            output = type(scheduler).schedule(scheduler, *args, **kwargs)
            written = {
                block.block_id
                for manager in self.managers
                for req_id in output.num_scheduled_tokens
                for block in manager.req_to_blocks[req_id]
            }
            unwritten = {block_id for block_id, _ in self._offered() - before} - written
            assert not unwritten, f"blocks in the prefix cache that nobody writes: {unwritten}"
            return output

        scheduler._preempt_request, scheduler.schedule = preempt, schedule
        try:
            yield
        finally:
            del scheduler._preempt_request, scheduler.schedule

    def _offered(self) -> set[tuple[int, Any]]:
        return {(block.block_id, block.block_hash) for block in self.pool.blocks if block.block_hash is not None}

    def _abort_whose_time_has_come(self, added: dict[str, int], now: int) -> None:
        for arrival in self.scenario.arrivals:
            if arrival.aborted_after is None or arrival.name not in added or self.is_done(arrival.name):
                continue
            if added[arrival.name] + arrival.aborted_after == now:
                self.abort(arrival.name)
                self.gone.add(arrival.name)

    def is_done(self, name: str) -> bool:
        return bool(self.outputs.get(name)) and super().is_done(name)

    def answers_of(self, name: str) -> list[Answer]:
        return engines.answers_of(self.outputs[name][-1])

    def _arrive(self, arrival: Arrival, number: int) -> None:
        asked = arrival.prompt.request()
        if arrival.salt:
            asked["cache_salt"] = arrival.salt
        self.outputs[arrival.name] = []
        self.llm_engine.add_request(
            arrival.name, asked, arrival.params(), arrival_time=float(number), priority=arrival.priority
        )

    def _lend(self) -> None:
        """Make the KV cache smaller: somebody else holds the rest."""
        if self.scenario.num_blocks is not None and self.free_blocks > self.scenario.num_blocks:
            self.lent = self.pool.get_new_blocks(self.free_blocks - self.scenario.num_blocks)

    def take_back(self) -> None:
        self.pool.free_blocks(self.lent)
        self.lent = []

    def _reset(self, what: str) -> None:
        llm = self.engine.llm
        if what in ("prefix", "running"):
            count = len(self.lent)
            self.take_back()
            is_done = llm.reset_prefix_cache(reset_running_requests=what == "running")
            assert is_done or what == "prefix"  # which is refused while requests hold blocks
            self.lent = self.pool.get_new_blocks(count)
        elif what == "images":
            llm.reset_mm_cache()
        else:
            llm.llm_engine.reset_encoder_cache()

    def assert_blocks_are_counted(self) -> None:
        """Each request holds in each group what its rows need, and everything else is free or with others."""
        held: Counter[int] = Counter(block.block_id for block in self.lent)
        for manager in self.managers:
            assert set(manager.req_to_blocks) <= set(self.scheduler.requests), "blocks of a request that is gone"
            for request in self.scheduler.requests.values():
                blocks = manager.req_to_blocks.get(request.request_id, [])
                spans = read_spans(request.mm_features)
                gone = [span for span in spans if span.end <= request.num_computed_tokens]
                stage = manager.kv_cache_spec.stage
                rows = request.num_computed_tokens - sum(span.rows[0] - span.rows[stage] for span in gone)
                assert len(blocks) == -(-rows // manager.block_size), f"blocks of stage {stage}"
                if spans:
                    behind = blocks[spans[0].offset // manager.block_size :]
                    assert all(block.block_hash is None for block in behind), "pruned rows in the prefix cache"
                held.update(block.block_id for block in blocks)
        blocks = [block for block in self.pool.blocks if not block.is_null]
        assert [block.ref_cnt for block in blocks] == [held[block.block_id] for block in blocks], "reference counts"
        assert self.free_blocks + len(held) == len(blocks), "a block is neither free nor held"
        cached = self.scheduler.encoder_cache_manager.cached
        assert set(cached) <= set(self.runner.encoder_cache.encoder_outputs), "an encoder output that nobody has made"

    def assert_nothing_is_held(self) -> None:
        self.step()  # which tells the runner of the last ones that are done
        assert not self.scheduler.requests
        state = self.runner.model_state
        assert not state.pending
        assert not state.known, f"the runner still knows {state.known}"
        assert not self.scheduler.encoder_cache_manager.request_cached_ids
        self.assert_blocks_are_counted()

    def clean(self) -> None:
        """After a failure: as far as that is still possible."""
        self.abort_all()
        self.run()
        self.take_back()


def replay(maker: Maker, seed: int, tally: Tally) -> None:
    """Play the scenario of a seed.

    Raises:
        AssertionError: as of `play`, with the seed.
    """
    play(maker, maker.scenario(seed), tally, seed)


def play(maker: Maker, scenario: Scenario, tally: Tally, seed: int | None = None) -> None:
    """Play a scenario in a dirty KV cache, and compare all of its answers.

    Raises:
        AssertionError: one differs, or an invariant does not hold; describes the scenario.
    """
    expected = maker.expected(scenario)
    dirty(maker.engine, seed or 0)
    stage = Play(maker.engine, scenario, tally)
    try:
        stage.run_all()
        for arrival in scenario.arrivals:
            if arrival.name not in stage.gone:
                answers = stage.answers_of(arrival.name)
                assert len(answers) == arrival.n
                for answer in answers:
                    _assert_begins(expected[arrival.name], answer, arrival)
                    tally.answers += 1
                    tally.hits += answer.num_cached_tokens > 0
    except Exception as error:
        try:
            stage.clean()
        except Exception:
            engines.stop()  # it is beyond repair
        raise AssertionError(_describe(maker, seed, scenario, error)) from error
    stage.take_back()
    tally.scenarios += 1


def _assert_begins(alone: Answer, answer: Answer, arrival: Arrival) -> None:
    count = arrival.num_tokens
    beginning = replace(alone, token_ids=alone.token_ids[:count], logprobs=alone.logprobs[:count])
    assert answer.prompt_token_ids == alone.prompt_token_ids
    assert len(answer.token_ids) == count
    far = difference(beginning, answer)
    assert far <= engines.within(SAME), f"{arrival.name} differs by {far:.2g}"
    assert answer.token_ids == beginning.token_ids or not engines.IS_EXACT, f"{arrival.name} has other tokens"


def _describe(maker: Maker, seed: int | None, scenario: Scenario, error: Exception) -> str:
    lines = [
        f"{maker.configuration.name}, seed {seed}: {type(error).__name__}: {error}",
        f"  {scenario.num_tokens} tokens a step, {scenario.num_blocks} blocks, resets {scenario.resets}",
    ]
    for arrival in scenario.arrivals:
        prompt = arrival.prompt
        where = [index for index, token in enumerate(prompt.ids) if token == maker.image_token]
        rows = [prompt.rows(maker.geometry, stage) for stage in range(4)]
        lines.append(
            f"  {arrival.name}: rows {rows}, begins {prompt.ids[:2]}, images at {where} asking {prompt.requested}, "
            f"{arrival.num_tokens} tokens, n={arrival.n}, step {arrival.step}, after {arrival.after}, "
            f"priority {arrival.priority}, salt {arrival.salt}, aborted after {arrival.aborted_after}"
        )
    if seed is not None:
        lines.append(f"  replay: VISIONDROP_MIX_SEED={seed} pytest {__file__} -k {maker.configuration.name}")
    return "\n".join(lines)


def start(configuration: Configuration, fallback: Path) -> Engine:
    """With four groups, whose blocks hold one request of the full length, and a half more."""
    size = configuration.block_size
    return engines.start(
        checkpoint(configuration.checkpoint, fallback),
        layers=LAYERS,
        block_size=size,
        max_model_len=configuration.max_model_len,
        num_gpu_blocks_override=1 + 6 * configuration.max_model_len // size,
        scheduling_policy=configuration.policy,
        asynchronous=configuration.asynchronous,
    )


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda configuration: configuration.name)
def maker(request: pytest.FixtureRequest) -> Maker:
    configuration = request.param
    fallback = request.getfixturevalue("llava15" if configuration.checkpoint.startswith("llava15") else "random_model")
    return Maker(start(configuration, fallback), configuration)


@pytest.fixture
def breakable(maker: Maker) -> Iterator[Maker]:
    yield maker
    wipe(maker.engine)


def test_every_answer_is_the_one_alone(maker: Maker) -> None:
    tally = Tally()
    if SEED is not None:
        replay(maker, int(SEED), tally)
        return
    end = time.monotonic() + SECONDS
    for seed in itertools.count():
        replay(maker, seed, tally)
        if time.monotonic() > end and tally.is_enough:
            break
        assert seed < 100 or time.monotonic() < end, f"not enough to judge: {tally}"
    print(f"{maker.configuration.name}: {tally}")


FIRST_SEEDS = range(6)
"""Those that run on any machine."""


@pytest.mark.parametrize("maker", CONFIGURATIONS[:1], indirect=True, ids=lambda configuration: configuration.name)
@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (sabotage.trust_blocks_of_this_step, "differs by"),
        (sabotage.keep_the_slot_of_another, "differs by"),
        (sabotage.cache_what_was_pruned, "pruned rows in the prefix cache"),
        (sabotage.allocate_for_the_original_tokens, "blocks of stage"),
    ],
    ids=lambda sabotage: getattr(sabotage, "__name__", ""),
)
def test_the_law_of_mixes_can_fail(
    breakable: Maker, monkeypatch: pytest.MonkeyPatch, broken: Sabotage, found: str
) -> None:
    for seed in FIRST_SEEDS:
        breakable.expected(breakable.scenario(seed))
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=rf"seed \d: AssertionError: .*{found}"):
        replay_all(breakable, FIRST_SEEDS)


def replay_all(maker: Maker, seeds: Iterable[int]) -> None:
    for seed in seeds:
        replay(maker, seed, Tally())


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def urgent(request: pytest.FixtureRequest, llava15: Path) -> Maker:
    """Both ways to schedule, by priority, in small blocks."""
    configuration = replace(CONFIGURATIONS[0], asynchronous=request.param)
    return Maker(start(configuration, llava15), configuration)


def test_what_a_step_schedules_and_takes_back_is_not_found_in_the_prefix_cache(urgent: Maker) -> None:
    """By priority, vLLM preempts even whom the same step has scheduled: the block that was to be filled is not filled.

    The least urgent request is about to fill its first block when another one needs more than it holds. Whoever comes
    then begins with the same text.
    """
    cut_off = Prompt(_numbers(29, 1))
    grows = Prompt((*_numbers(63, 2), urgent.image_token), (0,), requested=(64,))
    takes = Prompt((*_numbers(40, 3), urgent.image_token), (0,), requested=(64,))
    begins_the_same = Prompt((*cut_off.ids, *urgent.alone(cut_off).token_ids[:3], *_numbers(16, 4)))
    scenario = Scenario(
        (
            Arrival("cut off", cut_off, NUM_TOKENS, step=0, priority=5),
            Arrival("grows", grows, 8, step=1, priority=4),
            Arrival("takes", takes, 8, step=1),
            Arrival("begins the same", begins_the_same, 4, step=4),
        ),
        num_tokens=104,
        num_blocks=30,
    )
    tally = Tally()
    play(urgent, scenario, tally)
    assert tally.preemptions > 0


def test_an_image_that_a_step_schedules_and_takes_back_is_encoded_later(urgent: Maker) -> None:
    """The same for the encoder's cache, where the engine would end: it looks for an output that nobody has made."""
    image = Prompt((*_numbers(150, 1), urgent.image_token), (0,), requested=(64,))
    needed = sum(-(-(image.rows(urgent.geometry, stage) + 4) // 32) for stage in range(4))
    scenario = Scenario(
        (
            Arrival("image", image, 4, step=0, priority=5),
            Arrival("takes", Prompt(_numbers(32, 2)), 3, step=1),
        ),
        num_tokens=104,
        num_blocks=needed + 4,
    )
    tally = Tally()
    play(urgent, scenario, tally)
    assert tally.preemptions > 0


def _numbers(count: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(4, 400), k=count))

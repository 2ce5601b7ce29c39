"""Random scenarios for the engine: requests that share beginnings, images and conversations, and come and go."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import engines
from engines import Answer, Engine, draw
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vd_plugin.options import read_geometry
from vd_plugin.schedule import FULL, Geometry, Schedule, resolve, resolve_explicit

NUM_TOKENS = 10
"""Of the longest answer."""
SCENARIOS_OF_A_POOL = 4
"""Prompts are drawn from a small pool, which a few scenarios share: caches are hit, and fewer prompts are run alone."""

IMAGES = [draw(336, 336), draw(120, 200, seed=1), draw(200, 90, seed=2)]
BUDGETS = [32, 32, 40, 48, 64, 64, 100, 160, 320, FULL]


@dataclass(frozen=True)
class Configuration:
    checkpoint: str
    block_size: int
    max_model_len: int
    asynchronous: bool
    policy: str

    @property
    def name(self) -> str:
        mode = "asynchronous" if self.asynchronous else "synchronous"
        return f"{self.checkpoint.partition('_')[0]}-{self.block_size}-{mode}-{self.policy}"


CONFIGURATIONS = [
    Configuration("llava15_gqa8", 32, 1024, asynchronous=False, policy="priority"),
    Configuration("llava15_gqa8", 128, 1536, asynchronous=True, policy="priority"),
    Configuration("llavanext_m8", 32, 1536, asynchronous=True, policy="fcfs"),
    Configuration("llavanext_m8", 128, 1536, asynchronous=False, policy="fcfs"),
]
"""Every pair of model, block size and way to schedule; policies go with models, with which they have least to do."""


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    """One image token for each image."""
    images: tuple[int, ...] = ()
    kind: str = "visual_token_budget"
    requested: tuple[Any, ...] = ()
    """For each image, of `kind`."""

    def request(self) -> dict[str, Any]:
        made: dict[str, Any] = {"prompt_token_ids": list(self.ids)}
        if self.images:
            made["multi_modal_data"] = {"image": [IMAGES[image] for image in self.images]}
            made["mm_processor_kwargs"] = {self.kind: [_thaw(requested) for requested in self.requested]}
        return made

    def schedules(self, geometry: Geometry) -> list[Schedule]:
        sizes = [IMAGES[image].size for image in self.images]
        how = resolve if self.kind == "visual_token_budget" else resolve_explicit
        return [
            how(geometry, height, width, requested)
            for (width, height), requested in zip(sizes, self.requested, strict=True)
        ]

    def rows(self, geometry: Geometry, stage: int) -> int:
        """Of the whole prompt."""
        schedules = self.schedules(geometry)
        return len(self.ids) - len(schedules) + sum(schedule.rows[stage] for schedule in schedules)


def _thaw(requested: Any) -> Any:
    return [list(pair) for pair in requested] if isinstance(requested, tuple) else requested


@dataclass(frozen=True)
class Arrival:
    name: str
    prompt: Prompt
    num_tokens: int
    step: int
    after: str | None = None
    """A request that must be done before."""
    n: int = 1
    priority: int = 0
    salt: str | None = None
    aborted_after: int | None = None
    """Steps."""

    def params(self) -> SamplingParams:
        """`n = 2` without a temperature of 0: vLLM refuses to be greedy twice."""
        how = {"top_k": 1} if self.n > 1 else {"temperature": 0}
        return SamplingParams(
            n=self.n,
            max_tokens=self.num_tokens,
            ignore_eos=True,
            logprobs=engines.VOCABULARY,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **how,
        )


@dataclass(frozen=True)
class Scenario:
    arrivals: tuple[Arrival, ...]
    num_tokens: int
    """Of a step."""
    num_blocks: int | None
    """Of the KV cache, where that is smaller than the engine's."""
    resets: tuple[tuple[int, str], ...] = ()
    """Step and what is reset."""


_ALONE: dict[Configuration, dict[Prompt, Answer]] = {}


class Maker:
    """Draws scenarios for an engine, and remembers what it answers alone."""

    def __init__(self, engine: Engine, configuration: Configuration) -> None:
        self.engine = engine
        self.configuration = configuration
        self.geometry = read_geometry(engine.llm.model_config.hf_config)
        self.image_token = int(engine.llm.model_config.hf_config.image_token_index)
        self.max_num_seqs = int(engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)
        self._alone = _ALONE.setdefault(configuration, {})
        self._pools: dict[int, list[Prompt]] = {}

    def alone(self, prompt: Prompt) -> Answer:
        if prompt not in self._alone:
            self.engine.forget()
            (self._alone[prompt],) = self.engine.generate(prompt.request(), num_tokens=NUM_TOKENS)
        return self._alone[prompt]

    def scenario(self, seed: int) -> Scenario:
        random_ = random.Random(f"{self.configuration.name} {seed}")
        prompts = self._pool(seed // SCENARIOS_OF_A_POOL)
        last = random_.choice((0, 4, 12))
        late_first = random_.random() < 0.5
        arrivals: list[Arrival] = []
        for number in range(random_.randint(1, 12)):
            stays = [arrival for arrival in arrivals if arrival.aborted_after is None and arrival.n == 1]
            after = random_.choice(stays) if stays and random_.random() < 0.2 else None
            continued = self._continue(after, random.Random(seed // SCENARIOS_OF_A_POOL)) if after else None
            step = random_.randint(0, last)
            arrival = Arrival(
                name=f"request {number}",
                prompt=continued or random_.choice(prompts),
                num_tokens=random_.randint(1, NUM_TOKENS),
                step=step,
                after=after.name if after and continued and random_.random() < 0.8 else None,
                n=2 if random_.random() < 0.15 else 1,
                priority=self._priority(random_, step, late_first),
                salt=random_.choice((None, None, None, None, None, "salt")),
                aborted_after=random_.randint(0, 8) if random_.random() < 0.15 else None,
            )
            arrivals.append(arrival)
        return Scenario(
            tuple(arrivals),
            self._draw_step(random_, arrivals),
            self._draw_cache(random_, arrivals),
            tuple(
                (random_.randint(1, 15), random_.choice(("prefix", "running", "running", "images", "encoder")))
                for _ in range(random_.choice((0, 0, 0, 1, 2)))
            ),
        )

    def expected(self, scenario: Scenario) -> dict[str, Answer]:
        return {arrival.name: self.alone(arrival.prompt) for arrival in scenario.arrivals}

    def _priority(self, random_: random.Random, step: int, late_first: bool) -> int:
        """In half of the scenarios, who comes late goes first, at the cost of those who run."""
        drawn = random_.randint(0, 2)
        if self.configuration.policy != "priority":
            return 0
        return -step if late_first else drawn

    def _draw_step(self, random_: random.Random, arrivals: list[Arrival]) -> int:
        """From the smallest in which nothing starves: the largest image beside every decode (40 tokens, for speed)."""
        schedules = [schedule for arrival in arrivals for schedule in arrival.prompt.schedules(self.geometry)]
        largest = max((schedule.rows[0] for schedule in schedules if not schedule.is_full), default=0)
        smallest = max(largest, 40) + self.max_num_seqs
        return random_.choice((smallest, smallest + random_.randint(1, 64), random_.randint(smallest, 600), 2048))

    def _draw_cache(self, random_: random.Random, arrivals: list[Arrival]) -> int | None:
        """From the smallest that holds each request alone."""
        size = self.configuration.block_size
        smallest = max(
            sum(-(-(arrival.prompt.rows(self.geometry, stage) + arrival.num_tokens) // size) for stage in range(4))
            for arrival in arrivals
        )
        return random_.choice(
            (smallest, *(smallest + random_.randint(0, smallest // part) for part in (1, 2, 4)), None)
        )

    def _pool(self, number: int) -> list[Prompt]:
        if number not in self._pools:
            random_ = random.Random(f"{self.configuration.name} pool {number}")
            texts = [self._words(random_, 400) for _ in range(2)]
            self._pools[number] = [self._draw_prompt(random_, texts) for _ in range(7)]
        return self._pools[number]

    def _draw_prompt(self, random_: random.Random, texts: list[tuple[int, ...]]) -> Prompt:
        size = self.configuration.block_size
        begin = random_.choice((0, size, size, 2 * size, 2 * size, 3 * size if size < 100 else size))
        begin = max(0, begin + random_.choice((0, 0, -1, 1, random_.randint(-size, size // 2))))
        kind = random_.choice(("visual_token_budget", "visual_token_budget", "visual_token_schedule"))
        prompt = Prompt(random_.choice(texts)[:begin], kind=kind)
        for _ in range(random_.choice((0, 1, 1, 1, 2, 2, 3, 4))):
            text = random_.choice((0, 1, random_.randint(2, 12), random_.randint(size - 6, size + 6)))
            prompt = self._extended(prompt, self._with_image(prompt, random_))
            prompt = self._extended(prompt, self._with_words(prompt, random_, text))
        if not prompt.ids or random_.random() < 0.5:
            # So that the answer needs another block at some stage.
            rows = prompt.rows(self.geometry, random_.randrange(4)) + random_.randrange(NUM_TOKENS)
            prompt = self._extended(prompt, self._with_words(prompt, random_, -rows % size or 1))
        return prompt

    def _with_image(self, prompt: Prompt, random_: random.Random) -> Prompt:
        if prompt.kind == "visual_token_budget":
            requested: Any = random_.choice(BUDGETS)
        else:
            rows = random_.randint(20, 100)
            splits = []
            for stage in range(4):
                dominant = random_.randint(0 if stage else 1, rows)
                contextual = random_.choice((0, (rows - dominant) // 2, rows - dominant))
                splits.append((dominant, contextual) if dominant + contextual else (1, 0))
                rows = sum(splits[-1])
            requested = tuple(splits)
        image = random_.randrange(len(IMAGES))
        return Prompt(
            (*prompt.ids, self.image_token), (*prompt.images, image), prompt.kind, (*prompt.requested, requested)
        )

    def _continue(self, before: Arrival, random_: random.Random) -> Prompt | None:
        """The next turn of a conversation: the prompt, its answer, and another question."""
        answer = self.alone(before.prompt).token_ids[: before.num_tokens]
        if self.image_token in answer:
            return None
        prompt = self._with_words(replace(before.prompt, ids=(*before.prompt.ids, *answer)), random_, 20)
        if random_.random() < 0.5:
            prompt = self._extended(prompt, self._with_words(self._with_image(prompt, random_), random_, 3))
        return prompt if self._fits(prompt) else None

    def _with_words(self, prompt: Prompt, random_: random.Random, count: int) -> Prompt:
        return replace(prompt, ids=prompt.ids + self._words(random_, count))

    def _extended(self, prompt: Prompt, extended: Prompt) -> Prompt:
        return extended if self._fits(extended) else prompt

    def _fits(self, prompt: Prompt) -> bool:
        return prompt.rows(self.geometry, 0) <= self.configuration.max_model_len - 2 * NUM_TOKENS

    def _words(self, random_: random.Random, count: int) -> tuple[int, ...]:
        words = [word for word in range(4, 500) if word != self.image_token]
        return tuple(random_.choices(words, k=count))

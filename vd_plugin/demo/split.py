"""The evaluation split: questions about images that training never sees, the same ones on every machine.

It comes in blocks of twelve examples, one of each kind, so that every prefix of whole blocks is balanced. A block is a
few images with two to four questions each, next to each other: an engine encodes each image once. Half of the questions
for a word are about words that no training image shows.

Signs are written in the fonts of the scenes, of which all but one come with matplotlib.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from dataclasses import dataclass
from typing import Final

from vd_plugin.demo.questions import KINDS, Question, make_questions
from vd_plugin.demo.scenes import FIRST_HELD_OUT_SEED, FONTS, Scene, make_scene
from vd_plugin.demo.words import HELD_OUT_WORDS, TRAINING_WORDS

FIRST_SEED: Final = FIRST_HELD_OUT_SEED
"""Scenes of the split have seeds from here on. Training has those below 1 << 40, and checks itself on those above."""

BLOCK: Final = len(KINDS)
"""Examples in a block, one of each kind."""

GROUPS: Final = ((4, 4, 4), (3, 3, 3, 3), (4, 3, 3, 2), (4, 4, 2, 2))
"""How a block's questions may be spread over its images."""

SIZES: Final = (
    ((448, 448), 0.65),
    ((448, 224), 0.05),
    ((224, 448), 0.05),
    ((672, 224), 0.05),
    ((224, 672), 0.05),
    ((448, 336), 0.06),
    ((336, 448), 0.05),
    ((400, 400), 0.04),
)
"""(width, height) of images in pixels, and how often they come."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one image."""

    number: int
    """Its place in the split."""
    scene: Scene
    question: Question

    @property
    def is_held_out(self) -> bool:
        """Whether the answer is a word that no training image shows."""
        return self.question.kind == "word" and self.question.answer in HELD_OUT_WORDS

    @property
    def digest(self) -> str:
        """Changes with the question, its answer, and the layout and seed of its scene; not with how that is drawn."""
        question, scene = self.question, self.scene
        told = [
            *(self.number, scene.seed, scene.width, scene.height),
            *(question.kind, question.text, question.answer, question.evidence, question.easy),
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def evaluation_split(count: int) -> list[Example]:
    """The first `count` examples. Examples of one image follow one another and share its `Scene`.

    Raises:
        ValueError: a negative count.
    """
    if count < 0:
        raise ValueError(f"count must not be negative; got {count}")
    blocks = (_make_block(number) for number in range(-(-count // BLOCK)))
    pairs = [pair for block in blocks for pair in block]
    return [Example(number, scene, question) for number, (scene, question) in enumerate(pairs[:count])]


def fingerprint(examples: list[Example]) -> str:
    """A digest over all of them."""
    return hashlib.sha256("".join(example.digest for example in examples).encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def _make_block(number: int) -> tuple[tuple[Scene, Question], ...]:
    rng = random.Random(f"block {number}")
    kinds = list(KINDS)
    rng.shuffle(kinds)
    held_out = number % 2 == 1  # whether the block's question for a word is about a held-out one
    seed = FIRST_SEED + (number << 20)
    pairs: list[tuple[Scene, Question]] = []
    for group in rng.choice(GROUPS):
        asked, kinds = kinds[:group], kinds[group:]
        (width, height), *_ = rng.choices([size for size, _ in SIZES], [share for _, share in SIZES])
        # The other images say the other words, so that signs nobody asks about are of both sorts, too.
        words = HELD_OUT_WORDS if held_out == ("word" in asked) else TRAINING_WORDS
        while True:
            seed += 1
            scene = make_scene(seed, width, height, words=words, fonts=FONTS)
            by_kind: dict[str, list[Question]] = {kind: [] for kind in asked}
            for question in make_questions(scene, seed):
                if question.kind in by_kind:
                    by_kind[question.kind].append(question)
            if all(by_kind.values()):
                break
        pairs += [(scene, _choose(rng, by_kind[kind])) for kind in asked]
    return tuple(pairs)


def _choose(rng: random.Random, questions: list[Question]) -> Question:
    """The answer is drawn first, so that frequent ones do not crowd out the others."""
    answer = rng.choice(sorted({question.answer for question in questions}))
    return rng.choice([question for question in questions if question.answer == answer])

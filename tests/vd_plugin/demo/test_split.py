"""The evaluation split is the same everywhere, balanced, and apart from what training sees."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from itertools import groupby

import pytest

from vd_plugin.demo.questions import KINDS, make_questions
from vd_plugin.demo.scenes import Box, draw
from vd_plugin.demo.split import BLOCK, FIRST_SEED, GROUPS, SIZES, Example, evaluation_split, fingerprint
from vd_plugin.demo.words import HELD_OUT_WORDS, TRAINING_WORDS

COUNT = 1200
DIGEST = "e3fea9692c51054f7737df7bc068fb5de8d6830c7c60913bc97214ad609e525c"
"""Questions, answers and boxes of all. Figures that were measured with another digest are about other questions."""

PIXELS = {
    0: "44ad0c9d59c2a3c4",  # 448 x 336
    4: "e35cb5539582b99e",  # 448 x 448
    15: "d5027fa0f0b723ce",  # 400 x 400
    27: "014df97f4f1a929c",  # 672 x 224
    33: "3174f255eb3d9437",  # 336 x 448
}
"""Number of an example -> digest of its image, drawn with Pillow 13.0.0."""


@pytest.fixture(scope="module")
def split() -> list[Example]:
    return evaluation_split(COUNT)


def test_the_split_is_the_one_that_was_measured(split: list[Example]) -> None:
    assert fingerprint(split) == DIGEST


@pytest.mark.parametrize("number", PIXELS)
def test_the_images_are_those_that_were_measured(split: list[Example], number: int) -> None:
    image = draw(split[number].scene)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == PIXELS[number]


@pytest.mark.parametrize("count", [0, 1, 13, 96])
def test_a_smaller_split_is_a_prefix_of_a_larger_one(split: list[Example], count: int) -> None:
    assert evaluation_split(count) == split[:count]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        evaluation_split(-1)


def test_every_block_has_every_kind_once(split: list[Example]) -> None:
    for start in range(0, COUNT, BLOCK):
        assert sorted(example.question.kind for example in split[start : start + BLOCK]) == sorted(KINDS)
    assert all(sum(group) == BLOCK for group in GROUPS)


def test_an_image_has_two_to_four_questions_in_a_row(split: list[Example]) -> None:
    runs = [(seed, len(list(group))) for seed, group in groupby(split, key=lambda example: example.scene.seed)]
    assert len({seed for seed, _ in runs}) == len(runs)
    assert {length for _, length in runs} == {2, 3, 4}


def test_scenes_are_none_of_those_of_training(split: list[Example]) -> None:
    assert FIRST_SEED == 1 << 41
    assert all(example.scene.seed >= FIRST_SEED for example in split)


def test_every_question_follows_from_its_scene(split: list[Example]) -> None:
    for example in split:
        assert example.question in make_questions(example.scene, example.scene.seed)


def test_most_images_are_of_the_usual_size(split: list[Example]) -> None:
    sizes = Counter((example.scene.width, example.scene.height) for example in split)
    assert set(sizes) == {size for size, _ in SIZES}
    assert 0.6 < sizes[448, 448] / COUNT < 0.75
    assert sum(share for _, share in SIZES) == pytest.approx(1)


def test_half_of_the_words_are_held_out(split: list[Example]) -> None:
    words = [example for example in split if example.question.kind == "word"]
    assert sum(example.is_held_out for example in words) == len(words) // 2
    for example in words:
        assert example.question.answer in (HELD_OUT_WORDS if example.is_held_out else TRAINING_WORDS)
    assert not any(example.is_held_out for example in split if example.question.kind != "word")


def test_easy_and_hard_questions_are_about_as_many(split: list[Example]) -> None:
    assert 0.4 < sum(example.question.easy for example in split) / COUNT < 0.6


def test_evidence_lies_within_the_image(split: list[Example]) -> None:
    for example in split:
        for box in example.question.evidence:
            assert 0 <= box.left < box.right <= example.scene.width
            assert 0 <= box.top < box.bottom <= example.scene.height


def test_the_digest_sees_question_and_scene(split: list[Example]) -> None:
    """Whatever changes what is asked, or of what, changes it."""
    import dataclasses

    example = split[0]
    question, scene = example.question, example.scene
    others = [
        dataclasses.replace(example, number=1),
        dataclasses.replace(example, scene=dataclasses.replace(scene, seed=scene.seed + 1)),
        dataclasses.replace(example, scene=dataclasses.replace(scene, width=scene.width + 1)),
        *(
            dataclasses.replace(example, question=dataclasses.replace(question, **{name: value}))
            for name, value in (("text", "?"), ("answer", "!"), ("evidence", (Box(1, 2, 3, 4),)))
        ),
    ]
    assert len({example.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_it_imports_pillow_alone() -> None:
    """Of matplotlib it takes the fonts, which are files; drawing included."""
    code = """
import sys
before = set(sys.modules)
from vd_plugin.demo.scenes import draw
from vd_plugin.demo.split import evaluation_split
for example in evaluation_split(24):
    draw(example.scene)
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert set(ran.stdout.split()) == {"PIL", "vd_plugin"}

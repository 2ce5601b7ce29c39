"""Questions about a scene, with their answers and where in the image the evidence lies.

A question is asked only where its answer is certain: "the red circle" is the only one, "left of" means the next slot.
Its `evidence` are the boxes that the answer depends on. For a question about something absent, or about how many there
are, that is every shape that could be mistaken for it; if there is none, the list is empty.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from vd_plugin.demo.scenes import COLORS, POSITIONS, SHAPES, Box, Scene, Sign, Thing

KINDS: Final = (
    "color",
    "shape",
    "exists",
    "count",
    "position",
    "relation",
    "neighbor",
    "size",
    "number",
    "word",
    "label",
    "describe",
)


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    """One of KINDS."""
    text: str
    answer: str
    evidence: tuple[Box, ...]
    easy: bool
    """No evidence is small, and at most two boxes matter."""


_ASK: Final[dict[str, tuple[str, ...]]] = {
    "color_shape": (
        "What color is the {shape}?",
        "What colour is the {shape}?",
        "Which color does the {shape} have?",
        "Tell me the color of the {shape}.",
        "The {shape}: what is its colour?",
    ),
    "color_position": (
        "What color is the shape at the {position}?",
        "What colour is the shape at the {position}?",
        "Which color does the shape at the {position} have?",
        "Name the colour of the shape at the {position}.",
    ),
    "shape_color": (
        "What shape is {color}?",
        "Which shape is {color}?",
        "What is the {color} thing?",
        "What shape is the {color} object?",
        "Name the shape that is {color}.",
    ),
    "shape_position": (
        "What shape is at the {position}?",
        "Which shape do you see at the {position}?",
        "What is the shape at the {position}?",
        "Name the shape at the {position}.",
    ),
    "exists": (
        "Is there a {name}?",
        "Is there a {name} in the image?",
        "Do you see a {name}?",
        "Does the image show a {name}?",
        "Can you find a {name} here?",
        "Is a {name} present?",
    ),
    "count_name": (
        "How many {name}s are there?",
        "How many {name}s do you see?",
        "Count the {name}s.",
        "What is the number of {name}s?",
        "How many {name}s are in the image?",
    ),
    "count_color": (
        "How many {color} shapes are there?",
        "How many shapes are {color}?",
        "Count the {color} shapes.",
        "How many {color} things do you see?",
    ),
    "count_shape": (
        "How many {shape}s are there?",
        "How many {shape}s do you see?",
        "Count the {shape}s.",
        "What is the number of {shape}s in the image?",
    ),
    "position": (
        "Where is the {name}?",
        "Where in the image is the {name}?",
        "In which part of the image is the {name}?",
        "Where do you see the {name}?",
        "Locate the {name}.",
    ),
    "relation": (
        "Is the {first} {relation} the {second}?",
        "Is the {first} somewhere {relation} the {second}?",
        "Do you see the {first} {relation} the {second}?",
        "Would you say the {first} is {relation} the {second}?",
    ),
    "neighbor": (
        "What is {relation} the {name}?",
        "Which shape is {relation} the {name}?",
        "What do you see {relation} the {name}?",
        "Name the shape {relation} the {name}.",
    ),
    "size": (
        "Which is larger, the {first} or the {second}?",
        "Which one is bigger, the {first} or the {second}?",
        "What is larger: the {first} or the {second}?",
        "Of the {first} and the {second}, which is larger?",
    ),
    "largest": (
        "What is the largest shape?",
        "Which shape is the largest?",
        "What is the biggest shape in the image?",
        "Name the largest shape.",
    ),
    "number": (
        "What number is written in the image?",
        "Which number do you see?",
        "Read the number.",
        "What is the number on the sign?",
        "What does the number say?",
    ),
    "number_position": (
        "What number is written at the {position}?",
        "Read the number at the {position}.",
        "Which number is at the {position}?",
        "What does the sign at the {position} say?",
    ),
    "word": (
        "What word is written in the image?",
        "Which word do you see?",
        "Read the word.",
        "What does the word say?",
        "What is the word on the sign?",
    ),
    "word_position": (
        "What word is written at the {position}?",
        "Read the word at the {position}.",
        "Which word is at the {position}?",
        "What does the sign at the {position} say?",
    ),
    "label": (
        "What number is on the {name}?",
        "Which number does the {name} carry?",
        "Read the number on the {name}.",
        "What is written on the {name}?",
    ),
    "describe": (
        "What is in the image?",
        "Describe the image.",
        "What do you see?",
        "Which shapes are in the image?",
        "List the shapes.",
        "What does the image show?",
    ),
}

_RELATIONS: Final[dict[tuple[int, int], tuple[str, ...]]] = {
    (0, -1): ("left of", "to the left of"),
    (0, 1): ("right of", "to the right of"),
    (-1, 0): ("above",),
    (1, 0): ("below",),
}
"""Step from one slot to the next, (rows, columns)."""


def make_questions(scene: Scene, seed: int) -> list[Question]:
    """Every question that the scene allows, one of each kind and subject, in random order and wording."""
    rng = random.Random(f"questions {seed}")
    questions = [question for make in _MAKERS for question in make(scene, rng)]
    rng.shuffle(questions)
    return questions


def choose(questions: list[Question], count: int, seed: int) -> list[Question]:
    """Up to `count` of them, kinds in turn, so that no kind crowds the others out."""
    rng = random.Random(f"choose {seed}")
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    kinds = sorted(by_kind)
    rng.shuffle(kinds)
    chosen: list[Question] = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in kinds:
            if by_kind[kind] and len(chosen) < count:
                chosen.append(by_kind[kind].pop())
    return chosen


def normalize(text: str) -> str:
    """An answer as it is compared: case, articles, full stops and spaces do not count."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _attributes(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """The colour of what its shape or its place names, then the shape of what its colour or its place names."""
    for kind, named_by in (("color", "shape"), ("shape", "color")):
        names = Counter(getattr(thing, named_by) for thing in scene.things)
        for thing in scene.things:
            name = getattr(thing, named_by)
            if names[name] == 1:
                yield _ask(rng, kind, f"{kind}_{named_by}", getattr(thing, kind), [thing], **{named_by: name})
        for thing in _alone(scene):
            yield _ask(rng, kind, f"{kind}_position", getattr(thing, kind), [thing], position=thing.position)


def _exists(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """As many absent as present; most of the absent share their colour or their shape with something."""
    names = sorted({thing.name for thing in scene.things})
    if not names:
        return
    for name in rng.sample(names, min(2, len(names))):
        yield _ask(rng, "exists", "exists", "yes", [t for t in scene.things if t.name == name][:1], name=name)
    for _ in range(min(2, len(names))):
        for _attempt in range(20):
            color, shape = rng.choice(sorted(COLORS)), rng.choice(SHAPES)
            if rng.random() < 0.45:
                color = rng.choice(scene.things).color
            elif rng.random() < 0.8:
                shape = rng.choice(scene.things).shape
            if f"{color} {shape}" not in names:
                alike = [t for t in scene.things if t.color == color or t.shape == shape]
                yield _ask(rng, "exists", "exists", "no", alike, name=f"{color} {shape}")
                break


def _counts(scene: Scene, rng: random.Random) -> Iterator[Question]:
    if not scene.things:
        return
    for thing in rng.sample(scene.things, min(2, len(scene.things))):
        same = [t for t in scene.things if t.name == thing.name]
        yield _ask(rng, "count", "count_name", str(len(same)), same, name=thing.name)
    for color in rng.sample(sorted({t.color for t in scene.things}), 1):
        same = [t for t in scene.things if t.color == color]
        yield _ask(rng, "count", "count_color", str(len(same)), same, color=color)
    for shape in rng.sample(sorted({t.shape for t in scene.things}), 1):
        same = [t for t in scene.things if t.shape == shape]
        yield _ask(rng, "count", "count_shape", str(len(same)), same, shape=shape)
    absent = sorted(set(SHAPES) - {t.shape for t in scene.things})
    if absent and rng.random() < 0.3:
        yield _ask(rng, "count", "count_shape", "0", [], shape=rng.choice(absent))


def _positions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in _unique(scene):
        yield _ask(rng, "position", "position", thing.position, [thing], name=thing.name)


def _relations(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Half of the answers are yes. Two shapes in one row are neither above nor below one another."""
    unique = _unique(scene)
    for _ in range(3):
        if len(unique) < 2:
            return
        first, second = rng.sample(unique, 2)
        steps = [
            step
            for step in _RELATIONS
            if (step[0] and first.row != second.row) or (step[1] and first.column != second.column)
        ]
        if not steps:
            continue
        step = rng.choice(steps)
        yes = (first.row - second.row) * step[0] + (first.column - second.column) * step[1] > 0
        yield _ask(
            rng, "relation", "relation", "yes" if yes else "no", [first, second],
            first=first.name, second=second.name, relation=rng.choice(_RELATIONS[step]),
        )  # fmt: skip


def _neighbors(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Both in slots of their own, side by side."""
    by_slot = {(thing.row, thing.column): thing for thing in _alone(scene)}
    for thing in _unique(scene):
        if not thing.alone:
            continue
        for (rows, columns), words in _RELATIONS.items():
            other = by_slot.get((thing.row + rows, thing.column + columns))
            if other is not None:
                yield _ask(
                    rng, "neighbor", "neighbor", other.name, [thing, other], name=thing.name, relation=rng.choice(words)
                )


def _sizes(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Only where one is at least a quarter wider."""
    unique = _unique(scene)
    for _ in range(2):
        if len(unique) < 2:
            return
        first, second = rng.sample(unique, 2)
        small, large = sorted((first, second), key=_width)
        if first.name != second.name and _width(large) >= 1.25 * _width(small):
            yield _ask(
                rng, "size", "size", large.name, [first, second], easy=small.size != "small",
                first=first.name, second=second.name,
            )  # fmt: skip
    by_width = sorted(scene.things, key=_width)
    if len(by_width) >= 2 and _width(by_width[-1]) >= 1.25 * _width(by_width[-2]) and by_width[-1].size != "small":
        yield _ask(rng, "size", "largest", by_width[-1].name, [by_width[-1]])


def _texts(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for kind, signs in (
        ("number", [s for s in scene.signs if s.is_number]),
        ("word", [s for s in scene.signs if not s.is_number]),
    ):
        # A label is a number, too, but no sign: where things carry labels, the sign is asked for by its place.
        if len(signs) == 1 and not (kind == "number" and any(thing.label for thing in scene.things)):
            yield _ask(rng, kind, kind, signs[0].text, signs)
        for sign in signs:
            yield _ask(rng, kind, f"{kind}_position", sign.text, [sign], position=sign.position)


def _labels(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in _unique(scene):
        if thing.label:
            yield _ask(rng, "label", "label", thing.label, [thing], easy=thing.size == "large", name=thing.name)


def _description(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Up to four shapes, in reading order of their slots."""
    if 1 <= len(scene.things) <= 4 and all(thing.alone for thing in scene.things):
        names = [f"{_article(thing.name)} {thing.name}" for thing in scene.things]
        answer = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        yield _ask(rng, "describe", "describe", answer, list(scene.things))


_MAKERS: Final[tuple[Callable[[Scene, random.Random], Iterator[Question]], ...]] = (
    _attributes,
    _exists,
    _counts,
    _positions,
    _relations,
    _neighbors,
    _sizes,
    _texts,
    _labels,
    _description,
)


def _ask(
    rng: random.Random,
    kind: str,
    wording: str,
    answer: str,
    evidence: list[Thing] | list[Sign],
    *,
    easy: bool | None = None,
    **words: str,
) -> Question:
    text = rng.choice(_ASK[wording]).format(**words)
    text = text.replace(" a orange", " an orange").replace("crosss", "crosses")
    if easy is None:
        easy = len(evidence) <= 2 and all(item.size != "small" for item in evidence)
    return Question(kind, text, answer, tuple(item.box for item in evidence), easy)


def _unique(scene: Scene) -> list[Thing]:
    """Shapes that their colour and shape name."""
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def _alone(scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if thing.alone]


def _width(thing: Thing) -> int:
    return thing.box.width


def _article(name: str) -> str:
    return "an" if name.startswith("orange") else "a"


def vocabulary() -> Iterator[str]:
    """Every wording with every word that may stand in it: what a tokenizer should know."""
    for wordings in _ASK.values():
        for wording in wordings:
            yield wording.format_map(_Blank())
    for color in COLORS:
        for shape in SHAPES:
            yield f"Is there a {color} {shape}? How many {color} {shape}s are there? a {color} {shape} and"
            yield f"{color} {shape}"
    for row in POSITIONS:
        for position in row:
            yield f"at the {position}?"
            yield position
    for words in _RELATIONS.values():
        yield " ".join(f"is {word} the" for word in words)
    yield "yes no an orange crosses"


class _Blank(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""

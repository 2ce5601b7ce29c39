"""The network that is trained is the checkpoint that is served: equal to transformers on drawn scenes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from training.batches import CHARACTERS, HELD_OUT, Plan, find_mentions, make_raw, plan_for, prepare, tokenizer
from training.network import Network
from training.optimizer import Muon, Optimizer, _orthogonalize
from training.train import make_network, mention_losses, tower_losses
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.scenes import Box, Scene, Thing, draw, make_scene
from vd_plugin.demo.split import FIRST_SEED
from vd_plugin.demo.words import TRAINING_WORDS

CPU = torch.device("cpu")
SIZES = [(448, 448), (448, 336), (400, 400), (672, 224), (224, 224), (333, 222)]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(3)
    made = make_network()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim < 2:  # biases and norms that do something
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


@pytest.fixture(scope="module")
def served(network: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same weights in transformers' class, and its processor."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    folder = tmp_path_factory.mktemp("network") / "model"
    shutil.copytree(MODEL_PATH, folder, ignore=lambda *_: ["model.safetensors"])
    tensors = {name: tensor.contiguous() for name, tensor in network.checkpoint().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = LlavaNextForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_answers_as_transformers_does(network: Network, served: tuple[Any, Any], width: int, height: int) -> None:
    """Many questions on one image at once, against each of them alone through the published classes."""
    model, processor = served
    seed = HELD_OUT + width
    raw = make_raw(Plan(width, height, True, 1, 1.0, 4), seed, evaluation=True)
    batch, _ = prepare(raw, CPU, torch.float32, 0)
    with torch.no_grad():
        logits = network(batch, network.see(batch)[0]).logits.log_softmax(-1)
    image = draw(make_scene(seed, width, height, words=TRAINING_WORDS))
    first = 0
    for question in raw.questions[0]:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=False)
        assert inputs["input_ids"].shape[1] == batch.order.shape[1] + len(batch.before) + len(batch.after) + len(
            tokenizer().encode(f"{question.text}\nASSISTANT:\n").ids
        )
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1].log_softmax(-1)
        # Resizing rounds here and there to another eighth bit.
        torch.testing.assert_close(logits[first], expected, atol=1e-3, rtol=0)
        first += len(tokenizer().encode(question.answer).ids) + 1


def test_questions_do_not_see_each_other(network: Network) -> None:
    raw = make_raw(Plan(224, 224, False, 1, 1.0, 6), HELD_OUT + 5, evaluation=True)
    batch, _ = prepare(raw, CPU, torch.float32, 0)
    with torch.no_grad():
        features, _ = network.see(batch)
        before = network(batch, features).logits
        other = batch.tokens.clone()
        other[batch.units == 0] = 7  # another first question
        after = network(batch._replace(tokens=other), features).logits
    first = batch.units.flatten()[batch.asked] == 0
    torch.testing.assert_close(before[~first], after[~first])
    assert not torch.allclose(before[first], after[first])


def test_part_of_the_patches_keeps_their_places(network: Network) -> None:
    """With every patch chosen the tower sees what it sees without a choice."""
    raw = make_raw(Plan(224, 224, True, 2, 1.0, 2), HELD_OUT + 6, evaluation=True)
    batch, _ = prepare(raw, CPU, torch.float32, 0)
    every = torch.arange(256).expand(*batch.pixels.shape[:2], 256)
    with torch.no_grad():
        torch.testing.assert_close(network.see(batch)[0], network.see(batch._replace(chosen=every))[0])


def test_choice_keeps_what_shows_something_and_no_padding() -> None:
    raw = make_raw(Plan(448, 336, True, 4, 0.45, 2), HELD_OUT + 7, evaluation=True)
    some, labels = prepare(raw, CPU, torch.float32, 1)
    raw.plan = Plan(448, 336, True, 4, 1.0, 2)
    _, every = prepare(raw, CPU, torch.float32, 1)
    assert some.chosen is not None
    assert some.chosen.shape == (4, 5, round(0.45 * 256))
    assert int(labels.foreground.sum()) == int(every.foreground.sum())
    # Tiles of the upper row are padded at their top, those of the lower at their bottom: 4 of 16 rows each.
    rows = some.chosen // 16
    assert int(rows[:, 1:3].min()) >= 4
    assert int(rows[:, 3:5].max()) < 12
    flat = torch.arange(5 * round(0.45 * 256))
    assert all(torch.equal(order.sort().values, flat) for order in some.order)


@pytest.mark.parametrize(
    ("text", "named", "slots", "is_only_one"),
    [
        ("Where is the red star?", " star", [1, 0, 0, 0, 0, 0, 0, 0, 0], True),
        ("Is there a blue star?", " star", [0, 0, 0, 0, 0, 0, 0, 0, 0], False),
        ("How many red shapes are there?", " red", [1, 0, 0, 0, 0, 2, 0, 0, 0], False),
        ("How many rings are there?", " rings", [0, 0, 0, 0, 0, 2, 0, 0, 0], False),
    ],
)
def test_mentions_tell_where_what_is_named_stands(text: str, named: str, slots: list[int], is_only_one: bool) -> None:
    box = Box(0, 0, 40, 40)
    things = [Thing("star", "red", "medium", 0, 0, box), *[Thing("ring", "red", "small", 1, 2, box)] * 2]
    scene = Scene(448, 448, 1, tuple(things), ())
    tokens = tokenizer().encode(f"{text}\nASSISTANT:\n").ids
    found = list(find_mentions(scene, tokens, [-100] * len(tokens)))
    assert [(place, numbers) for place, numbers, _ in found] == [
        (tokens.index(tokenizer().token_to_id(f"Ġ{named[1:]}")), slots)
    ]
    assert (found[0][2] >= 0) is is_only_one
    assert list(find_mentions(scene, tokens, [0] * len(tokens))) == [], "answers tell nothing"


def test_characters_know_their_place_in_the_word() -> None:
    """The labels of a scene's only text spell it, in order."""
    scenes = {seed: make_scene(seed) for seed in range(400)}
    seed = next(
        seed
        for seed, scene in scenes.items()
        if [sign.size for sign in scene.signs] == ["large"] and not any(thing.label for thing in scene.things)
    )
    _, labels = prepare(make_raw(Plan(448, 448, True, 1, 1.0, 1), seed), CPU, torch.float32, 0)
    pairs = torch.stack((labels.index, labels.character), dim=-1)[0, 1:].flatten(0, -2).unique(dim=0)
    indices, characters = pairs[pairs[:, 0] > 0].T.tolist()
    assert indices == list(range(1, len(indices) + 1))
    assert "".join(CHARACTERS[character - 1] for character in characters) == scenes[seed].signs[0].text


def test_a_step_learns() -> None:
    torch.manual_seed(1)
    network = make_network()
    optimizer = Optimizer(network)
    raw = make_raw(Plan(224, 224, False, 4, 0.5, 4, small=False), 11)
    losses = []
    for step in range(6):
        batch, labels = prepare(raw, CPU, torch.float32, step)
        features, pooled = network.see(batch)
        loss = torch.nn.functional.cross_entropy(network(batch, features).logits, batch.wanted)
        (loss + sum(tower_losses(network, features, pooled, labels, batch.chosen).values())).backward()
        optimizer.step(2e-3)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_every_weight_of_the_checkpoint_is_trained() -> None:
    network = make_network()
    raw = make_raw(Plan(224, 224, True, 2, 1.0, 4), 21)
    batch, labels = prepare(raw, CPU, torch.float32, 1)
    features, pooled = network.see(batch)
    said = network(batch, features)
    losses = [
        *(said.logits.sum(), *mention_losses(said, raw.mentions, batch.mentions)),
        *tower_losses(network, features, pooled, labels, batch.chosen).values(),
    ]
    torch.stack(losses).sum().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


def test_orthogonal_updates() -> None:
    values = torch.linalg.svdvals(_orthogonalize(torch.randn(3, 40, 24)).float())
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.4


def test_optimizer_goes_on_where_it_stopped() -> None:
    def some() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]

    first, second = some(), some()
    one, two = Muon(first, 0.1), Muon(second, 0.1)
    for parameters, optimizer in ((first, one), (second, two)):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0.1)
    fresh = Muon(second, 0.1)
    fresh.load_state_dict(two.state_dict())
    for parameters, optimizer in ((first, one), (second, fresh)):
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        optimizer.step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_held_out_scenes_are_never_trained_on() -> None:
    assert 2 * HELD_OUT <= FIRST_SEED
    assert HELD_OUT > (255 << 32) + (1 << 25) * 64 + 64, "33 million steps of 255 seeds"
    assert all(plan_for(step, step / 300).images <= 64 for step in range(300)), "seeds of two batches would meet"

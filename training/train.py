"""Train the demo model: `python -m training.train --minutes 150`.

The run is as long as it is told to be: curriculum and learning rate follow the share of the time that has passed. It
writes `state.pt` now and then, and goes on from it when started again with the same folder; with `--from-checkpoint` a
new run starts from the weights that the repository ships.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from training.batches import CHARACTERS, HELD_OUT, SIDE, Batches, Labels, Plan, Raw, make_raw, prepare, tokenizer
from training.network import Batch, Network, Output
from training.optimizer import Optimizer
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.scenes import COLORS, POSITIONS, SHAPES

_EVALUATION_PLANS = (
    Plan(224, 224, False, 24, 1.0, 16, small=False),
    Plan(448, 448, True, 24, 1.0, 16),
    Plan(448, 448, True, 24, 0.3, 16),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=Path(".cache/training"), help="folder of state, log and checkpoint")
    parser.add_argument("--minutes", type=float, default=150, help="length of the run, earlier parts included")
    parser.add_argument("--stop-after", type=float, help="minutes after which this part ends; start again to go on")
    parser.add_argument("--from-checkpoint", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--start", type=float, default=0.0, help="share of the curriculum to leave out at the start")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--batch-scale", type=float, default=1.0, help="factor to the images of a batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluate-every", type=float, default=60, metavar="SECONDS")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    network = make_network().to(device)
    optimizer = Optimizer(network)
    run = Run(arguments, network, optimizer, device)
    run.resume()
    run.train()
    return 0


def make_network() -> Network:
    config = json.loads((MODEL_PATH / "config.json").read_text())
    return Network(config, len(SHAPES), len(COLORS), len(CHARACTERS))


class Run:
    def __init__(
        self, arguments: argparse.Namespace, network: Network, optimizer: Optimizer, device: torch.device
    ) -> None:
        self.arguments, self.network, self.optimizer, self.device = arguments, network, optimizer, device
        self.dtype = torch.bfloat16
        self.step = 0
        self.images = 0
        self.questions = 0
        self.elapsed = 0.0
        """Seconds of training, earlier parts included, evaluation and saving as well."""
        self._evaluation: list[Raw] = []
        self._stopped = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True

    @property
    def _state_file(self) -> Path:
        return Path(self.arguments.out, "state.pt")

    @property
    def _share(self) -> float:
        """Of the run's time that has passed."""
        return min(1.0, float(self.elapsed / (60 * self.arguments.minutes)))

    @property
    def progress(self) -> float:
        """Through the curriculum."""
        return float(self.arguments.start + (1 - self.arguments.start) * self._share)

    def learning_rate(self) -> float:
        """Up over the first steps, constant, and down to nothing over the last 75 % of the time."""
        warm = min(1.0, (self.step + 1) / 100)
        return float(self.arguments.learning_rate * warm * min(1.0, max(0.02, (1 - self._share) / 0.75)))

    def resume(self) -> None:
        if self._state_file.exists():
            state = torch.load(self._state_file, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name in ("step", "images", "questions", "elapsed"):
                setattr(self, name, state[name])
            self._say(f"going on at step {self.step}, {self.elapsed / 60:.1f} minutes in")
        elif self.arguments.from_checkpoint:
            weights = load_file(self.arguments.from_checkpoint / "model.safetensors")
            heads = self.arguments.from_checkpoint / "heads.safetensors"
            if self.arguments.from_checkpoint.resolve() == MODEL_PATH:
                heads = Path(__file__).with_name("heads.safetensors")
            weights |= load_file(heads) if heads.exists() else {}
            mine = self.network.state_dict()
            weights = {k: v.float() for k, v in weights.items() if k not in mine or v.shape == mine[k].shape}
            missing, unexpected = self.network.load_state_dict(weights, strict=False)
            assert not unexpected, unexpected
            assert all(name.startswith("heads.") for name in missing), missing

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in ("step", "images", "questions", "elapsed")},
        }
        temporary = self._state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._state_file)
        heads = self.network.heads.state_dict(prefix="heads.")
        for name, tensors in (("model", self.network.checkpoint()), ("heads", heads)):
            halved = {name: tensor.to(torch.float16).cpu().contiguous() for name, tensor in tensors.items()}
            save_file(halved, Path(self.arguments.out, f"{name}.safetensors"), metadata={"format": "pt"})

    def train(self) -> None:
        arguments = self.arguments
        started, before = time.monotonic(), self.elapsed
        limit = min(60 * arguments.minutes, before + 60 * (arguments.stop_after or math.inf))
        shared = multiprocessing.Value("d", self.progress)
        loader = iter(
            DataLoader(
                Batches(arguments.seed, self.step + 1, shared, arguments.batch_scale),
                batch_size=None,
                num_workers=arguments.workers,
                pin_memory=self.device.type == "cuda",
                prefetch_factor=2 if arguments.workers else None,
            )
        )
        last_evaluation = last_save = time.monotonic()
        sums: dict[str, list[Tensor]] = defaultdict(list)
        waited = 0.0
        while self.elapsed < limit and not self._stopped:
            asked = time.monotonic()
            raw = next(loader)
            waited += time.monotonic() - asked
            self.step += 1
            rate = self.learning_rate()
            for name, value in self._step(raw, rate).items():
                sums[name].append(value)
            self.images += len(raw.images)
            self.questions += raw.plan.questions and int((raw.units.amax(1) + 1).sum())
            self.elapsed = before + time.monotonic() - started
            shared.value = self.progress
            if self.step % 50 == 0:
                means = {name: round(torch.stack(values).float().mean().item(), 4) for name, values in sums.items()}
                self._log(kind="train", learning_rate=round(rate, 6), waited=round(waited, 1), **means)
                self._show(means)
                sums.clear()
                waited = 0.0
                self.elapsed = before + time.monotonic() - started
            if time.monotonic() - last_save > 120:
                self.save()
                last_save = time.monotonic()
            if time.monotonic() - last_evaluation > arguments.evaluate_every:
                self.evaluate()
                last_evaluation = time.monotonic()
                self.elapsed = before + time.monotonic() - started
        self.save()
        if not self._stopped:
            self.evaluate()

    def _step(self, raw: Raw, rate: float) -> dict[str, Tensor]:
        batch, labels = prepare(raw, self.device, self.dtype, self.step)
        features, pooled = self.network.see(batch)
        losses = tower_losses(self.network, features, pooled, labels, batch.chosen)
        # The tower learns to see first; later its own questions only keep it honest.
        asks = len(batch.asked) > 0
        weight = 0.3 if asks else 1.0
        loss = weight * sum(losses.values(), torch.zeros((), device=self.device))
        if asks:
            said = self.network(batch, features)
            number = batch.num_answers
            answer = F.cross_entropy(said.logits[:number], batch.wanted[:number])
            # What is asked for is there, mostly: questions are captions, too.
            prompt = F.cross_entropy(said.logits[number:], batch.wanted[number:])
            right = (said.logits.argmax(-1) == batch.wanted)[:number].float().mean()
            words = word_loss(self.network, said.projected, labels, batch)
            slots, sizes = mention_losses(said, raw.mentions.to(self.device), batch.mentions)
            losses |= {
                "words": words,
                "slots": slots,
                "size": sizes,
                "answer": answer,
                "right": right,
                "prompt": prompt,
            }
            loss = loss + 0.2 * prompt + 0.5 * words + slots + 0.2 * sizes + answer
        loss.backward()
        losses["norm"] = self.optimizer.step(rate)
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def evaluate(self) -> None:
        """Exact match on held-out scenes, by kind. Teacher-forced: an answer is right if each of its tokens wins."""
        if not self._evaluation:
            self._evaluation = [make_raw(plan, HELD_OUT, evaluation=True) for plan in _EVALUATION_PLANS]
        self.network.eval()
        for plan, raw in zip(_EVALUATION_PLANS, self._evaluation, strict=True):
            right: dict[str, list[bool]] = defaultdict(list)
            for start in range(0, plan.images, 8):
                part = _part(raw, start, start + 8)
                batch, _ = prepare(part, self.device, self.dtype, 0)
                features, _ = self.network.see(batch)
                wrong = torch.zeros_like(batch.tokens)
                wrong.view(-1)[batch.asked] = (self.network(batch, features).logits.argmax(-1) != batch.wanted).long()
                wrong.view(-1)[batch.asked[batch.num_answers :]] = 0
                for row, questions in enumerate(part.questions):
                    mistakes = torch.zeros(len(questions), device=self.device, dtype=torch.long)
                    mistakes.index_add_(0, batch.units[row].clamp(min=0), wrong[row])
                    for question, count in zip(questions, mistakes.tolist(), strict=True):
                        right[question.kind].append(count == 0)
                        right["easy" if question.easy else "hard"].append(count == 0)
            shares = {kind: round(sum(r) / len(r), 3) for kind, r in sorted(right.items())}
            name = f"{plan.width}x{plan.height}{' tiled' if plan.tiled else ''} keep {plan.keep}"
            self._log(kind="evaluation", what=name, exact=shares)
            self._say(f"{name}: " + " ".join(f"{k} {v:.2f}" for k, v in shares.items()))
        self.network.train()

    def _log(self, **entry: Any) -> None:
        entry = {
            "step": self.step,
            "images": self.images,
            "questions": self.questions,
            "minutes": round(self.elapsed / 60, 2),
            **entry,
        }
        with Path(self.arguments.out, "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _show(self, means: dict[str, float]) -> None:
        total = self.arguments.minutes
        filled = round(20 * self.elapsed / 60 / total)
        bar = "#" * filled + "." * (20 - filled)
        losses = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        self._say(f"[{bar}] {self.elapsed / 60:5.1f}/{total:g} min  step {self.step}  {self.images:,} images  {losses}")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


@functools.cache
def _word_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids of the words for shapes, colours, characters and places: (n, 2) each, -1 where there is no second."""

    def ids(words: Iterable[str]) -> Tensor:
        coded = [tokenizer().encode(word, add_special_tokens=False).ids[:2] for word in words]
        return torch.tensor([[*code, -1][:2] for code in coded])

    return (
        ids(f" {shape}" for shape in SHAPES),
        ids(f" {color}" for color in COLORS),
        ids(CHARACTERS),
        ids(f" {position}" for row in POSITIONS for position in row),
    )


def word_loss(network: Network, projected: Tensor, labels: Labels, batch: Batch) -> Tensor:
    """How far projected patches are from the sum of the words for what they show, relative to that sum's size.

    LLaVA's first stage of training aligns the projector with the decoder's words by captions; patches of drawn scenes
    can be told their words one by one. Of the base view these include the place, which tiles cannot know.
    """
    table = network.language_model.model.embed_tokens.weight.detach()
    shapes, colors, characters, positions = (
        (table[ids.clamp(min=0)] * (ids >= 0).unsqueeze(-1).to(table.device)).sum(1)
        for ids in (ids.to(table.device) for ids in _word_tokens())
    )
    nothing = table.new_zeros(1, table.shape[1])
    shapes, colors, characters = (torch.cat((nothing, words)) for words in (shapes, colors, characters))
    wanted = shapes[labels.shape] + colors[labels.color] + characters[labels.character].sum(-2)
    side = SIDE
    patch = torch.arange(side * side, device=table.device) if batch.chosen is None else batch.chosen[:, 0]
    place = (patch // side * 3 // side) * 3 + patch % side * 3 // side
    wanted[:, 0] += positions[place]
    said = projected.float()
    shows = labels.foreground.unsqueeze(-1)
    return ((said - wanted) ** 2 * shows).sum() / (wanted**2 * shows).sum().clamp(min=1e-6)


def mention_losses(said: Output, mentions: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """How wrong the decoder is halfway up about where things are that a question names, and how wide they are.

    Args:
        mentions: (B, L, SLOTS + 1) as in `Raw`.
        places: (N,) those of `mentions` that are some.
    """
    wanted = mentions.flatten(0, 1).index_select(0, places).long()
    slots, widths = wanted[:, :-1].flatten(), wanted[:, -1]
    each = F.cross_entropy(said.slots.flatten(0, 1), slots, reduction="none")
    wrong_width = F.cross_entropy(said.widths, widths, ignore_index=-1, reduction="sum")
    return (each * torch.where(slots > 0, 1.0, 0.3)).mean(), wrong_width / (widths >= 0).sum().clamp(min=1)


def tower_losses(
    network: Network, features: Tensor, pooled: Tensor, labels: Labels, chosen: Tensor | None
) -> dict[str, Tensor]:
    """What the tower's own questions cost: of patches, by kind, and of CLS before and after the last layer."""
    heads = network.heads
    normed = heads.norm(features)
    patches, cls = normed[:, :, 1:], normed[:, :, 0]
    characters, indices = (head(patches).unflatten(-1, (2, -1)) for head in (heads.character, heads.index))
    # In the base view of a tiled image most signs are too small to be read: nothing is asked of it.
    legible = torch.ones_like(labels.shape)
    if legible.shape[1] > 1:
        legible[:, 0] = 0
    losses = {}
    for name, said, target in (
        ("shape", heads.shape(patches), labels.shape),
        ("color", heads.color(patches), labels.color),
        ("character", characters, labels.character),
        ("index", indices, labels.index),
    ):
        each = F.cross_entropy(said.flatten(0, -2).float(), target.flatten(), reduction="none")
        weight = torch.where(target > 0, 1.0, 0.1)
        if name in ("character", "index"):
            weight = weight * legible.unsqueeze(-1)
        weight = weight.flatten()
        losses[name] = (each * weight).sum() / weight.sum()
    # Nothing else asks a patch where it is, and what nobody asks for is lost on the way through the tower.
    side = SIDE
    patch = torch.arange(side * side, device=features.device) if chosen is None else chosen
    patch = patch.expand(patches.shape[:3])
    losses["place"] = 0.5 * sum(
        F.cross_entropy(head(patches).flatten(0, -2).float(), where.flatten())
        for head, where in ((heads.row, patch // side), (heads.column, patch % side))
    )
    present = labels.present()
    asked = torch.ones_like(present)
    asked[..., -len(CHARACTERS) :] = legible[:, :, :1].to(asked.dtype)
    for name, head, token in (("cls", heads.present, cls), ("pooled", heads.present_pooled, pooled)):
        losses[name] = 5 * F.binary_cross_entropy_with_logits(head(token).float(), present, weight=asked)
    return losses


def _part(raw: Raw, start: int, end: int) -> Raw:
    """Some of the images of a batch."""
    of_all = ("plan", "before", "after")
    names = [field.name for field in fields(raw) if field.name not in of_all]
    return replace(raw, **{name: getattr(raw, name)[start:end] for name in names})


if __name__ == "__main__":
    tokenizer()
    sys.exit(main())

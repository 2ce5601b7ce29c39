"""Pictures of a training run: `python -m training.plots [--log training/log.jsonl]`.

Writes docs/images/training.png (losses, and exact match on held-out scenes) and docs/images/cls_attention.png (where
CLS looks in the layer before last, which is what VisionDrop keeps patches by at the encoder).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from training.batches import HELD_OUT, Plan, make_raw, prepare
from training.train import make_network
from vd_plugin.demo import MODEL_PATH

IMAGES = Path("docs/images")
NUM_SCENES = 6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.plots", description="Draw a training run.")
    parser.add_argument("--log", type=Path, default=Path("training/log.jsonl"))
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    arguments = parser.parse_args()
    entries = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    draw_curves(entries, IMAGES / "training.png")
    draw_attention(arguments.model, IMAGES / "cls_attention.png")


def draw_curves(entries: list[dict[str, Any]], path: Path) -> None:
    """Losses over time on the left; exact match on held-out scenes on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    losses = [entry for entry in entries if entry["kind"] == "train"]
    for name in ("answer", "shape", "color", "character", "cls"):
        points = [(entry["minutes"], entry[name]) for entry in losses if name in entry]
        left.plot(*zip(*points, strict=True), label=name, linewidth=1)
    left.set(xlabel="minutes", ylabel="loss", yscale="log", title="Losses")
    left.legend(frameon=False)
    exact: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        if entry["kind"] == "evaluation" and entry["what"].endswith("keep 1.0"):
            for half in ("easy", "hard"):
                exact[f"{entry['what'].removesuffix(' keep 1.0')}, {half}"].append(
                    (entry["minutes"], entry["exact"][half])
                )
    for label, points in exact.items():
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    right.set(xlabel="minutes", ylabel="exact match", ylim=(0, 1), title="Held-out scenes, unpruned")
    if exact:
        right.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def draw_attention(model: Path, path: Path) -> None:
    """Scenes above, attention of CLS in the base view below."""
    network = make_network()
    network.load_state_dict({k: v.float() for k, v in load_file(model / "model.safetensors").items()}, strict=False)
    raw = make_raw(Plan(448, 448, True, NUM_SCENES, 1.0, 1), HELD_OUT + 100, evaluation=True)
    batch, labels = prepare(raw, torch.device("cpu"), torch.float32, 0)
    side = int(labels.foreground.shape[-1] ** 0.5)
    figure, axes = plt.subplots(2, NUM_SCENES, figsize=(2 * NUM_SCENES, 4.4), layout="constrained")
    attention = network.tower.attention_of_cls(batch.pixels[:, 0])[:, 1:]
    for number in range(NUM_SCENES):
        shown = labels.foreground[number, 0]
        share = float(attention[number][shown].sum() / attention[number].sum())
        axes[0, number].imshow(raw.images[number].numpy())
        axes[1, number].imshow(attention[number].view(side, side).sqrt().numpy(), cmap="magma")
        axes[1, number].set_title(f"{share:.0%} on {float(shown.float().mean()):.0%}", fontsize=9)
        for row in (0, 1):
            axes[row, number].axis("off")
    figure.suptitle(
        "Share of CLS's attention that lies on the patches that show something, and how many these are", fontsize=10
    )
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()

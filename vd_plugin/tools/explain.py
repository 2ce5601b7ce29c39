"""`visiondrop explain IMAGE --model M --budget B --out image.png`: what every stage keeps of an image, to look at.

Runs the engine itself with observers on its selections; nothing is selected a second time. Writes an image with one
row of panels a stage (base view, tiles), and the same data as JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vd_plugin.options import engine_args
from vd_plugin.schedule import Budget, Geometry, Schedule, parse_budget, resolve
from vd_plugin.tools.provenance import Origin, encoder_origins, stage_origins, stock_origins
from vd_plugin.wire import BUDGET_KEY, ERROR_PREFIX

if TYPE_CHECKING:
    from PIL import Image

_DOMINANT = (255, 255, 255)
_CONTEXTUAL = (255, 140, 0)


@dataclass(frozen=True, slots=True)
class Explanation:
    geometry: Geometry
    schedule: Schedule
    size: tuple[int, int]
    """(height, width) of the image."""
    stages: list[list[Origin]]
    """For each stage the image's rows."""

    def to_dict(self) -> dict[str, Any]:
        def cells(rows: Sequence[Origin], contextual: bool) -> list[dict[str, Any]]:
            return [
                {"view": origin.view, "row": origin.row, "column": origin.column}
                for origin in rows
                if origin.view is not None and origin.contextual == contextual
            ]

        depths = (0, *self.geometry.boundaries)
        return {
            "size": {"height": self.size[0], "width": self.size[1]},
            "budget": self.schedule.budget,
            "visual_tokens": {
                "full": self.schedule.full,
                "kept": self.schedule.kept,
                "saved": self.schedule.saved,
                "stages": list(self.schedule.rows),
            },
            "stages": [
                {
                    "stage": stage,
                    "after_layer": depths[stage],
                    "rows": len(rows),
                    "dominant": cells(rows, contextual=False),
                    "contextual": cells(rows, contextual=True),
                    "without_place": sum(origin.view is None for origin in rows),
                }
                for stage, rows in enumerate(self.stages)
            ],
        }


def explain(model: str, image: Image.Image, budget: Budget, **overrides: Any) -> Explanation:
    """Serve one request with the image on a fresh engine in this process, and record what is kept of it.

    Raises:
        ValueError: an unknown model, or a budget that the image cannot be served with.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's model must be within reach
    from vllm import LLM, SamplingParams

    # One request of one image needs neither graphs nor a large cache.
    frugal = {"enforce_eager": True, "max_num_seqs": 1, "skip_mm_profiling": True, **overrides}
    llm = LLM(**engine_args(model, **frugal))
    tiles: list[Any] = []
    plans: dict[int, Any] = {}

    def observe(module: Any) -> Geometry:
        module.encoder_observer = tiles.append
        module.decoder.observer = lambda stage, req_id, span, scores, plan: plans.setdefault(stage, plan)
        geometry: Geometry = module.geometry
        return geometry

    (geometry,) = llm.apply_model(observe)
    schedule = resolve(geometry, image.height, image.width, budget)
    image_token = llm.get_tokenizer().decode([llm.llm_engine.model_config.hf_config.image_token_index])
    request = {
        "prompt": f"USER: {image_token}\nDescribe the image. ASSISTANT:",
        "multi_modal_data": {"image": image},
        "mm_processor_kwargs": {BUDGET_KEY: budget},
    }
    llm.generate(request, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)

    size = (image.height, image.width)
    if tiles:
        from vd_plugin.vision import image_order

        kept, anchors = tiles[0].kept, tiles[0].anchors
        side = geometry.tile_size // geometry.patch_size
        order = image_order(kept, tiles[0].tokens.shape[1], geometry.tile_grid(*size), side)
        rows = encoder_origins(geometry, *size, kept.tolist(), anchors.tolist(), order.tolist())
    else:
        rows = stock_origins(geometry, *size)
    stages = [rows]
    for stage in range(1, len(geometry.boundaries) + 1):
        stages.append(stage_origins(stages[-1], plans[stage]) if stage in plans else stages[-1])
    explanation = Explanation(geometry, schedule, size, stages)
    assert tuple(len(rows) for rows in stages) == schedule.rows, "the engine did not follow the schedule"
    return explanation


def draw(explanation: Explanation, image: Image.Image) -> Image.Image:
    """One row of panels a stage: what is kept stays bright, anchors of contextual tokens are framed in orange."""
    from PIL import Image, ImageDraw

    geometry = explanation.geometry
    tile, margin, title = geometry.tile_size, 12, 28
    views = {"base": image.convert("RGB").resize((tile, tile))}
    rows, columns = geometry.tile_grid(*explanation.size)
    if rows:
        views["tiles"] = _pad(image.convert("RGB"), rows * tile, columns * tile)
    width = sum(view.width + margin for view in views.values()) + margin
    height = max(view.height for view in views.values()) + title + margin
    sheet = Image.new("RGB", (width, height * len(explanation.stages)), "white")
    pen = ImageDraw.Draw(sheet)
    for stage, origins in enumerate(explanation.stages):
        top = stage * height
        depth = (0, *geometry.boundaries)[stage]
        where = "the encoder's output" if stage == 0 else f"after layer {depth}"
        pen.text(
            (margin, top + 8), f"stage {stage}, {where}: {len(origins)} of {explanation.schedule.full} rows", "black"
        )
        left = margin
        for name, view in views.items():
            sheet.paste(
                _panel(view, [origin for origin in origins if origin.view == name], geometry), (left, top + title)
            )
            left += view.width + margin
    return sheet


def _panel(view: Image.Image, origins: Sequence[Origin], geometry: Geometry) -> Image.Image:
    from PIL import Image, ImageDraw

    patch = geometry.patch_size
    panel = Image.blend(view, Image.new("RGB", view.size, "black"), 0.75)
    pen = ImageDraw.Draw(panel)
    for origin in origins:
        box = (origin.column * patch, origin.row * patch, (origin.column + 1) * patch, (origin.row + 1) * patch)
        panel.paste(view.crop(box), box[:2])
        outline = _CONTEXTUAL if origin.contextual else _DOMINANT
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=outline, width=2 if origin.contextual else 1)
    return panel


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image as the tiles see it: scaled to fit the grid, centred on black."""
    from PIL import Image

    scale = min(width / image.width, height / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return canvas


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="visiondrop explain", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("image", type=Path, help="an image file")
    parser.add_argument("--model", required=True, help="folder or id of a LLaVA-NeXT or LLaVA-1.5 checkpoint")
    parser.add_argument("--budget", default="medium", help="an integer from 32 up, low, medium, high or full")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write; the JSON goes beside it")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of context to reserve (default 4096)")
    arguments = parser.parse_args(argv)
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError

        requested = int(arguments.budget) if arguments.budget.isdecimal() else arguments.budget
        budget = parse_budget(requested)
        try:
            image = ImageOps.exif_transpose(Image.open(arguments.image)).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"cannot read the image {arguments.image}: {error}") from error
        explanation = explain(arguments.model, image, budget, max_model_len=arguments.max_model_len)
    except (ValueError, NotImplementedError) as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 2
    data = explanation.to_dict()
    draw(explanation, image).save(arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    tokens = data["visual_tokens"]
    print(
        f"{arguments.out}: {tokens['full']} visual tokens in full, {tokens['kept']} kept a layer "
        f"({' > '.join(map(str, tokens['stages']))} rows by stage), {tokens['saved']} saved"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

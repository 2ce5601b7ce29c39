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
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from vd_plugin.engine import be_modest
from vd_plugin.options import engine_args
from vd_plugin.schedule import Budget, Geometry, Schedule, parse_budget, resolve
from vd_plugin.tools.provenance import Origin, encoder_origins, stage_origins, stock_origins
from vd_plugin.wire import BUDGET_KEY, ERROR_PREFIX

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_Color: TypeAlias = tuple[int, int, int]

_DOMINANT: Final = (255, 255, 255)
_CONTEXTUAL: Final = (255, 140, 0)
_DARK: Final = (0, 0, 0)
_BRIGHT: Final = (170, 170, 170)
_GREY: Final = (90, 90, 90)

_LEGEND: Final[tuple[tuple[str, str, _Color | None], ...]] = (
    ("dominant", "a token that is kept as it is", _DOMINANT),
    ("contextual", "a token into which others like it are merged", _CONTEXTUAL),
    ("dark", "tokens that are merged into contextual ones, or dropped", None),
)
"""What a patch's frame means: its name, a sentence, the frame."""

_FRUGAL: Final = (
    *("--max-model-len", "4096", "--max-num-seqs", "1"),
    *("--enforce-eager", "--skip-mm-profiling", "--disable-log-stats"),
)
"""One request of one image needs neither graphs nor a large cache."""


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


class Explainer:
    """A fresh engine in this process, which records what it keeps of images.

    Args:
        options: of the engine, as vLLM's command line takes them; they win over ours.

    Raises:
        ValueError: an unknown model or option.
    """

    def __init__(self, model: str, options: Sequence[str] = ()) -> None:
        engine_args(model)  # an unknown model must not cost the ten seconds that vLLM takes to import
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's model must be within reach
        from vllm import LLM

        self._llm = LLM(**_read_options(model, options))
        self._tiles: list[Any] = []
        self._plans: dict[int, Any] = {}
        self._geometry: Geometry
        (self._geometry,) = self._llm.apply_model(self._observe)

    def explain(self, image: Image.Image, budget: Budget) -> Explanation:
        """Serve one request with the image.

        Raises:
            ValueError: a budget that the image cannot be served with.
        """
        from vllm import SamplingParams

        self._tiles.clear()
        self._plans.clear()
        llm, geometry, size = self._llm, self._geometry, (image.height, image.width)
        schedule = resolve(geometry, *size, budget)
        image_token = llm.get_tokenizer().decode([llm.llm_engine.model_config.hf_config.image_token_index])
        request = {
            "prompt": f"USER: {image_token}\nDescribe the image. ASSISTANT:",
            "multi_modal_data": {"image": image},
            "mm_processor_kwargs": {BUDGET_KEY: budget},
        }
        llm.generate(request, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)

        if self._tiles:
            from vd_plugin.vision import image_order

            tiles = self._tiles[0]
            side = geometry.tile_size // geometry.patch_size
            order = image_order(tiles.kept, tiles.tokens.shape[1], geometry.tile_grid(*size), side)
            rows = encoder_origins(geometry, *size, tiles.kept.tolist(), tiles.anchors.tolist(), order.tolist())
        else:
            rows = stock_origins(geometry, *size)
        stages = [rows]
        for stage in range(1, len(geometry.boundaries) + 1):
            plan = self._plans.get(stage)
            stages.append(stages[-1] if plan is None else stage_origins(stages[-1], plan))
        explanation = Explanation(geometry, schedule, size, stages)
        assert tuple(len(rows) for rows in stages) == schedule.rows, "the engine did not follow the schedule"
        return explanation

    def _observe(self, module: Any) -> Geometry:
        module.encoder_observer = self._tiles.append
        module.decoder.observer = lambda stage, req_id, span, scores, plan: self._plans.setdefault(stage, plan)
        geometry: Geometry = module.geometry
        return geometry


def explain(model: str, image: Image.Image, budget: Budget, options: Sequence[str] = ()) -> Explanation:
    """What an engine keeps of one image.

    Raises:
        ValueError: an unknown model or option, or a budget that the image cannot be served with.
    """
    return Explainer(model, options).explain(image, budget)


def draw(explanation: Explanation, image: Image.Image) -> Image.Image:
    """One row of panels a stage under a legend: what is kept stays bright, the rest is dark."""
    from PIL import Image, ImageDraw, ImageFont

    geometry = explanation.geometry
    tile, margin = geometry.tile_size, 16
    letter = max(16, tile // 16)
    font, line = ImageFont.load_default(letter), letter * 3 // 2
    views = {"base": image.convert("RGB").resize((tile, tile))}
    rows, columns = geometry.tile_grid(*explanation.size)
    if rows:
        views["tiles"] = _pad(image.convert("RGB"), rows * tile, columns * tile)
    names = {"base": "the whole image", "tiles": f"its tiles, {rows} x {columns}"}

    header = [_title(explanation), *(f"{name}: {text}" for name, text, _ in _LEGEND)]
    captions = [_caption(explanation, stage) for stage in range(len(explanation.stages))]
    indents = [0] + [line] * len(_LEGEND) + [0] * len(captions)
    texts = max(indent + font.getlength(text) for indent, text in zip(indents, [*header, *captions], strict=True))
    panels = sum(max(view.width, font.getlength(names[name])) + margin for name, view in views.items()) - margin
    row_height = 2 * line + max(view.height for view in views.values()) + margin
    top = margin + line * len(header) + margin
    width = int(max(texts, panels)) + 2 * margin
    sheet = Image.new("RGB", (width, top + row_height * len(captions)), "white")
    pen = ImageDraw.Draw(sheet)

    pen.text((margin, margin), header[0], "black", font)
    for number, (text, (_, _, outline)) in enumerate(zip(header[1:], _LEGEND, strict=True), 1):
        y = margin + number * line
        pen.rectangle((margin, y, margin + letter, y + letter), _DARK)
        if outline is not None:
            _draw_frame(pen, (margin + 3, y + 3, margin + letter - 2, y + letter - 2), outline, fill=_BRIGHT)
        pen.text((margin + line, y), text, "black", font)
    for stage, (caption, origins) in enumerate(zip(captions, explanation.stages, strict=True)):
        y = top + stage * row_height
        pen.text((margin, y), caption, "black", font)
        x = margin
        for name, view in views.items():
            pen.text((x, y + line), names[name], _GREY, font)
            panel = _panel(view, [origin for origin in origins if origin.view == name], geometry)
            sheet.paste(panel, (x, y + 2 * line))
            x += int(max(view.width, font.getlength(names[name]))) + margin
    return sheet


def _title(explanation: Explanation) -> str:
    schedule = explanation.schedule
    return (
        f"budget {schedule.budget}: {schedule.full:,} visual tokens in full, {schedule.kept:,} kept a layer, "
        f"{schedule.saved:,} saved"
    )


def _caption(explanation: Explanation, stage: int) -> str:
    origins = explanation.stages[stage]
    depths = (0, *explanation.geometry.boundaries)
    where = "from the encoder" if stage == 0 else f"after layer {depths[stage]}"
    places = [origin for origin in origins if origin.view is not None]
    num_contextual = sum(origin.contextual for origin in places)
    parts = [f"{len(places) - num_contextual:,} dominant", f"{num_contextual:,} contextual"]
    if num_others := len(origins) - len(places):
        parts.append(f"{num_others:,} without a place: CLS, line ends")
    return f"{where}: {len(origins):,} tokens ({', '.join(parts)})"


def _draw_frame(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], outline: _Color, fill: _Color | None = None
) -> None:
    width = 2 if outline == _CONTEXTUAL else 1
    pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill, outline, width)


def _panel(view: Image.Image, origins: Sequence[Origin], geometry: Geometry) -> Image.Image:
    from PIL import Image, ImageDraw

    patch = geometry.patch_size
    panel = Image.blend(view, Image.new("RGB", view.size, _DARK), 0.75)
    pen = ImageDraw.Draw(panel)
    for origin in origins:
        box = (origin.column * patch, origin.row * patch, (origin.column + 1) * patch, (origin.row + 1) * patch)
        panel.paste(view.crop(box), box[:2])
        _draw_frame(pen, box, _CONTEXTUAL if origin.contextual else _DOMINANT)
    return panel


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image as the tiles see it: scaled to fit the grid, centred on black."""
    from PIL import Image

    scale = min(width / image.width, height / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return canvas


def _read_options(model: str, options: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM`.

    Raises:
        ValueError: an option that vLLM does not know.
    """
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def fail(message: str) -> NoReturn:
        raise ValueError(f"engine options: {message}")

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="visiondrop explain"))
    parser.error = fail
    options = [*_FRUGAL, *options]
    if current_platform.is_cpu():
        options = be_modest(options)
    given = vars(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options])))
    return engine_args(**given)


def check_out(path: Path) -> None:
    """Make sure, before an engine is started, that the results can be written; makes the folder.

    Raises:
        ValueError: they cannot.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must name a file that ends in .png; got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for existing in filter(Path.exists, (path, path.with_suffix(".json"))):
            existing.open("ab").close()
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"--out cannot be written: {error}") from None


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    place = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="visiondrop explain",
        usage="%(prog)s IMAGE --model MODEL --out PNG [--budget BUDGET] [-- ENGINE OPTIONS]",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="What follows -- goes to vLLM as it is, for example: -- --dtype bfloat16 --gpu-memory-utilization 0.5.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument("--model", required=True, help="folder or id of a LLaVA-NeXT or LLaVA-1.5 checkpoint")
    parser.add_argument("--budget", default="medium", help="an integer from 32 up, low, medium, high or full")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PNG", help="file to write; the data go beside it, as JSON"
    )
    options, engine_options = parser.parse_args(arguments[:place]), arguments[place + 1 :]
    if any(option.partition("=")[0] == "--model" for option in engine_options):
        parser.error("the model is named before the --")
    try:
        budget = parse_budget(int(options.budget) if options.budget.isdecimal() else options.budget)
        image = _read_image(options.image)
        check_out(options.out)
        explanation = explain(options.model, image, budget, engine_options)
    except (ValueError, NotImplementedError) as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 2
    data = explanation.to_dict()
    draw(explanation, image).save(options.out)
    options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    tokens = data["visual_tokens"]
    print(
        f"{options.out}: {tokens['full']} visual tokens in full, {tokens['kept']} kept a layer "
        f"({' > '.join(map(str, tokens['stages']))} rows by stage), {tokens['saved']} saved"
    )
    return 0


def _read_image(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())

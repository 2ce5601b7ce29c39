"""A tiny LLaVA-1.5, for where the golden vectors are absent: the random checkpoint without what makes it LLaVA-NeXT.

Tower, projector, decoder and tokenizer are the random one's; tiles, grid pinpoints and the newline are gone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def derive(random_model: Path, folder: Path) -> Path:
    """Write the LLaVA-1.5 that belongs to the random checkpoint `random_model` into the new folder `folder`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(random_model, folder)
    config = _read(folder / "config.json")
    for key in ("image_grid_pinpoints", "use_image_newline_parameter"):
        del config[key]
    config.update(architectures=["LlavaForConditionalGeneration"], model_type="llava")
    _write(folder / "config.json", config)

    preprocessor = _read(folder / "preprocessor_config.json")
    for key in ("image_grid_pinpoints", "do_pad"):
        del preprocessor[key]
    preprocessor.update(image_processor_type="CLIPImageProcessor", processor_class="LlavaProcessor")
    _write(folder / "preprocessor_config.json", preprocessor)
    processor = _read(folder / "processor_config.json")
    _write(folder / "processor_config.json", {**processor, "processor_class": "LlavaProcessor"})

    tensors = load_file(folder / "model.safetensors")
    del tensors["image_newline"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")

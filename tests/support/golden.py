"""Golden vectors of the authors' release: they lie beside the repository, in ../shared/golden, or are absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3] / "shared" / "golden"

requires_golden = pytest.mark.skipif(not ROOT.is_dir(), reason=f"golden vectors are not at {ROOT}")

TWO_IMAGES = "p4_quirk_two_images"
"""The release prunes only the first image inside the LLM."""
BASE_VIEW = "p3_base_view_only"
"""A single view of a LLaVA-NeXT: Hugging Face's processor always adds tiles."""


@dataclass(frozen=True)
class Case:
    name: str
    info: dict[str, Any]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        split = self.info["model_dir"].split("/")[0]
        with np.load(ROOT / split / f"{self.name}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __str__(self) -> str:
        return self.name

    @property
    def model_dir(self) -> Path:
        return ROOT / self.info["model_dir"]

    @property
    def has_image(self) -> bool:
        return self.info["kind"] != "text"

    @property
    def encoder(self) -> tuple[int, int]:
        return self.info["dominant"], self.info["contextual"]

    @property
    def decoder(self) -> list[tuple[int, int]]:
        return [(dominant, contextual) for dominant, contextual in self.info["stages"]]

    @property
    def boundaries(self) -> list[int]:
        return list(self.info["layer_list"])

    @property
    def prompt(self) -> str:
        return str(self.info["prompt_text"])

    def is_named(self, *endings: str) -> bool:
        return self.name.endswith(endings)


def cases() -> list[Case]:
    """All public cases, each read when first used; none where the folder is absent."""
    found: list[Case] = []
    for index in sorted(ROOT.glob("*/index.json")):
        found += [Case(name, info) for name, info in json.loads(index.read_text()).items()]
    return found


def image_cases() -> list[Case]:
    return [case for case in cases() if case.has_image]

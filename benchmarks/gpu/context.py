"""What a step is to work on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Context:
    step: str
    model: str
    """Folder or id of a checkpoint."""
    folder: Path
    """Of the run: for everything that is written."""
    num_gpus: int

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.step}.{ending}"

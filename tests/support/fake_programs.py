"""Programs that a test makes up."""

from __future__ import annotations

from pathlib import Path


def put(folder: Path, name: str, script: str) -> None:
    """Make a program of a shell script."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)

"""The Dockerfile as data: its stages, and what each sets."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[2] / "Dockerfile"


@dataclass(slots=True)
class Stage:
    """One stage. Instructions that may stand once only (USER, ENTRYPOINT ...) hold their last value."""

    base: str
    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    copies: list[list[str]] = field(default_factory=list)
    """Sources and target of each COPY from the build context."""
    runs: list[str] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def stages() -> dict[str, Stage]:
    """The stages by name, in order. Understands what this Dockerfile uses, no more."""
    text = re.sub(r"^\s*#.*\n", "", PATH.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found: dict[str, Stage] = {}
    defaults: dict[str, str] = {}
    stage: Stage | None = None
    for line in filter(None, lines):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            for variable, value in defaults.items():
                base = base.replace(f"${{{variable}}}", value)
            stage = found[name] = Stage(base)
        elif stage is None:
            assert word == "ARG", line
            variable, _, value = rest.partition("=")
            defaults[variable] = value
        elif word in ("ENV", "LABEL"):
            into = stage.env if word == "ENV" else stage.labels
            into.update(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "COPY":
            if "--from=" not in rest:
                stage.copies.append(rest.split())
        elif word == "RUN":
            stage.runs.append(rest)
        elif word == "HEALTHCHECK":
            stage.last[word] = json.loads(rest.partition("CMD ")[2])
        elif word in ("CMD", "ENTRYPOINT"):
            stage.last[word] = json.loads(rest)
        else:
            stage.last[word] = rest
    return found

"""A unit file as systemd reads it, as far as ours need: settings, specifiers, and the words of a command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


class Unit:
    """`specifiers` are what systemd puts for %t, %i and so on.

    Settings that may stand several times add up, except that a word for environment is replaced by a later one.
    """

    def __init__(self, path: Path, **specifiers: str) -> None:
        self._specifiers = specifiers
        self._settings: list[tuple[str, str]] = []
        for line in path.read_text().replace("\\\n", "").splitlines():
            if line and line[0] not in "#;[":
                name, _, value = line.partition("=")
                self._settings.append((name, re.sub("%([a-zA-Z])", lambda found: specifiers[found[1]], value)))

    def all(self, name: str) -> list[str]:
        return [value for known, value in self._settings if known == name]

    def get(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    def environment(self, *files: Path) -> dict[str, str]:
        """What `Environment=` sets, then what the files do."""
        words = [word for line in self.all("Environment") for word in shlex.split(line)]
        return dict(word.split("=", 1) for word in words) | dict(pair for file in files for pair in read_file(file))

    def command(self, environment: dict[str, str]) -> list[str]:
        """ExecStart: ${NAME} is one word or part of one, $NAME alone is as many as it has."""
        found: list[str] = []
        for word in self.get("ExecStart").split():
            if re.fullmatch(r"\$\w+", word):
                found += shlex.split(environment[word[1:]])
            else:
                found.append(re.sub(r"\$\{(\w+)\}", lambda name: environment[name[1]], word))
        return found


def read_file(path: Path) -> list[tuple[str, str]]:
    """The variables of an EnvironmentFile."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#;"]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def read_example(path: Path) -> dict[str, str]:
    """The variables of an example, all of which are commented out. A sentence is told by its space after the mark."""
    pairs = [re.fullmatch(r"#([A-Z_]+)=(.*)", line) for line in path.read_text().splitlines()]
    return {pair[1]: pair[2] for pair in pairs if pair}

"""The part of the lock that a set of extras needs, for images: `python deploy/closure.py LOCK [EXTRA ...]`.

Prints the lock's lines. Run in an environment that was made from the lock, since it reads what installed packages
require. Packages that the lock leaves out are left out here, too.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_LEFT_OUT = "# Left out: "


def subset(lock: str, project: Mapping[str, object], extras: Iterable[str]) -> list[str]:
    """The lines of a lock that a project with these extras needs, in the lock's order.

    Args:
        project: the table `project` of its pyproject.toml.

    Raises:
        ValueError: a required package is neither pinned nor left out on purpose.
    """
    lines = lock.splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if re.match(r"[\w.-]+==", line)}
    left_out = {name for line in lines if line.startswith(_LEFT_OUT) for name in line.removeprefix(_LEFT_OUT).split()}
    groups = project["optional-dependencies"]
    assert isinstance(groups, Mapping)
    waiting = [
        Requirement(text) for part in (project["dependencies"], *(groups[extra] for extra in extras)) for text in part
    ]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen or name in left_out:
            continue
        if name not in pins:
            raise ValueError(f"{name} is required but not in the lock; run: make lock")
        seen.add((name, wanted))
        needed = map(Requirement, requires(name) or ())
        waiting += [each for each in needed if each.marker is None or _applies(each, wanted)]
    names = {name for name, _ in seen}
    return [line for name, line in pins.items() if name in names]


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    assert requirement.marker is not None
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


if __name__ == "__main__":
    path, *names = sys.argv[1:]
    table = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    print(f"# What visiondrop[{','.join(names)}] needs of {path}. Written by make lock; installed with --no-deps.")
    print(*subset(Path(path).read_text(), table, names), sep="\n")

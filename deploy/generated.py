"""Files that code makes and that are committed: write them, or check that they are what the code makes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write_or_check(
    files: Mapping[Path, str], arguments: Sequence[str], advice: str, strangers: Iterable[Path] = ()
) -> int:
    """Write the files and print their paths; with the argument `--check`, print those that differ instead.

    Args:
        advice: the end of a sentence about a file that differs.
        strangers: files that the code does not make and that should not be there.

    Returns:
        The exit status: 1 if a file differs.
    """
    if arguments == ["--check"]:
        stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
        stale += strangers
        for path in stale:
            print(f"{path} {advice}", file=sys.stderr)
        return 1 if stale else 0
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path)
    return 0

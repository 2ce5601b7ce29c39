"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """Version of the distribution `visiondrop`, or "unknown" when the code runs from a folder that is not installed."""
    try:
        return metadata.version("visiondrop")
    except metadata.PackageNotFoundError:
        return "unknown"

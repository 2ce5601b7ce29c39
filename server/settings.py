"""The gateway's settings, parsed once. Each can be given as an environment variable VISIONDROP_<NAME>."""

from __future__ import annotations

import os
from typing import Any, Final

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from vd_plugin.schedule import PRESETS, Budget, parse_budget

_MIB: Final = 1024 * 1024


class Settings(BaseSettings):
    """Limits and defaults. Sizes in bytes and pixels, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="VISIONDROP_", extra="forbid", frozen=True)

    default_budget: Budget = PRESETS["high"]
    """Visual token budget of requests that name none: an integer or a preset."""

    max_body_bytes: int = Field(64 * _MIB, gt=0)
    max_images_per_request: int = Field(16, gt=0)
    max_image_bytes: int = Field(20 * _MIB, gt=0)
    # Pillow's own guard against decompression bombs warns above the upper bound.
    max_image_pixels: int = Field(50_000_000, gt=0, le=89_478_485)
    max_image_aspect_ratio: float = Field(100.0, ge=1)
    """Longer side over shorter. Image processors that scale the shorter side up explode beyond it."""
    image_threads: int = Field(min(4, os.cpu_count() or 1), gt=0)
    """Pictures decoded at a time; each may need several times `max_image_pixels` bytes."""

    engine_start_timeout_seconds: float = Field(1800.0, gt=0)
    shutdown_seconds: float = Field(3.0, ge=0)
    """What requests in flight get to finish when the gateway is told to stop."""

    @field_validator("default_budget", mode="before")
    @classmethod
    def _parse_default_budget(cls, value: Any) -> Budget:
        # Environment and command line know only strings.
        return parse_budget(int(value) if isinstance(value, str) and value.isdecimal() else value)

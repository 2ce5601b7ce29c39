"""The gateway's settings, parsed once. Each can be given as an environment variable VISIONDROP_<NAME>."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vd_plugin.schedule import FULL, PRESETS, Budget, parse_budget

_MIB: Final = 1024 * 1024

_ORIGIN: Final = re.compile(r"(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")
"""As browsers write it. Apps and extensions have schemes of their own."""

OTHER_VARIABLES: Final = frozenset({"VISIONDROP_BACKEND", "VISIONDROP_BUILD_OPTIONS", "VISIONDROP_CPU"})
"""Those that other programs of the project read: setup.sh, images.sh, and the plugin (cpu/bootstrap.py)."""


def usable_bytes(limit_bytes: int) -> int:
    """Of `max_buffered_bytes`, what requests may hold together that are not small: all but a sixteenth."""
    return limit_bytes - limit_bytes // 16


class Settings(BaseSettings):
    """Limits and defaults. Sizes in bytes and pixels, times in seconds, costs in tokens."""

    model_config = SettingsConfigDict(env_prefix="VISIONDROP_", extra="forbid", frozen=True)

    # Budgets

    default_budget: Budget = PRESETS["high"]
    """Visual token budget of images for which none is requested: an integer or a preset."""
    max_budget: Budget = FULL
    """Larger budgets are capped to it."""

    # Requests

    max_body_bytes: int = Field(64 * _MIB, gt=0)
    max_buffered_bytes: int = Field(1024 * _MIB, gt=0)
    """Bodies and fetched images that all requests together may hold in memory; above it requests are rejected."""
    max_connections: int = Field(4096, gt=0)
    """Open connections; more are closed at once."""
    header_seconds: float = Field(10.0, gt=0)
    """From a connection's first moment to the end of the request's headers."""
    body_seconds: float = Field(60.0, gt=0)
    """From the end of the headers to the end of the body."""
    min_upload_bytes_per_second: int = Field(4096, ge=0)
    """At which a body must keep coming; 0 for any."""
    send_seconds: float = Field(60.0, gt=0)
    """How long a client may refuse to take bytes of an answer before its connection is closed."""

    # Images

    max_images_per_request: int = Field(16, gt=0)
    max_image_bytes: int = Field(20 * _MIB, gt=0)
    # Pillow's own guard against decompression bombs warns above the upper bound.
    max_image_pixels: int = Field(50_000_000, gt=0, le=89_478_485)
    max_image_aspect_ratio: float = Field(100.0, ge=1)
    """Longer side over shorter. Image processors that scale the shorter side up explode beyond it."""
    image_threads: int = Field(min(4, os.cpu_count() or 1), gt=0)
    """Images decoded at a time; each may need several times `max_image_pixels` bytes."""

    fetch_images: bool = True
    """Whether `https:` URLs of images are fetched at all."""
    fetch_http: bool = False
    """Whether `http:` URLs are, too."""
    fetch_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that images may come from, comma-separated; `*.example.com` is its subdomains. Empty: any public host."""
    fetch_seconds: float = Field(10.0, gt=0)
    """For one image, redirects included."""
    fetch_redirects: int = Field(3, ge=0)
    fetch_concurrency: int = Field(32, gt=0)
    """Images fetched at a time, by all requests together."""

    # Keys and rates

    api_key: SecretStr | None = None
    """One key, for a start. More, with limits of their own: `api_keys_file`."""
    api_keys_file: Path | None = None
    """A TOML file of keys; see docs/keys.md."""
    requests_per_minute: int | None = Field(None, gt=0)
    """For every key that has no rate of its own, or for everybody together where there are no keys."""
    images_per_minute: int | None = Field(None, gt=0)

    # Browsers

    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose pages may use the server, comma-separated: https://HOST or http://HOST:PORT; `*` for all."""

    # Admission

    max_inflight_tokens: int = Field(131_072, gt=0)
    """Cost (text + kept visual tokens) of the requests that one engine works on at a time; more wait in the queue."""
    max_queued_requests: int = Field(256, ge=0)
    queue_seconds: float = Field(30.0, gt=0)
    """How long a request may wait in the queue."""

    # Engines

    engines: Annotated[tuple[str, ...], NoDecode] = ()
    """Where the engines of `visiondrop gateway` are, comma-separated: http://HOST:PORT or unix:/PATH."""
    engine_start_timeout_seconds: float = Field(1800.0, gt=0)
    engine_probe_seconds: float = Field(2.0, gt=0)
    """Between two probes of an engine."""
    engine_stall_seconds: float = Field(15.0, gt=0)
    """An engine that has shown no sign of progress for so long is not ready."""

    # Operation

    shutdown_seconds: float = Field(30.0, ge=0)
    """What requests in flight get to finish when the gateway is stopped."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """A port for `/metrics` alone; without one it is on the main port, behind the keys where there are any."""
    metrics_host: str = "127.0.0.1"
    key_metrics: bool = False
    """Whether every API key has metrics of its own, under its name."""
    tracing: bool = False
    """Whether to send OpenTelemetry traces; the OTEL_* variables set the destination."""

    @field_validator("default_budget", "max_budget", mode="before")
    @classmethod
    def _parse_budget(cls, value: Any) -> Budget:
        # Environment and command line know only strings.
        return parse_budget(int(value) if isinstance(value, str) and value.isdecimal() else value)

    @model_validator(mode="after")
    def _check_room(self) -> Settings:
        if usable_bytes(self.max_buffered_bytes) < self.max_body_bytes + self.max_image_bytes:
            raise ValueError(
                "max_buffered_bytes must be at least 16/15 of max_body_bytes + max_image_bytes (a sixteenth is for "
                "small bodies), else a request within its limits could never be served"
            )
        return self

    @field_validator("engines", "fetch_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("fetch_hosts")
    @classmethod
    def _lower_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(host.lower() for host in value)

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    "an origin is https://HOST or http://HOST:PORT, in lower case, without a path and without the port "
                    f"that its scheme has anyway, or * for all; got {origin!r}"
                )
        return value

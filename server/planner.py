"""The pictures of a request: their budgets chosen, their files taken, their schedules resolved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from starlette.requests import Request

from server import budget
from server.access import key_of
from server.engine_pool import EnginePool
from server.images import CheckedImage
from server.intake import lease_of
from server.pictures import PictureLoader
from server.rate_limits import RateLimits
from server.recording import record_of
from server.schemas import ImagePart
from server.settings import Settings
from vd_plugin.schedule import Budget


class Pictured(Protocol):
    """A request that may have pictures, whatever its route."""

    @property
    def visual_token_budget(self) -> Budget | None: ...

    def image_parts(self) -> Iterator[tuple[str, ImagePart]]:
        """Every picture in order of appearance, with the path of its URL in the request."""


class Planner:
    """Fills a record's `geometry` and `schedules`."""

    def __init__(self, settings: Settings, engines: EnginePool, loader: PictureLoader, rates: RateLimits) -> None:
        self._settings = settings
        self._engines = engines
        self._loader = loader
        self._rates = rates

    async def plan(self, request: Request, asked: Pictured) -> list[CheckedImage]:
        """Take the pictures of a request and resolve their budgets; what can be refused without them is refused first.

        Raises:
            GatewayError: a budget, a picture or the number of pictures is not served.
        """
        key, record = key_of(request), record_of(request)
        parts = [(param, part.image_url) for param, part in asked.image_parts()]
        choices = budget.choose_budgets(
            [(param.rpartition(".")[0], image_url) for param, image_url in parts],
            asked.visual_token_budget,
            budget.header_budget(request.headers),
            self._settings.default_budget,
            budget.lower(key.max_budget, self._settings.max_budget),
        )
        if not parts:
            return []
        self._loader.check_number(len(parts), parts[0][0])
        self._rates.take_images(key, len(parts))
        record.geometry = await self._engines.geometry()
        urls = [(param, image_url.url) for param, image_url in parts]
        images = await self._loader.load(urls, record, lease_of(request))
        record.schedules = budget.plan_images(record.geometry, images, choices)
        return images

"""The images of a request: their budgets chosen, their files loaded, their schedules resolved."""

from __future__ import annotations

from server.admission.rates import RateLimits
from server.budget import cap, choose_budgets, plan_images
from server.context import RequestContext
from server.engine.pool import EnginePool
from server.errors import InvalidRequestError
from server.images.load import ImageLoader
from server.schemas.generation import GenerationRequest
from server.settings import Settings
from vd_plugin.schedule import Budget


class Planner:
    """Fills a record's `max_model_len`, `geometry`, `image_sizes` and `schedules`."""

    def __init__(self, settings: Settings, engines: EnginePool, loader: ImageLoader, rates: RateLimits) -> None:
        self._settings = settings
        self._engines = engines
        self._loader = loader
        self._rates = rates

    async def plan(self, context: RequestContext, body: GenerationRequest, header: Budget | None) -> list[str]:
        """Load the images of a request and resolve their budgets; what can be refused without them is refused first.

        Args:
            header: the budget in the request's headers.

        Returns:
            A data URL for each image, for the engine.

        Raises:
            GatewayError: a budget, an image or the number of images is not served, or all of it is too long.
        """
        record, images = context.record, body.images()
        maximum = cap(context.key.max_budget, self._settings.max_budget)
        choices = choose_budgets(images, body.shared_budget(), header, self._settings.default_budget, maximum)
        context_length = await self._engines.context_length()
        if context_length is not None:
            record.max_model_len = context_length.max_model_len
            context_length.check(body)
        if not images:
            return []
        param, limit = body.text_fields[0], self._settings.max_images_per_request
        if len(images) > limit:
            raise InvalidRequestError(
                f"the request has {len(images)} images; at most {limit} are accepted",
                param=param,
                code="too_many_images",
            )
        self._rates.take_images(context.key, len(images), param)
        record.geometry = await self._engines.geometry()
        loaded = await self._loader.load(images, record, context.lease, context.party)
        record.image_sizes = tuple((image.height, image.width) for image in loaded)
        record.schedules = plan_images(record.geometry, record.image_sizes, choices)
        if context_length is not None:
            context_length.check(body, record.num_placeholders)
        return [image.url for image in loaded]

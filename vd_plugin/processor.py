"""From a request's `mm_processor_kwargs` to the number of placeholders of every image.

Two keys are ours, each either one value for all images or a list with one entry an image:

* `visual_token_budget`: an integer, a preset or "full";
* `visual_token_schedule`: rows as [dominant, contextual] pairs (see `schedule.resolve_explicit`).

No other argument of the image processor passes, unless the engine's options allow it (`allow_processor_kwargs`), and
what the image processor returns is checked here, in the front end: in the engine core, a tensor of another shape ends
the engine for all, and NaN spreads to other requests.

Notable: vLLM keeps processed images, encoder outputs and KV blocks under one identifier an image. It is made here from
the image and from its own schedule alone, so an image never meets the entry of another schedule, and a change of its
neighbour's budget costs no cache hit. Images served in full share the stock model's entries.

Upstream: `vllm/multimodal/processing/processor.py`, `vllm/model_executor/models/llava_next.py` (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalHashes, MultiModalInput
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import InputProcessingContext, ProcessorInputs, PromptReplacement, PromptUpdate
from vllm.multimodal.processing.context import TimingContext

from vd_plugin import request_checks
from vd_plugin.options import PluginOptions, read_geometry, read_options
from vd_plugin.schedule import (
    FULL,
    Budget,
    BudgetError,
    Geometry,
    Schedule,
    parse_budget,
    quote,
    resolve,
    resolve_explicit,
)
from vd_plugin.spans import identify
from vd_plugin.wire import BUDGET_KEY

SCHEDULE_KEY: Final = "visual_token_schedule"
_REQUESTED_KEY: Final = "visiondrop_requested"
"""Internal: what each image of the request asks for, parsed. Replaces the two public keys."""
_PUBLIC_KEYS: Final = frozenset((BUDGET_KEY, SCHEDULE_KEY))
_KEYS: Final = _PUBLIC_KEYS | {_REQUESTED_KEY}

Requested: TypeAlias = Budget | tuple[tuple[int, ...], ...]
"""What one image asks for: a budget, or explicit rows."""


def parse_requested(mm_kwargs: Mapping[str, object], num_images: int) -> list[Requested]:
    """What is requested for each image of a request; an image without a request is served in full.

    Raises:
        VLLMValidationError: a value is not understood, both keys are given, or a list is not as long as the images.
    """
    budget, schedule = mm_kwargs.get(BUDGET_KEY), mm_kwargs.get(SCHEDULE_KEY)
    if budget is not None and schedule is not None:
        raise VLLMValidationError(f"give {BUDGET_KEY} or {SCHEDULE_KEY}, not both", parameter=BUDGET_KEY)
    if schedule is not None:
        # A list of pairs is one schedule for all images; a list of lists of pairs has one for each.
        if not (isinstance(schedule, list | tuple) and any(map(_holds_lists, schedule))):
            return [_freeze(schedule)] * num_images
        return [_freeze(entry) for entry in _one_per_image(SCHEDULE_KEY, schedule, num_images)]
    if budget is None:
        return [FULL] * num_images
    try:
        # Parsed without images, too: what is not understood must not pass because nothing uses it.
        if not _is_list(budget):
            return [parse_budget(budget)] * num_images
        return [parse_budget(entry) for entry in _one_per_image(BUDGET_KEY, budget, num_images)]
    except BudgetError as error:
        raise VLLMValidationError(str(error), parameter=BUDGET_KEY) from error


def check_kwargs(mm_kwargs: object, options: PluginOptions) -> None:
    """Refuse arguments of the image processor that a request may not set.

    Raises:
        VLLMValidationError: there are others than ours and those that the operator allows, or no mapping at all.
    """
    if not isinstance(mm_kwargs, Mapping):
        raise VLLMValidationError("mm_processor_kwargs must be an object", parameter="mm_processor_kwargs")
    others = [key for key in mm_kwargs if key not in _PUBLIC_KEYS | options.allow_processor_kwargs]
    if others:
        raise VLLMValidationError(
            f"mm_processor_kwargs may set {BUDGET_KEY} or {SCHEDULE_KEY}; this engine does not allow {quote(others)} "
            "(its option visiondrop.allow_processor_kwargs lists what else a request may set)",
            parameter="mm_processor_kwargs",
        )


class BudgetContext(InputProcessingContext):
    """Keeps our keys, whether of the request or the engine's default, away from Hugging Face's processor."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **options: Any) -> dict[str, Any]:
        merged = super().get_merged_mm_kwargs(kwargs, **options)
        return {key: value for key, value in merged.items() if key not in _KEYS}


class _BudgetInfo:
    """Mixin for a LLaVA `ProcessingInfo`.

    `get_num_image_tokens` stays the stock count: vLLM finds the largest image with it and bounds the encoder's batch.
    """

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(BudgetContext(ctx.model_config, ctx.tokenizer))  # type: ignore[call-arg]
        request_checks.install()

    @cached_property
    def geometry(self) -> Geometry:
        return read_geometry(self.get_hf_config())  # type: ignore[attr-defined]

    @cached_property
    def options(self) -> PluginOptions:
        return read_options(self.get_hf_config())  # type: ignore[attr-defined]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.geometry.max_full_tokens()}


class LlavaNextBudgetInfo(_BudgetInfo, LlavaNextProcessingInfo):
    pass


class LlavaBudgetInfo(_BudgetInfo, LlavaProcessingInfo):
    pass


class _BudgetProcessor:
    """Mixin for a LLaVA multimodal processor. Methods are in the order in which a request meets them."""

    info: Any

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Parse what is requested once, before anything is hashed or processed."""
        kwargs = inputs.hf_processor_mm_kwargs
        check_kwargs(kwargs, self.info.options)
        # A request's value replaces the engine's default (`--mm-processor-kwargs`) as a whole.
        defaults = self.info.ctx.get_mm_config().mm_processor_kwargs or {}
        given = kwargs if any(kwargs.get(key) is not None for key in (BUDGET_KEY, SCHEDULE_KEY)) else defaults
        num_images = inputs.mm_data_items.get_all_counts().get("image", 0)
        requested = parse_requested(given, num_images)
        self._check_places(inputs.prompt, num_images)
        self._check_images(inputs)
        inputs = replace(inputs, hf_processor_mm_kwargs={**_without_ours(kwargs), _REQUESTED_KEY: requested})
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        stock = replace(inputs, hf_processor_mm_kwargs=_without_ours(inputs.hf_processor_mm_kwargs))
        hashes = super()._get_mm_hashes(stock)  # type: ignore[misc]
        requested = inputs.hf_processor_mm_kwargs[_REQUESTED_KEY]
        assert isinstance(requested, list)
        if not requested:
            return hashes
        images = inputs.mm_data_items.get_items("image", ImageProcessorItems)
        try:
            identifiers = [
                # In full, an image may stand for one sent earlier (a client's uuid): its size is not known then.
                identify(base, None if entry == FULL else self._resolve_image(images, index, entry))
                for index, (base, entry) in enumerate(zip(hashes["image"], requested, strict=True))
            ]
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="uuid") from error
        return {**hashes, "image": identifiers}

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        """Only the missing images are processed: what they ask for must shrink with them."""
        kwargs = inputs.hf_processor_mm_kwargs
        requested = kwargs[_REQUESTED_KEY]
        assert isinstance(requested, list)
        cached = mm_is_cached.get("image", [])
        return {**kwargs, _REQUESTED_KEY: [entry for entry, hit in zip(requested, cached, strict=True) if not hit]}

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Process the images, and add what each of them keeps.

        Adds `visual_token_schedule`: (images, stages, 2) int32, (dominant, contextual) of each stage;
        zeros stand for a stage that changes nothing.
        """
        processed = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        if "pixel_values" not in processed:
            return processed
        schedules = self._resolve(mm_items, hf_kwargs)
        self._check_processed(processed, mm_items, schedules)
        stages = [[split or (0, 0) for split in (schedule.encoder, *schedule.decoder)] for schedule in schedules]
        processed[SCHEDULE_KEY] = torch.tensor(stages, dtype=torch.int32)
        if processed["pixel_values"][0].ndim == 4:
            # Hugging Face pads every image of a call to the most tiles among them. Without the padding, an entry of
            # the cache does not depend on its neighbours, and the tower does not run over black tiles.
            tiles = zip(processed["pixel_values"], schedules, strict=True)
            processed["pixel_values"] = [pixels[: schedule.num_tiles] for pixels, schedule in tiles]
        return processed

    def _check_places(self, prompt: str | list[int], num_images: int) -> None:
        """Each image needs its image token; vLLM would fail on an assertion, after it has processed them all."""
        places = num_images if isinstance(prompt, str) else prompt.count(self.info.get_hf_config().image_token_index)
        if places < num_images:
            raise VLLMValidationError(
                f"the prompt has {places} image token(s) for {num_images} image(s)", parameter="prompt"
            )

    def _check_images(self, inputs: ProcessorInputs) -> None:
        """Only decoded images pass: Hugging Face's processor would fetch a URL or open a path in place of one."""
        items = inputs.mm_data_items.get("image")
        for index in range(items.get_count() if isinstance(items, ImageProcessorItems) else 0):
            if not isinstance(items.get(index), Image.Image | np.ndarray | torch.Tensor | None):
                raise VLLMValidationError("an image must be sent as image data", parameter="messages")
        for uuid in inputs.mm_uuid_items.get("image", ()) if inputs.mm_uuid_items else ():
            if uuid is not None and not uuid.isprintable():
                raise VLLMValidationError("the uuid of an image must be printable text", parameter="uuid")

    def _check_processed(
        self, processed: BatchFeature, mm_items: MultiModalDataItems, schedules: Sequence[Schedule]
    ) -> None:
        images = mm_items.get_items("image", ImageProcessorItems)
        sizes = [images.get_image_size(index) for index in range(len(schedules))]
        pixel_values, image_sizes = processed["pixel_values"], processed.get("image_sizes")
        is_tiled = bool(self.info.geometry.grid_pinpoints)
        expected = [[size.height, size.width] for size in sizes]
        if is_tiled and (not isinstance(image_sizes, torch.Tensor) or image_sizes.tolist() != expected):
            raise VLLMValidationError(
                "the image processor changed the sizes of images", parameter="mm_processor_kwargs"
            )
        if len(pixel_values) != len(schedules):
            raise VLLMValidationError("the image processor lost images", parameter="mm_processor_kwargs")
        for pixels, schedule in zip(pixel_values, schedules, strict=True):
            request_checks.check_pixels(pixels, schedule.num_tiles if is_tiled else None, self.info.geometry.tile_size)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return {**fields, SCHEDULE_KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """Replace each image token by as many placeholders as the encoder will return rows."""
        image_token_id = self.info.get_hf_config().image_token_index
        schedules = self._resolve(mm_items, hf_processor_mm_kwargs)
        return [
            PromptReplacement(
                modality="image",
                target=[image_token_id],
                replacement=lambda index: [image_token_id] * schedules[index].num_placeholders,
            )
        ]

    def _resolve(self, mm_items: MultiModalDataItems, kwargs: Mapping[str, object]) -> list[Schedule]:
        requested = kwargs[_REQUESTED_KEY]
        assert isinstance(requested, list)
        if not requested:
            return []
        images = mm_items.get_items("image", ImageProcessorItems)
        return [self._resolve_image(images, index, entry) for index, entry in enumerate(requested)]

    def _resolve_image(self, images: ImageProcessorItems, index: int, requested: Requested) -> Schedule:
        if images.get(index) is None:
            raise VLLMValidationError("send the image along with its uuid: its size is needed", parameter="uuid")
        size = images.get_image_size(index)
        try:
            if isinstance(requested, tuple):
                return resolve_explicit(self.info.geometry, size.height, size.width, requested)
            return resolve(self.info.geometry, size.height, size.width, requested)
        except BudgetError as error:
            key = SCHEDULE_KEY if isinstance(requested, tuple) else BUDGET_KEY
            raise VLLMValidationError(str(error), parameter=key) from error


class LlavaNextBudgetProcessor(_BudgetProcessor, LlavaNextMultiModalProcessor[LlavaNextBudgetInfo]):
    pass


class LlavaBudgetProcessor(_BudgetProcessor, LlavaMultiModalProcessor):
    pass


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key not in _KEYS}


def _one_per_image(key: str, value: Any, num_images: int) -> list[Any]:
    if len(value) != num_images:
        raise VLLMValidationError(f"{key} has {len(value)} entries for {num_images} image(s)", parameter=key)
    return list(value)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _holds_lists(value: object) -> bool:
    return isinstance(value, list | tuple) and any(map(_is_list, value))


def _freeze(schedule: Any) -> tuple[tuple[int, ...], ...]:
    """Explicit rows as tuples: hashable, and distinguished from a budget by their type."""
    if not _is_list(schedule) or not all(_is_list(split) for split in schedule):
        raise VLLMValidationError(
            f"{SCHEDULE_KEY} must be a list of [dominant, contextual] pairs; got {quote(schedule)}",
            parameter=SCHEDULE_KEY,
        )
    return tuple(tuple(split) for split in schedule)

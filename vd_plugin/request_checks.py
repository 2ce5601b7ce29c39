"""What is refused of a single request before it reaches the engine core, where an exception ends the engine for all.

vLLM calls `processor.py` with every image, and most checks are made there. Three things pass it by: a request's
parameters, arguments of the image processor where there is no image, and images that were processed elsewhere. vLLM has
no hook there, so `install` wraps three of its methods in checks. They do nothing for other models.

REMOVE WHEN: vLLM calls a model's processor, or a plugin, with each request that it is about to send to the engine core.

Upstream: `vllm/v1/engine/input_processor.py`, `vllm/renderers/base.py` (vLLM 0.32).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from vllm import envs
from vllm.exceptions import VLLMValidationError

from vd_plugin.options import ARCHITECTURES, read_geometry
from vd_plugin.schedule import Geometry
from vd_plugin.spans import read_spans, read_splits
from vd_plugin.wire import BUDGET_KEY

MAX_ALLOWED_TOKEN_IDS: Final = 1024
MAX_LOGIT_BIAS_TOKENS: Final = 1024
MAX_STOP_TOKEN_IDS: Final = 128
"""vLLM's, of `vllm/v1/worker/gpu/sample/logit_bias.py`, which must not be imported here: see `cpu/kernels.py`."""

MAX_SEED: Final = 2**63 - 1

MAX_PIXEL: Final = 1000.0
"""Of a normalised pixel value; 255 that nobody has rescaled becomes 975. Far larger ones overflow in half precision."""


def install() -> None:
    """Wrap vLLM's methods. Idempotent.

    Raises:
        RuntimeError: vLLM's methods are not those that the checks were written for.
    """
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(InputProcessor, "process_inputs", ["self", "request_id", "prompt", "params"], _checking_requests)
    _wrap(BaseRenderer, "_process_tokens", ["self", "prompt"], _checking_prompts)
    _wrap(BaseRenderer, "_process_tokens_async", ["self", "prompt"], _checking_prompts)


def check_request(request: Any, geometry: Geometry) -> None:
    """Refuse a request that the engine core cannot serve.

    Args:
        request: vLLM's `EngineCoreRequest`.

    Raises:
        VLLMValidationError: it asks for something that pruned images exclude or that no request may ask for, or its
            images are not ours.
    """
    if request.sampling_params is not None:
        check_sampling(request.sampling_params)
    features = request.mm_features or ()
    for feature in features:
        check_feature(feature, geometry)
    reason = unsupported(request.sampling_params, request.resumable) if read_spans(features) else None
    if reason:
        sentence, parameter = reason
        raise VLLMValidationError(sentence, parameter=parameter)


def check_sampling(params: Any) -> None:
    """Refuse what vLLM checks only in the worker, where it ends the engine.

    Args:
        params: vLLM's `SamplingParams`, of all `n` answers, which it has completed for the model.

    Raises:
        VLLMValidationError: too many tokens in a list, or a seed that is none for every answer.

    REMOVE WHEN: vLLM refuses these before a request reaches the engine core.
    """
    words = params.bad_words_token_ids or ()
    # vLLM forbids the end of the text, too, until there are enough tokens.
    stops = len(params.all_stop_token_ids) if params.min_tokens > 0 else 0
    lists = (
        ("allowed_token_ids", "ids", len(params.allowed_token_ids or ()), MAX_ALLOWED_TOKEN_IDS),
        ("logit_bias", "tokens", len(params.logit_bias or ()), MAX_LOGIT_BIAS_TOKENS),
        ("stop_token_ids", "ids beside min_tokens, with those that end every text", stops, MAX_STOP_TOKEN_IDS),
        ("bad_words", "tokens", sum(len(word) for word in words), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS),
    )
    for name, what, count, most in lists:
        if count > most:
            raise VLLMValidationError(f"{name} has {count} {what}; at most {most} are allowed", parameter=name)
    last = (params.seed or 0) + params.n - 1
    if last > MAX_SEED:
        raise VLLMValidationError(
            f"answer {params.n} would have the seed {last}; at most {MAX_SEED} is allowed", parameter="seed"
        )


def unsupported(params: Any, is_session: bool) -> tuple[str, str | None] | None:
    """Why a request that has images pruned inside the decoder cannot be served: a sentence and the parameter."""
    full = f'set {BUDGET_KEY} to "full"'
    if is_session:
        return f"images in streaming-input sessions cannot be pruned: {full}", BUDGET_KEY
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(params, name, None) is not None:
            return f"{name} are not available for prompts with pruned images: leave {name} out, or {full}", name
    return None


def check_feature(feature: Any, geometry: Geometry) -> None:
    """Refuse an image whose data do not match its identifier and its position in the prompt.

    Our processor returns none of that kind; clients that send processed images past it may.

    Raises:
        VLLMValidationError: schedule, placeholders or pixels do not fit.
    """
    try:
        splits = read_splits(feature.identifier)
    except ValueError:
        raise VLLMValidationError("malformed schedule in an image identifier", parameter="mm_hashes") from None
    if splits and len(splits) != len(geometry.boundaries) + 1:
        raise VLLMValidationError("an image identifier has a schedule for another engine", parameter="mm_hashes")
    if feature.data is None:  # the engine core keeps none: see `validation.prepare_engine`
        raise VLLMValidationError("an image was sent by name alone, without its data", parameter="kwargs_data")
    fields = {name: element.data for name, element in feature.data.items()}
    rows = fields.get("visual_token_schedule")
    expected = [[*(split or (0, 0))] for split in splits or [None] * (len(geometry.boundaries) + 1)]
    if not isinstance(rows, torch.Tensor) or rows.tolist() != expected:
        raise VLLMValidationError("an image's schedule is not that of its identifier", parameter="kwargs_data")
    pixels = fields.get("pixel_values")
    num_tiles = len(pixels) if isinstance(pixels, torch.Tensor) and geometry.grid_pinpoints else None
    check_pixels(pixels, num_tiles, geometry.tile_size)
    encoder = splits[0] if splits else None
    full = _full_tokens(fields.get("image_sizes"), geometry)
    length = full if encoder is None else (num_tiles or 1) * encoder.rows
    if length != feature.mm_position.length:
        raise VLLMValidationError("an image's placeholders do not fit its schedule", parameter="placeholders")


def _full_tokens(image_sizes: object, geometry: Geometry) -> int | None:
    """Visual tokens of an image of the given size in the stock model; None if there is no size."""
    if not geometry.grid_pinpoints:
        return geometry.tile_patches
    if not isinstance(image_sizes, torch.Tensor) or image_sizes.shape != (2,) or bool((image_sizes < 1).any()):
        return None
    height, width = image_sizes.tolist()
    return geometry.full_tokens(int(height), int(width))


def check_pixels(pixels: object, num_tiles: int | None, tile_size: int) -> None:
    """Refuse pixels that the vision tower cannot take, or that would make it return NaN.

    Args:
        pixels: of one image: ([num_tiles or more,] 3, tile_size, tile_size) in floating point, normalised.
        num_tiles: None for a model without tiles.

    Raises:
        VLLMValidationError: another type, another shape, or a value that is not finite or far too large.
    """
    tile = (3, tile_size, tile_size)
    if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
        kind = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise VLLMValidationError(f"an image was processed to {kind}, not to a tensor of floats", parameter=_KWARGS)
    shape = tuple(pixels.shape)
    fits = shape == tile if num_tiles is None else len(shape) == 4 and shape[1:] == tile and shape[0] >= num_tiles >= 1
    if not fits:
        wanted = tile if num_tiles is None else (num_tiles, *tile)
        raise VLLMValidationError(f"an image was processed to shape {shape}; needed is {wanted}", parameter=_KWARGS)
    low, high = torch.aminmax(pixels)
    if not -MAX_PIXEL <= float(low) <= float(high) <= MAX_PIXEL:  # false for NaN
        raise VLLMValidationError(
            f"an image has pixels between {float(low):g} and {float(high):g} once it is normalised; at most "
            f"{MAX_PIXEL:g} are allowed",
            parameter=_KWARGS,
        )


_KWARGS: Final = "mm_processor_kwargs"


def _checking_requests(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def process_inputs(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = stock(self, request_id, prompt, *args, **kwargs)
        geometry = _geometry(self.model_config)
        if geometry is not None:
            check_request(request, geometry)
        return request

    return process_inputs


def _checking_prompts(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Checks when it is called; what it returns may be a coroutine of the stock method's."""

    @functools.wraps(stock)
    def process_tokens(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        _check_prompt(self, prompt)
        return stock(self, prompt, *args, **kwargs)

    return process_tokens


def _check_prompt(renderer: Any, prompt: Any) -> None:
    """Without an image, vLLM shows the image processor's arguments to nobody: a wrong budget would pass in silence."""
    kwargs = prompt.get("mm_processor_kwargs")
    if kwargs is None or prompt.get("multi_modal_data") or _geometry(renderer.model_config) is None:
        return
    from vd_plugin.processor import check_kwargs, parse_requested

    check_kwargs(kwargs, renderer.get_mm_processor().info.options)
    parse_requested(kwargs, 0)


def _geometry(model_config: Any) -> Geometry | None:
    """Of a model that is ours."""
    hf_config = model_config.hf_config
    if (hf_config.architectures or [None])[0] not in ARCHITECTURES.values():
        return None
    return read_geometry(hf_config)


def _wrap(owner: type, name: str, parameters: list[str], wrapper: Callable[[Any], Any]) -> None:
    stock = getattr(owner, name, None)
    if hasattr(stock, "_visiondrop"):
        return
    if stock is None or list(inspect.signature(stock).parameters)[: len(parameters)] != parameters:
        raise RuntimeError(
            f"vLLM's {owner.__name__}.{name} is not what VisionDrop was written for: it needs vLLM 0.32, see README"
        )
    checked = wrapper(stock)
    checked._visiondrop = True
    setattr(owner, name, checked)

"""Fields that no request to this gateway may have, and a sentence for each kind.

vLLM ignores fields that it does not know and obeys some that configure the engine rather than the answer. Here every
field is honoured or refused, never ignored. The names are those of vLLM 0.32 (`openai/chat_completion/protocol.py`,
`openai/completion/protocol.py`, `openai/responses/protocol.py`); a test compares them with the installed release.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Final

ENGINE_FIELDS: Final = frozenset(
    {
        "cache_salt",
        "chat_template",
        "chat_template_kwargs",
        "ec_transfer_params",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "priority",
        "prompt_embeds",
        "request_id",
        "routed_experts_prompt_start",
        "session_id",
        "vllm_xargs",
    }
)
"""They configure the engine rather than the answer."""

IDLE_FIELDS: Final = frozenset({"mm_payload", "return_mm_kwargs", "return_token_offsets", "suffix"})
"""vLLM declares them, but does nothing about them where text is generated (`suffix`: refuses it)."""

_FOREIGN_BUDGETS: Final = frozenset(
    {
        "detail",
        "dynamic_hd",
        "fps",
        "hd_num",
        "image_detail",
        "image_quality",
        "image_seq_length",
        "image_token_budget",
        "image_tokens",
        "max_dynamic_patch",
        "max_image_size",
        "max_image_tokens",
        "max_image_tiles",
        "max_num_tiles",
        "max_pixels",
        "max_slice_nums",
        "max_soft_tokens",
        "min_dynamic_patch",
        "min_image_tokens",
        "min_pixels",
        "num_crops",
        "num_image_tokens",
        "pruning_rate",
        "resized_height",
        "resized_width",
        "retention_ratio",
        "total_pixels",
        "visual_token_schedule",
        "visual_tokens",
        "vision_token_budget",
    }
)
"""What other servers and models call the image token budget, or the resolution."""

_TOOL_FIELDS: Final = frozenset({"function_call", "functions", "tool_choice", "tools"})
NO_TOOLS: Final = "tools are not served on this route; POST /v1/chat/completions has them"

_RIGHT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "best_of": ("n",),
    "function_call": ("tool_choice",),
    "functions": ("tools",),
    "guided_choice": ("structured_outputs.choice",),
    "guided_decoding_backend": ("structured_outputs",),
    "guided_grammar": ("structured_outputs.grammar",),
    "guided_json": ("structured_outputs.json",),
    "guided_regex": ("structured_outputs.regex",),
    "guided_whitespace_pattern": ("structured_outputs.whitespace_pattern",),
    "input": ("messages", "prompt"),
    "instructions": ("messages",),
    "max_completion_tokens": ("max_output_tokens", "max_tokens"),
    "max_new_tokens": ("max_completion_tokens", "max_output_tokens", "max_tokens"),
    "max_output_tokens": ("max_completion_tokens", "max_tokens"),
    "max_tokens": ("max_output_tokens",),
    "messages": ("input", "prompt"),
    "n_predict": ("max_completion_tokens", "max_output_tokens", "max_tokens"),
    "num_predict": ("max_completion_tokens", "max_output_tokens", "max_tokens"),
    "prompt": ("messages",),
    "reasoning": ("reasoning_effort",),
    "reasoning_effort": ("reasoning.effort",),
    "response_format": ("text.format",),
    "stop_sequences": ("stop",),
    "system": ("messages", "instructions"),
    "text": ("response_format",),
    "verbosity": ("text.verbosity",),
}
"""What a field of another route, another server or another time is called here: the first that the route has."""

_LONGEST_NAME: Final = 64
_LIKENESS: Final = 0.8
"""Of a name with a slip in it, as difflib measures; "options" is less like "stream_options"."""


def refusal(name: str, known: Collection[str], idle: Collection[str], takes_images: bool) -> str:
    """Why there is no top-level field `name`, in one sentence.

    Args:
        known: the fields that there are.
        idle: those of them that change nothing. They are not what anybody means.
        takes_images: whether the route does.
    """
    if name in ENGINE_FIELDS:
        return f"{name!r} cannot be set by a request to this server"
    if name in IDLE_FIELDS:
        return f"{name!r} has no effect on this route; leave it out"
    if name in _FOREIGN_BUDGETS:
        if takes_images:
            return f"unknown field {name!r}; use 'visual_token_budget' to set the image token budget"
        return f"unknown field {name!r}; this route takes no images"
    if name == "visual_token_budget":
        return "'visual_token_budget' needs an image, and this route takes no images"
    if name in _TOOL_FIELDS and "tools" not in known:
        return NO_TOOLS
    right = next((path for path in _RIGHT_NAMES.get(name, ()) if path.partition(".")[0] in known), None)
    if right is not None:
        return f"unknown field {name!r}; use {right!r}"
    # It would take seconds and gigabytes for a name of megabytes.
    is_short = len(name) <= _LONGEST_NAME
    close = difflib.get_close_matches(name, sorted({*known} - {*idle}), 1, _LIKENESS) if is_short else []
    return f"unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def message_refusal(name: str) -> str | None:
    """Why a message may not have a field `name`; None for those that only the model's template could know."""
    if name == "visual_token_budget" or name in _FOREIGN_BUDGETS:
        return f"{name!r} is not permitted in a message: use 'visual_token_budget' in the request or inside 'image_url'"
    if name == "uuid" or name.endswith("_embeds") or name in ENGINE_FIELDS:
        return f"{name!r} cannot be set by a request to this server"
    return None


def part_refusal(name: str, *, inside: str) -> str:
    """Why a content part (or the `image_url` in it) has no field `name`.

    Args:
        inside: "image_url" for the object of that name, else what holds the field.
    """
    if name == "uuid":
        return "'uuid' is not permitted: a request cannot name entries of the engine's caches"
    if name.endswith("_embeds"):
        return f"{name!r} is not permitted: embeddings are not served"
    if inside != "image_url" and name in ("detail", "visual_token_budget"):
        return f"{name!r} is not permitted here: it belongs inside 'image_url'"
    if name in _FOREIGN_BUDGETS:
        return f"{name!r} is not permitted: use 'visual_token_budget' inside 'image_url'"
    return f"{name!r} is not permitted in a content part"

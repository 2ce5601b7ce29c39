"""Which of vLLM's tool-call parsers fits a model.

No checkpoint names it. But its chat template shows the model tools, and its own calls: a parser fits if it reads the
call that the template writes. Most LLaVA checkpoints have a template without tools; none fits them.
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from typing import Any, Final

logger = logging.getLogger(f"vllm.{__name__}")

PARSERS: Final = ("hermes", "mistral", "llama3_json")
"""Those of vLLM for the decoders that VisionDrop serves. In this order: the last would read calls of the second."""

_NAME: Final = "look_up"
_ARGUMENTS: Final = {"word": "square"}
_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Look up a word.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
_QUESTION: Final = {"role": "user", "content": "What is a square?"}
_CALL: Final[dict[str, Any]] = {
    "role": "assistant",
    "content": "",
    # Mistral's templates take ids of nine characters.
    "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}],
}


def choose_parser(args: Namespace) -> None:
    """Set the options of vLLM's server that tools need, if they are not set and a parser fits for certain.

    Raises:
        ValueError: the tokenizer or the template cannot be read; or tools are asked for, and no parser is known to fit.
    """
    if args.tool_call_parser is not None or args.skip_tokenizer_init:
        return
    try:
        args.tool_call_parser = _find_parser(args)
    except OSError as error:
        raise ValueError(f"the tokenizer or the chat template cannot be read: {error}") from None
    if args.tool_call_parser is not None:
        logger.info("Tool calls are read by the parser %r, which fits the chat template", args.tool_call_parser)
        args.enable_auto_tool_choice = True
    elif args.enable_auto_tool_choice:
        raise ValueError("--enable-auto-tool-choice needs --tool-call-parser: the chat template does not tell which")


def _find_parser(args: Namespace) -> str | None:
    from transformers import PreTrainedTokenizerBase
    from vllm.renderers.chat_utils import load_chat_template
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(
        args.tokenizer or args.model,
        tokenizer_mode=args.tokenizer_mode,
        revision=args.tokenizer_revision or args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None  # one of vLLM's own, which writes and reads calls without a template
    return fitting_parser(tokenizer, load_chat_template(args.chat_template))


def fitting_parser(tokenizer: Any, template: str | None = None) -> str | None:
    """The first of PARSERS that reads a call as the template writes it.

    Args:
        tokenizer: of transformers.
        template: in place of the tokenizer's own.
    """
    call = _written_call(tokenizer, template)
    return None if call is None else next((name for name in PARSERS if _reads(name, tokenizer, call)), None)


def _written_call(tokenizer: Any, template: str | None) -> str | None:
    """What the template makes of a call; None if it shows the model no tools."""
    from jinja2 import TemplateError

    def render(*messages: dict[str, Any], **options: Any) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=[_TOOL], chat_template=template, tokenize=False, **options
            )
        )

    try:
        before, after = render(_QUESTION, add_generation_prompt=True), render(_QUESTION, _CALL)
    except (TemplateError, TypeError, ValueError):
        return None  # there is no template, or it takes no such conversation
    return after.removeprefix(before) if _NAME in before and after.startswith(before) else None


def _reads(name: str, tokenizer: Any, call: str) -> bool:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    request = ChatCompletionRequest(messages=[_QUESTION], tools=[_TOOL])
    try:
        parser = ToolParserManager.get_tool_parser(name)(tokenizer, request.tools)
    except (RuntimeError, ValueError):
        return False  # the tokenizer lacks a token that it looks for
    found = parser.extract_tool_calls(call, request).tool_calls
    return [(made.function.name, json.loads(made.function.arguments)) for made in found] == [(_NAME, _ARGUMENTS)]

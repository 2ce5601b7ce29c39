"""What is too long for the model whatever its tokenizer makes of it; such a request need not wait to be told.

The sentences are vLLM's (vllm/renderers/params.py, TokenizeParams), and so is the bound: no token stands for more
characters than the longest of the vocabulary has. What only might be too long goes on, and the engine decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from server.errors import InvalidRequestError
from server.schemas.generation import GenerationRequest

LONGEST_TRUNCATED_TOKENS: Final = 262_144
"""About what a text may have that the engine is to shorten. It tokenizes all of it first, a megabyte in about a second,
and every other prompt waits."""


@dataclass(frozen=True, slots=True)
class ContextLength:
    """What an engine takes.

    Args:
        max_model_len: tokens of a prompt and its answer.
        max_chars_per_token: None if the engine does not know it; then text is of no certain length.
    """

    max_model_len: int
    max_chars_per_token: int | None = None

    def check(self, body: GenerationRequest, visual_tokens: int = 0) -> None:
        """
        Args:
            visual_tokens: in the prompt, of all its images.

        Raises:
            InvalidRequestError: the request can never be served.
        """
        self._check_answer(body)
        if body.is_truncated:
            self._check_truncated(body)
            return
        for prompt in body.certain_prompts():
            if isinstance(prompt, list):
                self._check_tokens(len(prompt), body, qualifier="")
            else:
                self._check_text(prompt, body)
                self._check_tokens(self._least_tokens(prompt) + visual_tokens, body, qualifier="at least ")

    def _least_tokens(self, num_chars: int) -> int:
        return 0 if self.max_chars_per_token is None else -(-num_chars // self.max_chars_per_token)

    def _check_answer(self, body: GenerationRequest) -> None:
        if (body.answer_tokens or 0) > self.max_model_len:
            name = body.answer_field
            raise _too_long(
                f"{name}={body.answer_tokens} cannot be greater than max_model_len={self.max_model_len}. "
                "Please request fewer output tokens.",
                name,
            )

    def _check_truncated(self, body: GenerationRequest) -> None:
        longest = max(LONGEST_TRUNCATED_TOKENS, self.max_model_len)
        num_tokens = body.text_tokens()
        if num_tokens > longest:
            raise _too_long(
                f"a prompt of about {num_tokens} tokens is too long to be truncated; at most {longest} are, and "
                f"{self.max_model_len} fit into the model's context",
                body.text_fields[0],
            )

    def _check_text(self, num_chars: int, body: GenerationRequest) -> None:
        if self._least_tokens(num_chars) > self.max_model_len:
            assert self.max_chars_per_token is not None
            raise _too_long(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{num_chars} characters (more than {self.max_model_len * self.max_chars_per_token} characters, which "
                f"is the upper bound for {self.max_model_len} input tokens). "
                "Please reduce the length of the input prompt.",
                body.text_fields[0],
            )

    def _check_tokens(self, num_tokens: int, body: GenerationRequest, *, qualifier: str) -> None:
        if num_tokens > self.max_model_len:
            raise _too_long(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{qualifier}{num_tokens} input tokens, which exceeds this limit even without any output tokens. "
                "Please reduce the length of the input prompt.",
                body.text_fields[0],
            )


def _too_long(message: str, param: str) -> InvalidRequestError:
    error = InvalidRequestError(message, param=param, code="context_length_exceeded")
    error.reason = "too_long"
    return error

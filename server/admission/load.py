"""What a request takes of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from server.schemas.generation import GenerationRequest

UNLIMITED_ANSWER_TOKENS: Final = 1024
"""Of answers whose `max_tokens` is not given. They may fill the context: who sets a usual limit must not count more."""


@dataclass(frozen=True, slots=True)
class Load:
    """Costs in tokens.

    Args:
        tokens: of all prompts (text and kept visual tokens), once for each of their answers: what the KV cache has to
            hold from the start.
        sequences: answers, each of which takes a place in the engine's batch.
        answer_tokens: of all answers together, at most.
    """

    tokens: int
    sequences: int = 1
    answer_tokens: int = 0

    @property
    def work(self) -> int:
        """What the request counts for where clients are compared."""
        return self.tokens + self.answer_tokens


def load_of(body: GenerationRequest, visual_tokens: int, max_model_len: int | None) -> Load:
    """The load of a request.

    Args:
        visual_tokens: kept, of all its images.
        max_model_len: no prompt with its answer is longer; None if it is not known.
    """
    longest = max_model_len or (1 << 31)
    tokens = min(body.text_tokens() + visual_tokens, longest * body.num_prompts)
    wanted = UNLIMITED_ANSWER_TOKENS if body.answer_tokens is None else body.answer_tokens
    answers = body.num_prompts * body.num_choices
    return Load(tokens * body.num_choices, answers, answers * min(wanted, longest))

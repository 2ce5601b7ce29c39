"""The paths that the gateway answers, and which of them ask an engine for work."""

from __future__ import annotations

from typing import Final

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
TOKENIZE: Final = "/tokenize"
DETOKENIZE: Final = "/detokenize"
COUNT: Final = "/v1/visual_tokens/count"
MODELS: Final = "/v1/models"
MODEL: Final = "/v1/models/{model:path}"
HEALTH: Final = "/health"
READY: Final = "/ready"
METRICS: Final = "/metrics"
ENGINES: Final = "/metrics/engines"
ENGINE_METRICS: Final = "/metrics/engine/{engine}"
OPENAPI: Final = "/openapi.json"

WORK: Final = (CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE, COUNT)
IMAGES: Final = (CHAT, RESPONSES, COUNT)
"""Those of WORK whose requests may have images."""

ALL: Final = (*WORK, MODELS, HEALTH, READY, METRICS, OPENAPI)
"""Labels of the metric of requests; every other path is OTHER."""
OTHER: Final = "other"

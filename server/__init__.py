"""The gateway: an OpenAI-compatible server with a visual token budget for every request. Without torch or vLLM."""

__all__: list[str] = []

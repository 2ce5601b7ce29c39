"""What gateway and engine must spell alike: they are two processes, and know each other by these literals alone.

Standard library only, so that the gateway, which has no torch, reads the same file.
"""

from __future__ import annotations

from typing import Final

BUDGET_KEY: Final = "visual_token_budget"
"""The field of a request to the gateway, and the key of `mm_processor_kwargs` under which budgets reach the engine."""

GEOMETRY_PATH: Final = "/visiondrop/geometry"
"""The engine's route that reports how it counts tokens."""

DRAINING: Final = "engine_draining"
"""The `type` of the 503 with which an engine that was asked to stop answers /health and refuses requests."""

ERROR_PREFIX: Final = "visiondrop: error: "
"""How a program of ours begins the sentence that it leaves behind when its input is bad."""

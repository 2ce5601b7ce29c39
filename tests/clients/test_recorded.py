"""Bodies as other people's clients send them (recorded.json, each with the release it was recorded from)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from gateway import gateway
from images import image

pytestmark = pytest.mark.anyio

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text().replace("IMAGE", image()))

KNOWN_TO_THE_ENGINE = {
    "/v1/chat/completions": set(),
    "/v1/completions": set(),
    "/v1/responses": {"metadata", "prompt_cache_key", "service_tier", "store", "user"},
}
"""Of what has no effect, what vLLM sends back."""
NO_EFFECT = {
    "include",
    "metadata",
    "modalities",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda entry: f"{entry['client']}: {entry['what']}")
async def test_a_clients_body_is_served(recorded: dict[str, Any]) -> None:
    engine, body = FakeEngine(), recorded["body"]
    assert body["model"] == MODEL
    async with gateway(engine) as client:
        response = await client.post(recorded["path"], json=body)
    assert response.status_code == 200, response.text
    text = json.dumps(body)
    num_images = text.count('"image_url": "data:') + text.count('"url": "data:')
    ((path, sent),) = engine.calls
    assert path == recorded["path"]
    budgets = sent.get("mm_processor_kwargs", {}).get("visual_token_budget", [])
    assert budgets == [160 if body.get("visual_token_budget") == "low" else 640] * num_images
    assert response.headers["x-visual-tokens-full"] != "0" or not num_images
    withheld = NO_EFFECT - KNOWN_TO_THE_ENGINE[path]
    assert not withheld & sent.keys()
    assert "cache_control" not in json.dumps(sent)
    kept = body.keys() - withheld - {"messages", "input", "stream_options", "visual_token_budget"}
    assert {name: sent[name] for name in kept} == {name: body[name] for name in kept}


def test_recordings_name_their_clients() -> None:
    clients = {entry["client"] for entry in RECORDED}
    assert clients == {"LangChain", "LibreChat", "LiteLLM", "Open WebUI", "Vercel AI SDK"}
    assert all(entry["version"] for entry in RECORDED)

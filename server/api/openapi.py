"""GET /openapi.json. Bodies are read by hand, so FastAPI does not know them: the document is put together here.

One table has an entry for every route; a route without one is an error, so that none is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import paths
from server.budget import HEADER
from server.schemas import answers
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.responses import ResponsesRequest
from server.schemas.tokens import DetokenizeRequest, TokenizeRequest

_EXAMPLE_IMAGE: Final = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGM8IWfDwMDAxMDAwMDAAAAOTgEmR2hJIgAAAABJRU5ErkJggg=="
)
_CHAT_EXAMPLE: Final[dict[str, Any]] = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": _EXAMPLE_IMAGE}},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ],
    "max_tokens": 16,
    "visual_token_budget": "low",
}

_PROBLEMS: Final = {
    400: "The request is at fault; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "There is no such model, or engine.",
    405: "This path does not answer that method.",
    408: "The request did not arrive in time.",
    413: "The body, or an image in it, is too large.",
    415: "The body is not JSON by its own account.",
    422: "The engine cannot process the request.",
    429: "The key has used up its rate.",
    500: "A defect of the server.",
    502: "The engine failed.",
    503: "The server is overloaded or stopping, or the engine is unreachable.",
}
_ASKING: Final = tuple(_PROBLEMS)
_LOOKING: Final = (401, 405, 500, 502, 503)
_OPEN: Final = (405, 500)


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document contains about one route. Statuses are those of its errors."""

    summary: str
    answer: type[BaseModel] | None
    statuses: tuple[int, ...]
    body: type[BaseModel] | None = None
    example: Mapping[str, Any] | None = None
    streams: bool = False
    counts_tokens: bool = False
    needs_key: bool = True
    parameter: str | None = None


OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("post", paths.CHAT): Operation(
        "Answer a conversation, with or without images",
        answers.ChatCompletion,
        _ASKING,
        ChatRequest,
        _CHAT_EXAMPLE,
        streams=True,
        counts_tokens=True,
    ),
    ("post", paths.COMPLETIONS): Operation(
        "Continue a text",
        answers.TextCompletion,
        _ASKING,
        CompletionRequest,
        {"prompt": "A picture is worth", "max_tokens": 16},
        streams=True,
        counts_tokens=True,
    ),
    ("post", paths.RESPONSES): Operation(
        "Answer a conversation, with or without images; stateless, without tools",
        answers.Response,
        _ASKING,
        ResponsesRequest,
        {"input": "Hello", "max_output_tokens": 16},
        streams=True,
        counts_tokens=True,
    ),
    ("post", paths.COUNT): Operation(
        "Report what a chat request would cost at every preset, without running the model",
        answers.VisualTokensCount,
        _ASKING,
        ChatRequest,
        _CHAT_EXAMPLE,
    ),
    ("post", paths.TOKENIZE): Operation(
        "Turn a text or a conversation without images into token ids",
        answers.Tokens,
        _ASKING,
        TokenizeRequest,
        {"prompt": "A picture"},
    ),
    ("post", paths.DETOKENIZE): Operation(
        "Turn token ids into text", answers.Text, _ASKING, DetokenizeRequest, {"tokens": [1, 5, 6]}
    ),
    ("get", paths.MODELS): Operation("List the models and their budgets", answers.ModelList, _LOOKING),
    ("get", "/v1/models/{model_id}"): Operation(
        "Retrieve one model", answers.Model, (*_LOOKING, 404), parameter="model_id"
    ),
    ("get", paths.HEALTH): Operation("Whether the server lives", answers.Health, _OPEN, needs_key=False),
    ("get", paths.READY): Operation("Whether the engine makes progress", answers.Ready, (*_LOOKING,)),
    ("get", paths.METRICS): Operation("Metrics in Prometheus's text format", None, _LOOKING),
    ("get", paths.ENGINES): Operation("The engines, as targets for Prometheus to discover", answers.Engines, _LOOKING),
    ("get", paths.ENGINE_METRICS): Operation(
        "An engine's own metrics in Prometheus's text format", None, (*_LOOKING, 404), parameter="engine"
    ),
    ("get", paths.OPENAPI): Operation("This document", answers.Document, (401, 405, 500)),
}


def add_route(app: FastAPI) -> None:
    """Serve the document of an app at paths.OPENAPI. It is made at the first request, when all routes are there."""
    made: list[dict[str, Any]] = []

    @app.get(paths.OPENAPI)
    async def openapi_document() -> dict[str, Any]:
        if not made:
            made.append(document(app))
        return made[0]


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes that an app has.

    Raises:
        KeyError: a route has no entry in OPERATIONS.
    """
    here = {
        (method.lower(), _template(route.path)): OPERATIONS[method.lower(), _template(route.path)]
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    models: list[type[BaseModel]] = [answers.ErrorBody]
    models += dict.fromkeys(model for entry in here.values() for model in _models(entry))
    references, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    reference = {model: references[model, "validation"] for model in models}
    items: dict[str, dict[str, Any]] = {}
    for (method, path), entry in here.items():
        items.setdefault(path, {})[method] = _operation(method, path, entry, reference)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": app.title,
            "version": app.version,
            "description": "OpenAI's API for a vision model, with a visual token budget for every image.",
        },
        "paths": items,
        "components": {
            "schemas": schemas["$defs"],
            "headers": HEADERS,
            "parameters": _PARAMETERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _template(path: str) -> str:
    """`/v1/models/{id:path}` -> `/v1/models/{model_id}`: OpenAPI knows no converters."""
    return "/v1/models/{model_id}" if path.startswith("/v1/models/{") else path


def _models(entry: Operation) -> list[type[BaseModel]]:
    return [model for model in (entry.body, entry.answer) if model is not None]


HEADERS: Final[dict[str, Any]] = {
    "X-Request-Id": {"description": "The request's own id if one was sent.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 120},
    },
    "WWW-Authenticate": {"schema": {"type": "string", "enum": ["Bearer"]}},
    "Allow": {"description": "The methods that there are.", "schema": {"type": "string"}},
    "X-Visual-Token-Budget": {
        "description": "The budget that was applied to each image, in order; absent without images.",
        "schema": {"type": "string", "examples": ["320, full"]},
    },
    "X-Visual-Tokens-Full": {
        "description": "Visual tokens of the stock model.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "X-Visual-Tokens-Kept": {
        "description": "Visual tokens that a decoder layer holds, on average.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "X-Visual-Tokens-Saved": {"description": "Full - Kept.", "schema": {"type": "integer", "minimum": 0}},
    "x-ratelimit-limit-requests": {
        "description": "Requests a minute, where they are limited; likewise the next two.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-ratelimit-remaining-requests": {"schema": {"type": "integer", "minimum": 0}},
    "x-ratelimit-reset-requests": {
        "description": "When all of the limit will be there again.",
        "schema": {"type": "string", "pattern": "^[0-9]+s$"},
    },
}

_PARAMETERS: Final[dict[str, Any]] = {
    "X-Request-Id": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "An id for logs and the answer's own header; one is made if it is missing, long or odd.",
        "schema": {"type": "string", "maxLength": 128},
    },
    HEADER: {
        "name": HEADER,
        "in": "header",
        "description": "Budget of images that have none in the body: as there, as text. Without images, it applies to "
        "nothing.",
        "schema": {"type": "string", "pattern": "^(low|medium|high|full|3[2-9]|[4-9][0-9]|[1-9][0-9]{2,17})$"},
    },
}

_RATES: Final = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")

_FIGURES: Final = ("X-Visual-Token-Budget", "X-Visual-Tokens-Full", "X-Visual-Tokens-Kept", "X-Visual-Tokens-Saved")


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


def _operation(
    method: str, path: str, entry: Operation, reference: Mapping[type[BaseModel], dict[str, Any]]
) -> dict[str, Any]:
    words = [part for part in path.replace("{", "").replace("}", "").replace(".", "/").split("/") if part]
    operation: dict[str, Any] = {
        "operationId": "_".join([method, *words]),
        "summary": entry.summary,
        "security": [{"key": []}, {}] if entry.needs_key else [],
        "responses": {"200": _success(entry, reference)},
    }
    has_images = entry.body is not None and "visual_token_budget" in entry.body.model_fields
    names = ("X-Request-Id", *([HEADER] if has_images else []))
    operation["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in names]
    if entry.parameter is not None:
        schema = {"type": "string", "minLength": 1}
        operation["parameters"].append({"name": entry.parameter, "in": "path", "required": True, "schema": schema})
    if entry.body is not None:
        content: dict[str, Any] = {"schema": reference[entry.body]}
        if entry.example is not None:
            content["example"] = dict(entry.example)
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    extra = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: ("Retry-After", *_RATES), 503: ("Retry-After",)}
    for status in sorted(entry.statuses):
        operation["responses"][str(status)] = {
            "description": _PROBLEMS[status],
            "headers": _headers(*extra.get(status, ())),
            "content": {"application/json": {"schema": reference[answers.ErrorBody]}},
        }
    return operation


def _success(entry: Operation, reference: Mapping[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    figures = (*(_FIGURES if entry.counts_tokens else ()), *(_RATES if entry.body is not None else ()))
    if entry.answer is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": reference[entry.answer]}}
    if entry.streams:
        content["text/event-stream"] = {
            # Of no type: OpenAPI 3.1 does not say whether a stream's schema is that of its text or of one event.
            "schema": {
                "description": "With `stream`: events `data: {...}`, each a part of the answer; chat and text "
                "completions end with `data: [DONE]`. "
                "A failure on the way is an event with the error object, and the last.",
            }
        }
    return {"description": "The answer.", "headers": _headers(*figures), "content": content}

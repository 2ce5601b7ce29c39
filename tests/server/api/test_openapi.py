"""The OpenAPI document is complete, and true of what the server does."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
import uvicorn
from fake_engine import FakeEngine
from fastapi.routing import APIRoute
from gateway import make_app
from hypothesis import HealthCheck, Phase, given, settings
from images import ask, image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.testclient import TestClient

from server import paths
from server.api import openapi
from server.settings import Settings

EXAMPLES = 20

BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def app() -> Any:
    return make_app(Settings(), FakeEngine())


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    return openapi.document(app)


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


def resolve(document: dict[str, Any], node: Any) -> Any:
    """Follow a $ref."""
    while isinstance(node, dict) and "$ref" in node:
        target: Any = document
        for step in node["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        node = target
    return node


def validator(document: dict[str, Any], schema: Any) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


def test_every_route_is_in_the_document_and_every_entry_is_a_route(app: Any, document: dict[str, Any]) -> None:
    routes = {
        (method.lower(), openapi._template(route.path))
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    entries = {(method, path) for path, item in document["paths"].items() for method in item}
    assert entries == routes
    assert len(routes) == len([route for route in app.routes if getattr(route, "methods", None)])


def test_a_route_without_an_entry_is_an_error() -> None:
    app = make_app(Settings(), FakeEngine())

    @app.get("/v1/surprise")
    async def surprise() -> None: ...

    with pytest.raises(KeyError, match="surprise"):
        openapi.document(app)


def test_the_document_is_served_and_sound(url: str, document: dict[str, Any]) -> None:
    served = httpx.get(f"{url}/openapi.json")
    assert served.json() == document
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            for item in node.values():
                yield from references(item)
        elif isinstance(node, list):
            for item in node:
                yield from references(item)

    for reference in set(references(document)):
        resolve(document, {"$ref": reference})
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)


def test_examples_are_valid_and_served(url: str, document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        if body := item.get("post", {}).get("requestBody"):
            content = body["content"]["application/json"]
            validator(document, content["schema"]).validate(content["example"])
            response = httpx.post(url + path, json=content["example"])
            assert response.status_code == 200, response.text
            answers = item["post"]["responses"]["200"]["content"]
            if "text/event-stream" in answers:
                streamed = httpx.post(url + path, json={**content["example"], "stream": True})
                assert streamed.headers["content-type"].startswith("text/event-stream")
                schema = schemathesis.openapi.from_url(f"{url}{paths.OPENAPI}")
                schema[path]["POST"].validate_response(streamed)


@pytest.mark.parametrize(
    ("budget", "accepted"), [(32, True), ("low", True), ("full", True), (31, False), ("lots", False), (1.5, False)]
)
def test_the_document_and_the_server_agree_on_budgets(
    url: str, document: dict[str, Any], budget: Any, accepted: bool
) -> None:
    check = validator(document, {"$ref": "#/components/schemas/ChatRequest"})
    in_image = ask(image())
    in_image["messages"][0]["content"][0]["image_url"]["visual_token_budget"] = budget
    for body in (ask(image(), visual_token_budget=budget), in_image):
        assert check.is_valid(body) == accepted
        assert (httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200) == accepted


@pytest.mark.parametrize(
    ("budget", "accepted"),
    [("32", True), ("low", True), ("full", True), ("1000000", True), ("31", False), ("lots", False), ("1.5", False)],
)
def test_the_document_and_the_server_agree_on_budgets_in_the_header(
    url: str, document: dict[str, Any], budget: str, accepted: bool
) -> None:
    for path, body in (("/v1/chat/completions", ask(image())), ("/v1/visual_tokens/count", ask(image()))):
        parameters = [resolve(document, node) for node in document["paths"][path]["post"]["parameters"]]
        (schema,) = [item["schema"] for item in parameters if item["name"] == "X-Visual-Token-Budget"]
        assert validator(document, schema).is_valid(budget) == accepted
        response = httpx.post(f"{url}{path}", json=body, headers={"X-Visual-Token-Budget": budget})
        assert (response.status_code == 200) == accepted


def test_every_header_of_an_answer_is_in_the_document(document: dict[str, Any]) -> None:
    with TestClient(make_app(Settings(requests_per_minute=1), FakeEngine())) as client:
        answers = [client.post("/v1/chat/completions", json=ask(image())) for _ in range(2)]
    for answer, status in zip(answers, (200, 429), strict=True):
        assert answer.status_code == status
        described = document["paths"]["/v1/chat/completions"]["post"]["responses"][str(status)]["headers"]
        sent = set(answer.headers) - {"content-type", "content-length"}
        assert sent == {name.lower() for name in described}


def test_unknown_fields_are_not_in_the_document(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "TokenizeRequest", "ImageUrl", "ImagePart"):
        assert schemas[name]["additionalProperties"] is False


def test_every_kind_of_error_has_the_documented_shape(url: str, document: dict[str, Any]) -> None:
    check = validator(document, {"$ref": "#/components/schemas/ErrorBody"})
    for response in (
        httpx.post(f"{url}/v1/chat/completions", content=b"{"),
        httpx.get(f"{url}/v1/chat/completions"),
        httpx.get(f"{url}/v1/nothing"),
    ):
        check.validate(response.json())


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_of_the_documents_makes_the_server_fail(url: str, mode: GenerationMode) -> None:
    """Bodies that fit the document, and bodies that do not."""
    schema = schemathesis.openapi.from_url(f"{url}{paths.OPENAPI}")
    failures: list[str] = []
    asked: dict[str, list[int]] = {}

    def try_out(operation: Any) -> None:
        @BOUNDED
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            response = case.call()
            asked.setdefault(operation.label, []).append(response.status_code)
            try:
                case.validate_response(response, checks=CHECKS)
            except (Failure, BaseExceptionGroup) as failure:
                failures.append(f"{operation.label}: {getattr(failure, 'exceptions', failure)}")

        run()

    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.body:
            try_out(operation)
    assert not failures, "\n\n".join(failures[:5])
    assert all(len(codes) >= EXAMPLES for label, codes in asked.items() if label.startswith("POST"))
    assert 200 in asked["POST /v1/chat/completions"] or mode is GenerationMode.NEGATIVE
    # schemathesis leaves out the route that it had the document from
    documented = httpx.get(f"{url}{paths.OPENAPI}").json()["paths"]
    assert len(operations) == sum(len(item) for item in documented.values()) - 1

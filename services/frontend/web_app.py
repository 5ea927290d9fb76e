"""Everything over HTTP that takes no body: health, readiness, models, documentation, and OpenAI's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from services.frontend.embeddings_route import EmbeddingsRequest
from services.frontend.http_errors import error_body, error_headers, http_status
from services.frontend.intake import Intake
from services.frontend.openai_requests import ChatRequest, CompletionRequest
from services.frontend.responses_api import ResponsesRequest
from services.frontend.served_model import ServedModel
from services.frontend.tokenize_routes import DetokenizeRequest, TokenizeRequest
from tandem.adapters.clock import unix_milliseconds
from tandem.errors import InvalidRequest, TandemError

#: Routes that are served in front of this app; it documents them.
POSTED = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def web_app(intake: Intake, readiness: Callable[[], Mapping[str, object]]) -> FastAPI:
    """``readiness`` gives ``ready`` and whatever explains it."""
    app = FastAPI(title="Tandem", description="OpenAI-compatible API", version="1", redoc_url=None)
    started = unix_milliseconds() // 1000
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Requests will be served: 200, or 503 and what is missing."""
        state = readiness()
        return JSONResponse(dict(state), status_code=200 if state["ready"] else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        intake.tenants.of_authorization(request.headers.get("authorization"))
        return {"object": "list", "data": [_model(model, started) for model in intake.models.values()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        intake.tenants.of_authorization(request.headers.get("authorization"))
        return _model(intake.model(model), started)

    app.add_exception_handler(TandemError, _tandem_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    return app


def _model(model: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "tandem",
        "max_model_len": model.max_model_len,
    }


async def _tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(error_body(error), http_status(error), headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if path in POSTED:
        status, headers = 405, {"allow": "POST"}
    else:
        status, headers = error.status_code, dict(error.headers or {})
    refused = InvalidRequest(f"{request.method} {path}: {'method not allowed' if status == 405 else error.detail}")
    return Response(error_body(refused), status, headers, "application/json")


async def _validation_error(request: Request, error: Exception) -> Response:
    refused = InvalidRequest(str(error))
    return Response(error_body(refused), http_status(refused), media_type="application/json")


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        refs, parts = msgspec.json.schema_components(POSTED.values(), ref_template="#/components/schemas/{name}")
        schema.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        for path, ref in zip(POSTED, refs, strict=True):
            schema["paths"][path] = {
                "post": {
                    "summary": path.removeprefix("/v1/").replace("/", " ").capitalize(),
                    "requestBody": {"required": True, "content": {"application/json": {"schema": ref}}},
                    "responses": {
                        "200": {
                            "description": "The answer, or with `stream` its events",
                            "content": {"application/json": {}, "text/event-stream": {}},
                        },
                        "default": {"description": 'An error: {"error": {"message", "type", "param", "code"}}'},
                    },
                }
            }
        app.openapi_schema = schema
    return app.openapi_schema

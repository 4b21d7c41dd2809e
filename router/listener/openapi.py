"""The API as an OpenAPI document, made from the very types that read the bodies.

Owns the words about each route. Never serves one."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from router.dialects.messages_schema import MessagesRequest
from router.dialects.responses_schema import ResponsesRequest
from router.dialects.schema import ChatRequest, CompletionRequest
from router.version import code_version
from router.workers.kv_hints import Envelope

POSTS: dict[str, tuple[type, str]] = {
    "/v1/chat/completions": (ChatRequest, "OpenAI chat completions"),
    "/v1/completions": (CompletionRequest, "OpenAI completions"),
    "/v1/responses": (ResponsesRequest, "OpenAI responses; none is kept"),
    "/v1/messages": (MessagesRequest, "Anthropic messages"),
    "/v1/messages/count_tokens": (MessagesRequest, "How many tokens a prompt of Anthropic's has"),
    "/v1/kv_hints": (Envelope, "What a client knows of its sessions' KV; answered by what was done"),
}
GETS = {
    "/": "Whether anybody is there",
    "/v1/models": "The models served",
    "/v1/models/{model}": "One model",
    "/livez": "Whether the router's loop runs",
    "/readyz": "Whether a worker has proved a step and none is draining",
    "/health": "The same as /readyz",
    "/openapi.json": "This document",
}
STREAMS = frozenset(POSTS) - {"/v1/messages/count_tokens", "/v1/kv_hints"}


@functools.cache
def document() -> bytes:
    """OpenAPI 3.1 as JSON."""
    _, components = msgspec.json.schema_components(
        [body for body, _ in POSTS.values()], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {path: {"get": _operation(words, is_stream=False)} for path, words in GETS.items()}
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    for path, (body, words) in POSTS.items():
        asked = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        request = {"required": True, "content": {"application/json": asked}}
        paths[path] = {"post": _operation(words, is_stream=path in STREAMS) | {"requestBody": request}}
    info = {"title": "Headway", "version": code_version(), "license": {"name": "Apache-2.0"}}
    return msgspec.json.encode(
        {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}
    )


def _operation(words: str, *, is_stream: bool) -> dict[str, Any]:
    kinds = ["application/json", *(["text/event-stream"] if is_stream else [])]
    return {"summary": words, "responses": {"200": {"description": "OK", "content": {kind: {} for kind in kinds}}}}

"""What goes wrong, in the form that OpenAI's clients understand."""

from __future__ import annotations

import traceback
import uuid
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ..config import nearest
from .schema import ChatRequest, CompletionRequest, EmbeddingRequest

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error",
    504: "timeout_error",
}  # fmt: skip
UNTYPED = ("union_tag_not_found", "union_tag_invalid")  # "type" says which of several objects one is


class ApiError(Exception):
    """An error with an HTTP status; `param` is the field that is wrong, `code` a name that programs may read."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "api_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, " ".join(message.split()), param=param, code=code)


def failed(error: Exception) -> ApiError:
    """What the client is told of a mistake of ours; the log is told all of it."""
    traceback.print_exception(error)
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


class Guard:
    """An ASGI application around another one, whose failures become answers, after which the connection can be used.
    Every answer gets an id, by which the official client knows it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False
        identity = (b"x-request-id", f"req_{uuid.uuid4().hex}".encode())

        async def told(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message | {"headers": [*message["headers"], identity]} if "headers" in message else message)

        try:
            await self.app(scope, receive, told)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            wrong = failed(error)
            await JSONResponse(wrong.body(), wrong.status)(scope, receive, told)


def queue_full(waiting: int, most: int) -> ApiError:
    message = f"{waiting} requests wait already; {most} may"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "5"})


def explain(error: RequestValidationError) -> ApiError:
    """What is wrong with the first field that is, in one line that names it as it was sent. Where a field may have
    several forms, the mistake is the one that was found furthest inside."""
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        why = found[0].get("ctx", {}).get("error", "it cannot be read")
        return bad(f"the body is not JSON: {why}", None, "bad_json")
    paths = [sent(each, error.body) for each in found]
    path = max((path for path in paths if path[:1] == paths[0][:1]), key=len)
    if not path:
        return bad(f"the body is wrong: {say(found[0])}; send a JSON object with Content-Type: application/json")
    field = ".".join(path)
    wrong = [each for each, other in zip(found, paths, strict=True) if other == path]
    match wrong[0]["type"]:
        case "extra_forbidden":
            known = (*ChatRequest.model_fields, *CompletionRequest.model_fields, *EmbeddingRequest.model_fields)
            return bad(f"unknown field {field!r}{nearest(path[-1], set(known))}", field, "unknown_field")
        case "none_required":
            return bad(f"{field} is not supported; leave it out", field, "unsupported_value")
    first, *others = dict.fromkeys(map(say, wrong))
    ways = "".join(f" or {other.removeprefix('Input should be ')}" for other in others)
    return bad(f"{field}: {first}{ways}", field, "invalid_value")


def sent(mistake: dict[str, Any], body: Any) -> list[str]:
    """The path of a mistake in the body: without the names of forms that pydantic tried, which the body lacks."""
    path: list[str] = []
    _, *place = mistake["loc"]
    for part in place:
        if body is mistake["input"]:
            break
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and part in range(len(body))):
            body = body[part]
            path.append(str(part))
    lacking = [str(place[-1])] if mistake["type"] == "missing" and place else []
    return path + lacking + (["type"] if mistake["type"] in UNTYPED else [])


def say(mistake: dict[str, Any]) -> str:
    """In JSON's terms."""
    match mistake["type"]:
        case "union_tag_not_found":
            return "Field required"
        case "union_tag_invalid":
            return f"Input should be {' or '.join(mistake['ctx']['expected_tags'].split(', '))}"
        case "model_attributes_type" | "model_type" | "dict_type":
            return "Input should be an object"
        case "list_type":
            return "Input should be a list"
    return str(mistake["msg"]).replace(" after validation", "")

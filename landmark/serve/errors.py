"""What goes wrong, in the form that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from ..config import nearest
from .schema import ChatRequest, CompletionRequest, EmbeddingRequest

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error",
    504: "timeout_error",
}  # fmt: skip


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


def explain(error: RequestValidationError | ValidationError) -> ApiError:
    """The first thing that is wrong, in one line that names the field."""
    first = error.errors()[0]
    kinds = ("body", "str", "list[constrained-int]", "list[str]")
    path = [
        str(part) for part in first["loc"] if part not in kinds and not str(part).startswith(("list[", "constrained"))
    ]
    field = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        known = (*ChatRequest.model_fields, *CompletionRequest.model_fields, *EmbeddingRequest.model_fields)
        return bad(f"unknown field {field!r}{nearest(path[-1], set(known))}", field, "unknown_field")
    if first["type"] == "json_invalid":
        return bad(f"the body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}", None, "bad_json")
    if field is None:
        return bad(f"the body is wrong: {first['msg']}; send a JSON object with Content-Type: application/json")
    return bad(f"{field}: {first['msg']}", field, "invalid_value")

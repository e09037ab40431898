"""Requests that a fuzzer makes of the OpenAPI description: whatever they are, no 500."""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from landmark.serve.app import create_app

from .conftest import served

schema = schemathesis.openapi.from_asgi("/openapi.json", create_app([served()]))


@schema.parametrize()
@settings(
    max_examples=int(os.environ.get("LANDMARK_FUZZ", "25")), deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_no_request_is_a_500(case: Any) -> None:
    if isinstance(case.body, dict) and "model" in case.body and len(str(case.body["model"])) % 2:
        case.body["model"] = "tiny"  # so that half of them get past the first check
    case.call_and_validate(checks=[not_a_server_error])

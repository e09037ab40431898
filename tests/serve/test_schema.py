"""Requests as OpenAI's own types describe them, and what is said of those that are not."""

from __future__ import annotations

import copy
import typing
from typing import Any

import httpx
import openai.types.chat as chat_types
import pytest
from openai.types import completion_create_params, embedding_create_params, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.shared_params import response_format_json_schema
from pydantic import BaseModel

from landmark.serve import served
from landmark.serve.schema import Message
from landmark.serve.served import as_plain

from .conftest import Live
from .test_api import HELLO, TOOLS

TALK = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "description": "b"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = {"role": "assistant", "content": "a", "tool_calls": [CALL]}
PLACES: dict[str, tuple[str, dict[str, Any], tuple[str | int, ...], Any]] = {
    "completion": (
        "completions", {"model": "tiny", "prompt": "a", "max_tokens": 1}, (),
        completion_create_params.CompletionCreateParamsNonStreaming,
    ),
    "embedding": (
        "embeddings", {"model": "vectors", "input": "a"}, (), embedding_create_params.EmbeddingCreateParams
    ),
    "chat": ("chat/completions", TALK, (), chat_create_params.CompletionCreateParamsNonStreaming),
    "stream_options": (
        "chat/completions", TALK | {"stream": True, "stream_options": {}}, ("stream_options",),
        chat_types.ChatCompletionStreamOptionsParam,
    ),
    "json_schema": (
        "chat/completions", TALK | {"response_format": FORM}, ("response_format", "json_schema"),
        response_format_json_schema.JSONSchema,
    ),
    "function": (
        "chat/completions", TALK | {"tools": TOOLS}, ("tools", 0, "function"), shared_params.FunctionDefinition
    ),
    "user": ("chat/completions", TALK, ("messages", 0), chat_types.ChatCompletionUserMessageParam),
    "assistant": (
        "chat/completions", TALK | {"messages": [SAID]}, ("messages", 0), chat_types.ChatCompletionAssistantMessageParam
    ),
    "answer": ("chat/completions", TALK | {"messages": [SAID]}, ("messages", 0), chat_types.ChatCompletionMessage),
    "text": (
        "chat/completions", TALK | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        ("messages", 0, "content", 0), chat_types.ChatCompletionContentPartTextParam,
    ),
}  # fmt: skip


def optional(form: Any) -> list[str]:
    """The fields of a request's part that may be left out, or null."""
    if issubclass(form, BaseModel):
        return [name for name, field in form.model_fields.items() if not field.is_required()]
    hints = typing.get_type_hints(form, include_extras=True)
    return [name for name, hint in hints.items() if typing.get_origin(hint) is not typing.Required]


@pytest.mark.parametrize("place", PLACES)
def test_null_is_the_same_as_nothing(tiny: Live, place: str) -> None:
    """For every field that OpenAI knows: alone, and together with all others."""
    path, body, inside, form = PLACES[place]
    names = optional(form)
    assert names
    for nulls in (*({name: None} for name in names), dict.fromkeys(names)):
        asked = copy.deepcopy(body)
        part: Any = asked
        for step in inside:
            part = part[step]
        part |= nulls
        answer = httpx.post(f"{tiny.url}/v1/{path}", json=asked)
        assert answer.status_code == 200, (list(nulls), answer.text)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": 5}, "tool_choice", "'none', 'auto' or 'required' or an object"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "Field required"),
    ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "Field required"),
    ({"tool_choice": {"type": "tool", "function": {"name": "a"}}}, "tool_choice.type", "should be 'function'"),
    ({"stop": 5}, "stop", "a valid string or a list"),
    ({"stop": {"str": 5}}, "stop", "a valid string or a list"),
    ({"stop": ["a", 5]}, "stop.1", "a valid string"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a valid string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.0.content.0.type", "Field required"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "Field required"),
    ({"messages": [*HELLO, {"role": "user", "content": [5]}]}, "messages.1.content.0", "an object"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"5": "x"}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"0" * 5000: 1}}, "logit_bias", "no token id"),
    ({"stop_token_ids": [5] * 5000}, "stop_token_ids", "at most 4096 items"),
    ({"functions": [{"name": "f"}]}, "functions", "is not supported"),
    ({"messages": HELLO * 20_000}, "messages", "20000 messages and parts; 16384 at most"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 200}] * 100},
        "messages",
        "16384 at most",
    ),
    ({"messages": HELLO * 600}, "messages", "takes 512 at most"),
    ({"prompt": 5}, "prompt", "a valid string"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({"prompt": [1, "a"]}, "prompt.1", "a valid integer"),
    ({"prompt": ["a", 1]}, "prompt.1", "a valid string"),
    ({"prompt": [[1], "a"]}, "prompt.1", "a list"),
    ({"prompt": [[1], [2, 2.5]]}, "prompt.1.1", "a valid integer"),
    ({"prompt": [[1], []]}, "prompt.1", "at least 1 item"),
    ({"prompt": ["a"] * 2049}, "prompt", "2048 at most"),
    ({"prompt": [1] * (1 << 21)}, "prompt", "2097152 token ids; 1048576 at most"),
    ({"prompt": [[1] * (1 << 18)] * 5}, "prompt", "1048576 at most"),
    ({"input": [[1], "a"]}, "input.1", "a list"),
    ({"input": ["a"] * 2049}, "input", "2048 at most"),
]


@pytest.mark.parametrize(("change", "param", "message"), WRONG, ids=[str(w[0])[:60] for w in WRONG])
def test_a_mistake_is_named_as_it_was_sent(tiny: Live, change: dict[str, Any], param: str, message: str) -> None:
    path = {"prompt": "completions", "input": "embeddings"}.get(next(iter(change)), "chat/completions")
    body = {"chat/completions": TALK, "completions": {"model": "tiny"}, "embeddings": {"model": "vectors"}}[path]
    answer = httpx.post(f"{tiny.url}/v1/{path}", json={**body, **change}, timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and message in error["message"], error


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None, "refusal": "I will not."}, "I will not."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}], "refusal": "b"}, "ab"),
        ({"content": None, "tool_calls": [CALL]}, ""),
        ({"tool_calls": [CALL]}, ""),
        ({"content": "a", "reasoning_content": "because"}, "a"),
    ],
)
def test_what_an_assistant_said(tiny: Live, message: dict[str, Any], content: str) -> None:
    said = {"role": "assistant", **message}
    plain = as_plain(Message.model_validate(said))
    assert plain["content"] == content and plain.get("reasoning_content") == message.get("reasoning_content")
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json={**TALK, "messages": [*HELLO, said, *HELLO]})
    assert answer.status_code == 200, answer.text


def test_biases_are_counted_for_each_answer(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer's settings are checked, and with a seed they are its own."""
    monkeypatch.setattr(served, "MOST_BIASES", 600)
    body = {**TALK, "logit_bias": {str(i): 1 for i in range(300)}}
    for answers, status in (({"n": 2}, 200), ({"n": 3}, 400), ({"n": 1, "best_of": 3}, 400)):
        answer = httpx.post(f"{tiny.url}/v1/chat/completions", json=body | answers)
        assert answer.status_code == status, answer.text
        assert status == 200 or answer.json()["error"]["param"] == "logit_bias"

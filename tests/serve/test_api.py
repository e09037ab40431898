"""OpenAI's protocol, as the official client and the evaluation harness use it."""

from __future__ import annotations

import asyncio
import codecs
import itertools
import json
import math
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import Whitespace

from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.serve.answers import prompt_offsets
from landmark.weights.tokenizer import Tokenizer

from .conftest import Live, model_and_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object", "properties": {"city": {"type": "string", "maxLength": 6}}, "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]  # fmt: skip


def client(tiny: Live) -> OpenAI:
    return OpenAI(base_url=tiny.url + "/v1", api_key="none", max_retries=0)


def expected(prompt: list[int], **settings: Any) -> Any:
    model, tokenizer = model_and_tokenizer()
    return generate(model, [prompt], Sampling(**settings), tokenizer=tokenizer)[0]


def test_models(tiny: Live) -> None:
    assert [m.id for m in client(tiny).models.list()] == ["tiny", "other", "vectors"]
    assert client(tiny).models.retrieve("other").id == "other"


def test_a_completion_is_what_the_library_generates(tiny: Live) -> None:
    _, tokenizer = model_and_tokenizer()
    prompt = "The with statement"
    want = expected(tokenizer.encode(prompt, special=True), temperature=0, max_tokens=12, stop_ids=())
    got = client(tiny).completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    assert got.choices[0].text == want.text and got.usage is not None and got.usage.completion_tokens == 12
    pieces = client(tiny).completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=12, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(piece.choices[0].text for piece in pieces) == want.text


def test_echo_with_logprobs_of_a_batch_of_ids(tiny: Live) -> None:
    """What lm-eval sends: token ids, echo, one token more; its log-probabilities are the model's."""
    model, _ = model_and_tokenizer()
    batch = [[5, 6, 7, 8], [9, 10, 11]]
    got = client(tiny).completions.create(
        model="tiny", prompt=batch, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for ids, choice in zip(batch, got.choices, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
        assert len(logprobs.tokens or ()) == len(logprobs.text_offset or ()) == len(ids) + 1
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        with torch.no_grad():
            table = model(torch.tensor([ids]))[0].log_softmax(-1)
        for i in range(1, len(ids)):
            assert math.isclose(logprobs.token_logprobs[i], table[i - 1, ids[i]].item(), abs_tol=1e-4)
            assert math.isclose(max(logprobs.top_logprobs[i].values()), table[i - 1].max().item(), abs_tol=1e-4)
        assert math.isclose(logprobs.token_logprobs[-1], table[-1].max().item(), abs_tol=1e-4)


@pytest.mark.parametrize("text", ["The with statement", "é naïve 漢字 🙂 go", "a<|im_start|> b", " two  spaces "])
@pytest.mark.parametrize("by_ids", [False, True])
def test_offsets_are_places_in_the_text(tiny: Live, text: str, by_ids: bool) -> None:
    """Every token that is whole text stands where its offset says; a part of a character where that one begins."""
    _, tokenizer = model_and_tokenizer()
    ids = tokenizer.encode(text, special=True)
    assert ids[0] == tokenizer.bos_id
    ours: Any = {"return_token_ids": True, "ignore_eos": True}
    asked: Any = {"model": "tiny", "prompt": ids if by_ids else text, "echo": True, "logprobs": 0, "max_tokens": 20}
    asked |= {"seed": 5, "temperature": 2.0, "extra_body": ours}
    (got,) = client(tiny).completions.create(**asked).choices
    assert got.logprobs is not None
    tokens, offsets = got.logprobs.tokens or [], got.logprobs.text_offset or []
    said: list[int] = got.token_ids  # type: ignore[attr-defined]
    specials, seen = tokenizer.special_ids, b""
    for n, (token, name, at) in enumerate(zip([*ids, *said], tokens, offsets, strict=True)):
        visible = token not in specials or (n < len(ids) and (by_ids or n > 0))
        if n == len(ids):
            assert got.text[:at].endswith(text) and at == len(got.text) - len(tokenizer.decode(said))
            seen = got.text[:at].encode()
        if visible and not name.startswith("bytes:"):
            assert got.text[at : at + len(name)] == name
        else:
            assert at == len(codecs.getincrementaldecoder("utf-8")("replace").decode(seen)), (n, name)
        seen += tokenizer.token_bytes(token) if visible else b""
    assert any(name.startswith("bytes:") for name in tokens)
    assert offsets == sorted(offsets)
    parts = [c.choices[0].logprobs.text_offset for c in client(tiny).completions.create(**asked, stream=True)]
    assert list(itertools.chain(*parts)) == offsets


def test_offsets_where_the_tokenizer_reads_another_text() -> None:
    tokenizer = Tokenizer(Backend(WordLevel({"[CLS]": 0, "é": 1, "cat": 2}, unk_token="[CLS]")))
    tokenizer.backend.normalizer, tokenizer.backend.pre_tokenizer = NFC(), Whitespace()
    assert prompt_offsets(tokenizer, "e\u0301 cat  cat", tokenizer.encode("e\u0301 cat  cat")) == [0, 3, 8]


def test_no_tokens_are_none_in_the_usage(tiny: Live) -> None:
    asked: Any = dict(model="tiny", prompt="import os", max_tokens=0, echo=True, logprobs=1)
    got = client(tiny).completions.create(**asked, extra_body={"return_token_ids": True})
    (choice,), usage = got.choices, got.usage
    assert usage is not None and usage.completion_tokens == 0 and usage.total_tokens == usage.prompt_tokens > 0
    assert choice.text == "import os" and choice.finish_reason == "length" and choice.token_ids == []  # type: ignore[attr-defined]
    assert choice.logprobs is not None and len(choice.logprobs.tokens or ()) == usage.prompt_tokens
    *_, last = client(tiny).completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.usage == usage


def test_chat_streamed_and_whole_are_equal(tiny: Live) -> None:
    asked: Any = dict(model="tiny", messages=HELLO, temperature=1, seed=7, max_tokens=20, logprobs=True, top_logprobs=3)
    whole = client(tiny).chat.completions.create(**asked, n=2)
    content: dict[int, str] = {0: "", 1: ""}
    scored: dict[int, list[Any]] = {0: [], 1: []}
    finish: dict[int, str | None] = {}
    usage = None
    for chunk in client(tiny).chat.completions.create(
        **asked, n=2, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content[choice.index] += choice.delta.content or ""
            scored[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
            finish[choice.index] = choice.finish_reason
    assert usage == whole.usage and usage is not None and usage.completion_tokens == sum(map(len, scored.values()))
    for choice in whole.choices:
        assert choice.message.content == content[choice.index] and choice.finish_reason == finish[choice.index]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        near = zip(choice.logprobs.content, scored[choice.index], strict=True)
        for a, b in near:
            assert a.token == b.token and math.isclose(a.logprob, b.logprob, abs_tol=1e-4) and len(a.top_logprobs) == 3
            assert bytes(a.bytes or ()).decode(errors="replace") or a.token == ""
    first = whole.choices[0].message.content
    assert first is not None and whole.choices[1].message.content != first


def test_async_and_many_at_once(tiny: Live) -> None:
    async def ask() -> list[str | None]:
        async with AsyncOpenAI(base_url=tiny.url + "/v1", api_key="none") as c:
            tasks = [
                c.chat.completions.create(model="tiny", messages=HELLO, seed=s % 3, max_tokens=8 + s % 3)  # type: ignore[arg-type]
                for s in range(12)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*tasks)]

    answers = asyncio.run(ask())
    assert answers[:3] * 4 == answers and len(set(answers)) == 3


class Person(BaseModel):
    age: int
    kind: bool


def test_parse(tiny: Live) -> None:
    got = client(tiny).chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Person, max_tokens=80, seed=1
    )  # type: ignore[arg-type]
    assert isinstance(got.choices[0].message.parsed, Person)
    ours: Any = {"response_format": {"type": "regex", "regex": "[ab]{4}x"}}
    got_ours = client(tiny).chat.completions.create(model="tiny", messages=HELLO, extra_body=ours)  # type: ignore[arg-type]
    text = got_ours.choices[0].message.content or ""
    assert len(text) == 5 and text[-1] == "x" and set(text[:4]) <= {"a", "b"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tool_calls_streamed_and_whole_are_equal(tiny: Live, choice: Any) -> None:
    asked: Any = dict(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice, seed=3, max_tokens=120)
    asked["parallel_tool_calls"] = False
    whole = client(tiny).chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    name, arguments, finish = "", "", None
    for chunk in client(tiny).chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            assert delta.index == 0 and delta.function is not None
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments, finish) == (call.function.name, call.function.arguments, "tool_calls")
    back: Any = [*HELLO, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client(tiny).chat.completions.create(model="tiny", messages=back, max_tokens=3).choices


def test_allowed_tools(tiny: Live) -> None:
    """The model may call some of the tools only, and is told of these."""
    other = {"type": "function", "function": {"name": "other"}}
    for mode in ("required", "auto"):
        names = [{"type": "function", "function": {"name": "other"}}]
        choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}
        asked: Any = dict(model="tiny", messages=HELLO, tools=[*TOOLS, other], max_tokens=120, seed=3)
        got = client(tiny).chat.completions.create(**asked, tool_choice=choice)
        alone = client(tiny).chat.completions.create(
            **{**asked, "tools": [other]}, tool_choice=mode, parallel_tool_calls=True
        )
        assert got.choices[0].message.content == alone.choices[0].message.content and got.usage == alone.usage
        calls = got.choices[0].message.tool_calls or []
        assert bool(calls) == (mode == "required") and all(call.function.name == "other" for call in calls)  # type: ignore[union-attr]
        names.append({"type": "function", "function": {"name": "nobody"}})
        with pytest.raises(openai.BadRequestError, match="names 'nobody', which is not among the tools"):
            client(tiny).chat.completions.create(**asked, tool_choice=choice)


def test_what_was_parsed_can_be_sent_back(tiny: Live) -> None:
    asked: Any = dict(model="tiny", tools=[openai.pydantic_function_tool(Person)], tool_choice="required", seed=1)
    got = client(tiny).chat.completions.parse(**asked, messages=HELLO, max_tokens=150, parallel_tool_calls=False)  # type: ignore[arg-type]
    message = got.choices[0].message
    assert message.tool_calls and isinstance(message.tool_calls[0].function.parsed_arguments, Person)
    back: Any = [*HELLO, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}]
    assert client(tiny).chat.completions.create(model="tiny", messages=back, max_tokens=2).choices
    raw = [*HELLO, message.to_dict(), back[-1]]
    answer = httpx.post(tiny.url + "/v1/chat/completions", json={"model": "tiny", "messages": raw, "max_tokens": 2})
    assert answer.status_code == 200, answer.text


def test_pieces_of_a_stream(tiny: Live) -> None:
    """Who speaks comes first for each answer; the usage is null until the last piece; every answer has an id."""
    asked = {"model": "tiny", "messages": HELLO, "n": 2, "max_tokens": 3, "stream": True}
    for told in (True, False):
        options = {"stream_options": {"include_usage": told}}
        answer = httpx.post(tiny.url + "/v1/chat/completions", json={**asked, **options})
        *lines, done = answer.text.strip().split("\n\n")
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert done == "data: [DONE]" and [p["choices"][0]["index"] for p in pieces[:2]] == [0, 1]
        assert all(p["choices"][0]["delta"] == {"role": "assistant", "content": ""} for p in pieces[:2])
        assert all(("usage" in p) == told for p in pieces)
        if told:
            *others, last = pieces
            assert all(p["usage"] is None for p in others) and last["choices"] == [] and last["usage"]["total_tokens"]
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/responses") as caught:
        client(tiny).responses.create(model="tiny", input="x")
    assert (caught.value.request_id or "").startswith("req_")
    got = [client(tiny).chat.completions.create(model="tiny", messages=HELLO, max_tokens=1) for _ in range(2)]  # type: ignore[arg-type]
    assert len({one._request_id for one in got} - {None}) == 2


def test_developers_speak_where_the_template_knows_systems_only(tiny: Live) -> None:
    ids = [
        httpx.post(tiny.url + "/tokenize", json={"messages": [{"role": role, "content": "x"}], "model": "tiny"}).json()
        for role in ("developer", "system")
    ]
    assert ids[0] == ids[1] and "tokens" in ids[0]


def test_forced_calls_that_are_cut_off(tiny: Live) -> None:
    """Wherever the answer ends, the second call is whole, begun, or not there, and never content."""
    asked: Any = dict(model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required", seed=1)
    asked["logit_bias"] = {str(model_and_tokenizer()[1].eos_id): -100}  # another call, as long as there is room
    made = set()
    for room in range(1, 110, 9):
        whole = client(tiny).chat.completions.create(**asked, max_tokens=room).choices[0]
        calls, content = list[list[str]](), ""
        for chunk in client(tiny).chat.completions.create(**asked, max_tokens=room, stream=True):
            content += chunk.choices[0].delta.content or ""
            for delta in chunk.choices[0].delta.tool_calls or ():
                assert delta.function is not None
                if delta.id is not None:
                    calls.append([delta.function.name or "", ""])
                calls[delta.index][1] += delta.function.arguments or ""
        assert (whole.message.content or "", content) == ("", "") and whole.finish_reason == "length"
        found = [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or ()]  # type: ignore[union-attr]
        assert found == calls
        made.add(len(calls))
    assert {0, 1, 2} <= made


def test_ids_and_sampled_logprobs(tiny: Live) -> None:
    ours: Any = {"return_token_ids": True, "logprobs_of": "sampled", "top_k": 1}
    got = client(tiny).completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, logprobs=0, extra_body=ours)
    choice: Any = got.choices[0]
    assert len(choice.token_ids) == 4 and choice.logprobs.token_logprobs == [0.0] * 4
    best = client(tiny).completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=6, best_of=4, n=2, seed=0)
    assert len(best.choices) == 2


def test_embeddings(tiny: Live) -> None:
    texts = ["a cat", "a dog that barks"]
    got = client(tiny).embeddings.create(model="vectors", input=texts)  # base64 underneath
    plain = client(tiny).embeddings.create(model="vectors", input=texts, encoding_format="float", dimensions=16)
    encoder: Any = tiny.models[2]
    torch.testing.assert_close(
        torch.tensor([d.embedding for d in got.data]), encoder.encoder.embed(texts), atol=1e-5, rtol=0
    )
    assert [len(d.embedding) for d in plain.data] == [16, 16]


def test_tokenize_and_back(tiny: Live) -> None:
    post = httpx.post(tiny.url + "/tokenize", json={"model": "tiny", "prompt": "import os"}).json()
    back = httpx.post(tiny.url + "/detokenize", json={"model": "tiny", "tokens": post["tokens"]}).json()
    assert back["prompt"].endswith("import os") and post["count"] == len(post["tokens"])
    chat = httpx.post(tiny.url + "/tokenize", json={"model": "tiny", "messages": HELLO}).json()
    assert chat["count"] > post["count"]


def test_metrics_and_health(tiny: Live) -> None:
    assert httpx.get(tiny.url + "/health").json() == {"status": "ok"}
    text = httpx.get(tiny.url + "/metrics").text
    assert 'landmark_engine_finished_total{model="tiny"}' in text and "landmark_time_to_first_token_seconds" in text
    assert set(httpx.get(tiny.url + "/stats").json()) == {"tiny", "other"}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("temperature", {"temperature": -1}, "temperature"),
    ("temperature", {"temperature": "hot"}, "temperature"),
    ("n", {"n": 10**6}, "n:"),
    ("n", {"n": 0}, "n:"),
    ("tempratur", {"tempratur": 1}, "did you mean 'temperature'"),
    ("logit_bias", {"logit_bias": {"x": 1}}, "no token id"),
    ("logit_bias", {"logit_bias": {"99999": 1}}, "no token id"),
    ("response_format", {"response_format": {"type": "json_schema"}}, "needs the field"),
    (
        "response_format",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
        "strin",
    ),
    ("response_format", {"response_format": {"type": "regex", "regex": "(a"}}, "regular expression"),
    ("response_format.type", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("tool_choice", {"tool_choice": "required"}, "no tools"),
    ("top_logprobs", {"top_logprobs": 3}, "needs logprobs"),
    ("best_of", {"best_of": 1, "n": 2}, "fewer than n"),
    ("stop", {"stop": ["x"] * 65}, "64 at most"),
    ("stop", {"stop": ""}, "is empty"),
    ("stop_token_ids", {"stop_token_ids": [10**7]}, "vocabulary ends"),
    ("messages", {"messages": []}, "messages"),
    ("messages.0.role", {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
]


@pytest.mark.parametrize(("param", "change", "message"), BAD, ids=[str(b[1])[:40] for b in BAD])
def test_bad_requests(tiny: Live, param: str, change: dict[str, Any], message: str) -> None:
    answer = httpx.post(tiny.url + "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == param and message in error["message"] and "\n" not in error["message"], error


def test_typed_errors(tiny: Live) -> None:
    c = client(tiny)
    with pytest.raises(openai.NotFoundError, match="served are: tiny, other, vectors"):
        c.completions.create(model="tinny", prompt="a")
    with pytest.raises(openai.BadRequestError, match="takes 512 at most") as caught:
        c.completions.create(model="tiny", prompt=[5] * 513)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="gives embeddings"):
        c.completions.create(model="vectors", prompt="a")
    for content, what in ((b"{bad", "JSON"), (b'{"model": "tiny", "prompt": "\xff"}', "JSON"), (b"[]", "body")):
        answer = httpx.post(tiny.url + "/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and what in answer.json()["error"]["message"], answer.text
    assert httpx.get(tiny.url + "/nope").status_code == 404
    assert httpx.get(tiny.url + "/v1/completions").status_code == 405

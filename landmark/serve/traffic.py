"""Mixed traffic for a server: whatever clients do, well-behaved or not, and what they are to get for it.

Each kind of `KINDS` is a client that comes once: it returns what it asked, if the answer can be asked for again, and
raises `Wrong` where the server did anything but what it should.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

WORDS = (
    "the a of to and in that it is was for on as with he be at by this had not are but from or have an they which "
    "you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into them can only other new some could time these two may then do first any my now such like our over man me "
    "even most made after also did many before must through back years where much your way well down should because "
    "each"
).split()
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
    {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0, "frequency_penalty": 0.3, "stop": ["\n\n"]},
)
SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["ada", "alan", "grace"]}, "sure": {"type": "boolean"}},
    "required": ["name", "sure"], "additionalProperties": False,
}  # fmt: skip
WRONG = {"name": "answer", "schema": {"type": 3}}
FORMS: tuple[dict[str, Any], ...] = (
    {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    {"type": "regex", "regex": "(yes|no), [0-9]{2,4}"},
    {"type": "grammar", "grammar": 'start: "[" item ("," item){0,4} "]"\nitem: /[a-z]{1,3}/'},
)
TOOL = {"type": "function", "function": {"name": "look", "description": "Look something up.", "parameters": SCHEMA}}


class Wrong(Exception):
    """The server did what it should not."""


@dataclass(frozen=True)
class Asked:
    """A request whose answer depends on nothing else, and what was said."""

    kind: str
    path: str
    body: dict[str, Any]
    said: Any


@dataclass(frozen=True)
class Target:
    """A server. `ids` are tokens of some text, `room` what a prompt and its answer may have together; `chats` whether
    `model` has a chat template; `vectors` names a model of embeddings, if one is served."""

    client: httpx.AsyncClient
    model: str
    room: int
    ids: list[int]
    chats: bool
    vectors: str | None

    @classmethod
    async def find(cls, client: httpx.AsyncClient, model: str | None = None) -> Target:
        """What a server serves. Raises ValueError where there is no decoder of that name."""
        listed = (await client.get("/v1/models")).json()["data"]
        decoders = {entry["id"]: entry for entry in listed if "max_model_len" in entry}
        if not decoders or (model is not None and model not in decoders):
            raise ValueError(f"the server has no decoder {model or ''}; it has {[entry['id'] for entry in listed]}")
        entry = decoders[model or next(iter(decoders))]
        answer = await client.post("/tokenize", json={"model": entry["id"], "prompt": " ".join(WORDS)})
        vectors = next((each["id"] for each in listed if each["id"] not in decoders), None)
        ids, room = answer.json()["tokens"], min(entry["max_model_len"] or 1024, 1024)
        if room < 64:
            raise ValueError(f"{entry['id']} takes texts of {room} tokens; mixed traffic needs 64 at least")
        return cls(client, entry["id"], room, ids, entry["chat"], vectors)

    # -- what to ask -----------------------------------------------------------------------------------------------

    def text(self, draw: random.Random) -> str:
        """Words of about a quarter of the room in tokens, at most."""
        most = max(1, self.room * len(WORDS) // (4 * len(self.ids)))
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    def tokens(self, draw: random.Random, most: int | None = None) -> list[int]:
        return draw.choices(self.ids, k=draw.randint(1, most or self.room // 4))

    def body(self, draw: random.Random, **more: Any) -> dict[str, Any]:
        """A request with a seed, so that its answer is certain."""
        count = draw.randint(1, min(64, self.room // 4))
        return {
            "model": self.model, "max_tokens": count, "seed": draw.randrange(2**31), "ignore_eos": draw.random() < 0.3,
            "return_token_ids": True, **draw.choice(SAMPLING), **more,
        }  # fmt: skip

    def chat(self, draw: random.Random, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.text(draw)}]
        return self.body(draw, messages=messages, **more)

    # -- asking ----------------------------------------------------------------------------------------------------

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        """What is said to a request, streamed if it says so: an entry for each choice."""
        if body.get("stream"):
            return await self.ask_stream(path, body)
        answer = await self.client.post(path, json=body)
        if answer.status_code != 200:
            raise Wrong(f"{answer.status_code} where 200 was due: {answer.text[:300]}")
        return said(answer.json())

    async def ask_stream(self, path: str, body: dict[str, Any], wait: Callable[[], float] = lambda: 0.0) -> Any:
        """The same of a stream, with a pause before each piece is read."""
        pieces = []
        async with self.client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise Wrong(f"{answer.status_code} where 200 was due: {(await answer.aread())[:300].decode()}")
            async for line in answer.aiter_lines():
                if pause := wait():
                    await asyncio.sleep(pause)
                if line.startswith("data: "):
                    pieces.append(line[6:])
        if not pieces or pieces[-1] != "[DONE]":
            raise Wrong(f"a stream ended with {pieces[-1][:300] if pieces else 'nothing'}")
        return said_in_pieces([json.loads(piece) for piece in pieces[:-1]])

    @asynccontextmanager
    async def line(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare connection, which is broken off at the end."""
        url = self.client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port or 80, limit=1 << 14)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def head(self, path: str, length: int | str) -> bytes:
        """Of a bare request; a length that is no number stands for pieces."""
        size = f"Content-Length: {length}" if isinstance(length, int) else f"Transfer-Encoding: {length}"
        key = self.client.headers.get("authorization")
        lines = [f"POST {path} HTTP/1.1", "Host: soak", "Content-Type: application/json", size]
        return "\r\n".join([*lines, *([f"Authorization: {key}"] if key else []), "", ""]).encode()


def said(answer: Mapping[str, Any]) -> Any:
    """What an answer says, without what is new each time (ids, times) or may differ by rounding (probabilities)."""
    if "data" in answer:
        return [entry["embedding"] for entry in answer["data"]]
    return [_choice(choice) for choice in answer["choices"]]


def _choice(choice: Mapping[str, Any]) -> list[Any]:
    message = choice.get("message") or {"content": choice.get("text")}
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or ()]
    return [message["content"] or "", calls, choice["token_ids"], choice["finish_reason"]]


def said_in_pieces(pieces: list[dict[str, Any]]) -> Any:
    """The same of the pieces of a stream."""
    found: dict[int, list[Any]] = {}
    for piece in pieces:
        if "error" in piece:
            raise Wrong(f"an error within a stream: {piece['error']['message']}")
        for choice in piece["choices"]:
            whole = found.setdefault(choice["index"], ["", [], [], None])
            delta = choice.get("delta") or {"content": choice.get("text")}
            whole[0] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(whole[1]):
                    whole[1].append([call["function"]["name"], ""])
                whole[1][call["index"]][1] += call["function"]["arguments"]
            whole[2] += choice.get("token_ids") or []
            whole[3] = choice["finish_reason"] or whole[3]
    return [found[index] for index in sorted(found)]


# -- kinds ------------------------------------------------------------------------------------------------------------

Kind = Callable[[Target, random.Random], Awaitable[Asked | None]]


async def _asked(target: Target, kind: str, path: str, body: dict[str, Any]) -> Asked:
    return Asked(kind, path, body, await target.ask(path, body))


async def completion(target: Target, draw: random.Random) -> Asked:
    body = target.body(draw, prompt=target.text(draw), stream=draw.random() < 0.5)
    return await _asked(target, "completion", "/v1/completions", body)


async def ids(target: Target, draw: random.Random) -> Asked:
    prompt: Any = target.tokens(draw)
    if draw.random() < 0.3:
        prompt = [target.tokens(draw) for _ in range(draw.randint(2, 4))]
    body = target.body(draw, prompt=prompt, stream=draw.random() < 0.5)
    return await _asked(target, "ids", "/v1/completions", body)


async def shared(target: Target, draw: random.Random) -> Asked:
    """One of four long beginnings."""
    beginning = random.Random(draw.randrange(4)).choices(target.ids, k=target.room // 2)
    body = target.body(draw, prompt=beginning + target.tokens(draw, target.room // 8), stream=draw.random() < 0.5)
    return await _asked(target, "shared", "/v1/completions", body)


async def chat(target: Target, draw: random.Random) -> Asked:
    return await _asked(target, "chat", "/v1/chat/completions", target.chat(draw, stream=draw.random() < 0.5))


async def several(target: Target, draw: random.Random) -> Asked:
    """Several answers; sometimes the best of more."""
    more = {"best_of": 4} if draw.random() < 0.3 else {"stream": draw.random() < 0.5}
    body = target.body(draw, prompt=target.tokens(draw), n=draw.randint(2, 4), **more)
    return await _asked(target, "several", "/v1/completions", body)


async def scored(target: Target, draw: random.Random) -> Asked:
    """Log-probabilities, of the prompt too."""
    body = target.body(draw, prompt=target.text(draw), logprobs=draw.randint(0, 8), echo=draw.random() < 0.5)
    return await _asked(target, "scored", "/v1/completions", body)


async def formed(target: Target, draw: random.Random) -> Asked:
    """Answers that keep to a form."""
    body = target.body(draw, prompt=target.text(draw), response_format=draw.choice(FORMS), stream=draw.random() < 0.5)
    return await _asked(
        target, "formed", "/v1/completions", body | {"max_tokens": 64, "ignore_eos": False, "stop": None}
    )


async def tools(target: Target, draw: random.Random) -> Asked:
    choice = draw.choice(["auto", "required", {"type": "function", "function": {"name": "look"}}])
    body = target.chat(draw, tools=[TOOL], tool_choice=choice, stream=draw.random() < 0.5)
    return await _asked(target, "tools", "/v1/chat/completions", body | {"ignore_eos": False, "stop": None})


async def vectors(target: Target, draw: random.Random) -> None:
    texts = [target.text(draw)[:200] for _ in range(draw.randint(1, 4))]
    body = {"model": target.vectors, "input": texts, "encoding_format": draw.choice(["float", "base64"])}
    found = await target.ask("/v1/embeddings", body)
    if len(found) != len(texts):
        raise Wrong(f"{len(found)} vectors of {len(texts)} texts")


async def leave(target: Target, draw: random.Random) -> None:
    """Go in the middle of a stream."""
    body = target.body(draw, prompt=target.tokens(draw), stream=True, n=draw.choice([1, 1, 3]))
    body |= {"max_tokens": target.room // 2, "ignore_eos": True}
    async with target.client.stream("POST", "/v1/completions", json=body) as answer:
        stay = draw.randint(0, 40)
        async for _ in answer.aiter_lines():
            stay -= 1
            if stay < 0:
                return


async def hang_up(target: Target, draw: random.Random) -> None:
    """Go before there is an answer: in the middle of the request, or just after it."""
    body = target.body(draw, prompt=target.tokens(draw), stream=draw.random() < 0.5)
    sent = json.dumps(body | {"max_tokens": target.room // 2, "ignore_eos": True}).encode()
    async with target.line() as (_, writer):
        cut = len(sent) if draw.random() < 0.7 else draw.randrange(len(sent))
        writer.write(target.head("/v1/completions", len(sent)) + sent[:cut])
        await asyncio.sleep(draw.choice([0.0, 0.005, 0.05, 0.2]))


async def slow_reader(target: Target, draw: random.Random) -> Asked:
    body = target.body(draw, prompt=target.tokens(draw), stream=True, logprobs=5)
    wait = lambda: draw.random() * 0.1
    return Asked("slow_reader", "/v1/completions", body, await target.ask_stream("/v1/completions", body, wait))


async def deaf(target: Target, draw: random.Random) -> None:
    """Ask for much and read none of it."""
    body = target.body(draw, prompt=target.tokens(draw), stream=True, logprobs=20, n=4, max_tokens=target.room // 2)
    sent = json.dumps(body).encode()
    async with target.line() as (_, writer):
        writer.write(target.head("/v1/completions", len(sent)) + sent)
        await asyncio.sleep(1 + 2 * draw.random())


async def slow_writer(target: Target, draw: random.Random) -> None:
    """A request that arrives bit by bit."""
    sent = json.dumps(target.body(draw, prompt=target.tokens(draw), max_tokens=4)).encode()
    async with target.line() as (reader, writer):
        writer.write(target.head("/v1/completions", len(sent)))
        for start in range(0, len(sent), 1 + len(sent) // 5):
            writer.write(sent[start : start + 1 + len(sent) // 5])
            await asyncio.sleep(0.1 * draw.random())
        status = await reader.readline()
        if b" 200 " not in status:
            raise Wrong(f"{status!r} to a request that came slowly")


async def huge(target: Target, draw: random.Random) -> None:
    """A body that says that it is too large, or turns out to be."""
    async with target.line() as (reader, writer):
        try:
            if draw.random() < 0.8:
                writer.write(target.head("/v1/completions", 1 << 40))
            else:
                writer.write(target.head("/v1/completions", "chunked"))
                for _ in range(10):
                    writer.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
                    await writer.drain()
            status = await reader.readline()
        except ConnectionError:
            return  # it was refused before all of it was sent
        if status and b" 413 " not in status:
            raise Wrong(f"{status!r} to a body without end")


def bad_requests(target: Target, draw: random.Random) -> list[tuple[str, Any, int]]:
    """Paths, bodies (bytes as they are), and the status that each is to get."""
    good = target.body(draw, prompt=target.tokens(draw))
    return [
        ("/v1/completions", b'{"model": ', 400),
        ("/v1/completions", b'{"model": "\xff\xfe"}', 400),
        ("/v1/completions", b"[" * 10_000, 400),
        ("/v1/completions", [good], 400),
        ("/v1/completions", good | {"promt": "x"}, 400),
        ("/v1/completions", good | {"temperature": "hot"}, 400),
        ("/v1/completions", good | {"temperature": -1}, 400),
        ("/v1/completions", good | {"n": 10**9}, 400),
        ("/v1/completions", good | {"max_tokens": 2**70}, 400),
        ("/v1/completions", good | {"prompt": []}, 400),
        ("/v1/completions", good | {"prompt": [2**30]}, 400),
        ("/v1/completions", good | {"prompt": draw.choices(target.ids, k=100_000)}, 400),
        ("/v1/completions", good | {"logit_bias": {"-1": 5}}, 400),
        ("/v1/completions", good | {"stop": ["x"] * 65}, 400),
        ("/v1/completions", good | {"response_format": {"type": "regex", "regex": "("}}, 400),
        ("/v1/completions", good | {"response_format": {"type": "grammar", "grammar": "start: nothing"}}, 400),
        ("/v1/completions", good | {"response_format": {"type": "json_schema", "json_schema": WRONG}}, 400),
        ("/v1/completions", good | {"model": "no such model"}, 404),
        ("/v1/chat/completions", target.body(draw, messages=[]), 400),
        ("/v1/chat/completions", target.body(draw, messages=[{"role": "nobody", "content": "x"}]), 400),
        ("/v1/chat/completions", target.chat(draw, tool_choice="required"), 400),
        ("/v1/embeddings", {"model": target.model, "input": "x"}, 400),
        ("/v1/nothing", good, 404),
        ("/detokenize", {"model": target.model, "tokens": [2**31 - 1]}, 400),
    ]  # fmt: skip


async def bad(target: Target, draw: random.Random) -> None:
    """A request that is wrong gets an error that says so."""
    path, body, due = draw.choice(bad_requests(target, draw))
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await target.client.post(path, content=content, headers={"Content-Type": "application/json"})
    if answer.status_code != due or not answer.json().get("error", {}).get("message"):
        raise Wrong(f"{answer.status_code} where {due} was due: {path} {content[:200]!r}: {answer.text[:200]}")


async def look(target: Target, draw: random.Random) -> None:
    """Figures, lists and the small routes."""
    for path in ("/health", "/v1/models", "/stats", "/metrics", f"/v1/models/{target.model}"):
        if (status := (await target.client.get(path)).status_code) != 200:
            raise Wrong(f"{status} from {path}")


KINDS: dict[Kind, float] = {
    completion: 4, ids: 3, shared: 4, chat: 4, several: 2, scored: 2, formed: 2, tools: 2, vectors: 2, leave: 3,
    hang_up: 2, slow_reader: 0.3, deaf: 0.2, slow_writer: 0.3, huge: 0.2, bad: 4, look: 0.5,
}  # fmt: skip


def kinds(target: Target) -> dict[Kind, float]:
    """What can be asked of a server, and how often."""
    lacking = [*([] if target.chats else [chat, tools]), *([] if target.vectors else [vectors])]
    return {kind: weight for kind, weight in KINDS.items() if kind not in lacking}

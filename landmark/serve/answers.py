"""From the engine's events to what the protocol sends, whole or in pieces."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ..infer.engine import Event, Handle
from ..weights.tokenizer import StreamDecoder, Tokenizer
from .reasoning import BEGIN, END, ReasoningReader
from .schema import ChatRequest, CompletionRequest, Generation
from .served import Served
from .tools import Delta, ToolReader


def usage(handles: list[Handle], choices: Sequence[TextChoice | ChatChoice]) -> dict[str, Any]:
    """Tokens that were read and said; those of a prompt count once, however many answers it has."""
    said = sum(len(choice.tokens) for choice in choices)
    thoughts = [choice.thought_tokens for choice in choices if isinstance(choice, ChatChoice) and choice.thinker]
    read = sum(len(handle.request.prompt) for handle in handles)
    cached = sum(handle.cached for handle in handles)
    found: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
    found["prompt_tokens_details"] = {"cached_tokens": cached}
    if thoughts:
        found["completion_tokens_details"] = {"reasoning_tokens": sum(thoughts)}
    return found


def head(kind: str, served: Served, prefix: str) -> dict[str, Any]:
    """The fields that all parts of an answer share."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": served.name}


# -- completions ------------------------------------------------------------------------------------------------------


class Ruler:
    """Measures a text that is put together of tokens: where each begins, in characters from `at` on. One that is a part
    of a character begins where that does; one that is no text, where the next one will."""

    def __init__(self, tokenizer: Tokenizer, stream: StreamDecoder, at: int = 0) -> None:
        self._tokenizer, self._stream, self.at = tokenizer, stream, at

    def start(self, token: int) -> int:
        before = self.at
        self.at += len(self._stream.step(token))
        try:
            own = len(self._tokenizer.token_bytes(token).decode())
        except UnicodeDecodeError:
            return before
        return max(before, self.at + len(self._stream.held) - own)


def prompt_offsets(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[int]:
    """Where the tokens of a prompt begin in its text, in which those that were put before it have no place."""
    ruler, offsets = Ruler(tokenizer, tokenizer.stream(skip_special=False)), []
    for token in ids:
        added = token in tokenizer.special_ids and not text.startswith(tokenizer.id_to_token(token) or "", ruler.at)
        offsets.append(ruler.at if added else ruler.start(token))
    if ruler.at == len(text):
        return offsets
    own = tokenizer.backend.encode(text, add_special_tokens=True).offsets  # it reads another text than this one
    return list(accumulate((start for start, _ in own[: len(ids)]), max))


@dataclass
class TextChoice:
    """One answer to one prompt, as it grows: its text, and log-probabilities in the form of the older API."""

    served: Served
    body: CompletionRequest
    index: int
    handle: Handle
    tokens: list[int] = field(default_factory=list)
    _ruler: Ruler | None = None  # of what is said; there is one as soon as something was

    def feed(self, event: Event) -> dict[str, Any]:
        """The choice as the piece of a stream that this event is. Where no token was asked for, the engine's one only
        tells that the prompt is read."""
        first, said = self._ruler is None, self.body.max_tokens != 0
        echoed = self._echo() if first and self.body.echo else ""
        if self._ruler is None:
            tokenizer = self.served.tokenizer
            self._ruler = Ruler(tokenizer, tokenizer.stream(self.handle.request.prompt), len(echoed))
        piece: dict[str, Any] = {"text": echoed + (event.text if said else ""), "index": self.index}
        piece["finish_reason"] = event.finish if said else "length"
        piece["logprobs"] = None if self.body.logprobs is None else self._logprobs(event, self._ruler, first, said)
        if self.body.return_token_ids:
            piece["token_ids"] = [event.token] if said else []
            if first:
                piece["prompt_token_ids"] = list(self.handle.request.prompt)
        if said:
            self.tokens.append(event.token)
        return piece

    def _echo(self) -> str:
        given = self.body.prompt
        return given if isinstance(given, str) else self.served.tokenizer.decode(self.handle.request.prompt, False)

    def _logprobs(self, event: Event, ruler: Ruler, first: bool, said: bool) -> dict[str, Any]:
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self.body.echo and first:
            prompt = self.handle.request.prompt
            offsets = prompt_offsets(self.served.tokenizer, self._echo(), prompt)
            scored = [((prompt[0], None), None), *self.handle.prompt_logprobs]
            for offset, ((token, logprob), top) in zip(offsets, scored, strict=True):
                self._add(out, offset, token, logprob, top)
        if said:
            self._add(out, ruler.start(event.token), event.token, event.logprob, event.top)
        return out

    def _add(self, out: dict[str, Any], offset: int, token: int, logprob: float | None, top: Any) -> None:
        text = self.served.token_text(token)
        out["tokens"].append(text)
        out["token_logprobs"].append(None if logprob is None else finite(logprob))
        likeliest = None if top is None else {self.served.token_text(t): finite(p) for t, p in top}
        if likeliest is not None and logprob is not None:
            likeliest.setdefault(text, finite(logprob))
        out["top_logprobs"].append(likeliest)
        out["text_offset"].append(offset)


def merge_pieces(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of one choice as the whole that is sent where nothing is streamed."""
    whole = {**pieces[0], "text": "".join(p["text"] for p in pieces), "finish_reason": pieces[-1]["finish_reason"]}
    if pieces[0]["logprobs"] is not None:
        whole["logprobs"] = {key: [x for p in pieces for x in p["logprobs"][key]] for key in pieces[0]["logprobs"]}
    if "token_ids" in pieces[0]:
        whole["token_ids"] = [token for p in pieces for token in p["token_ids"]]
    return whole


# -- chats ------------------------------------------------------------------------------------------------------------


@dataclass
class ChatChoice:
    """One answer in a conversation, as it grows: what is thought, content, tool calls, log-probabilities."""

    served: Served
    body: ChatRequest
    index: int
    thinker: ReasoningReader | None
    reader: ToolReader | None
    marks: dict[int, str]  # special tokens that the two look for
    tokens: list[int] = field(default_factory=list)
    scored: list[dict[str, Any]] = field(default_factory=list)
    thought: str = ""
    thought_tokens: int = 0
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    @classmethod
    def of(cls, served: Served, body: ChatRequest, prompt: Sequence[int], index: int) -> ChatChoice:
        names = [tool.function.name for tool in body.offered]
        reader = ToolReader(served.dialect, names, body.must_call) if names else None
        thinker = served.reader(body, prompt)
        marks = [*((BEGIN, END) if thinker else ()), *([served.dialect.begin] if reader else ())]
        return cls(served, body, index, thinker, reader, served.special(marks))

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """Pieces of a stream: choices with a delta each."""
        self.tokens.append(event.token)
        scored = [self._score(event)] if self.body.logprobs else None
        self.scored += scored or []
        deltas = self._deltas(event)
        if event.finish is not None:
            self.finish = "tool_calls" if self.calls and event.finish == "stop" else event.finish
        told = scored or event.finish or self.body.return_token_ids  # though there is no text yet
        pieces = [self._piece(delta) for delta in deltas] or ([self._piece({})] if told else [])
        if scored and pieces:
            pieces[0]["logprobs"] = {"content": scored, "refusal": None}
        if pieces and self.body.return_token_ids:
            pieces[0]["token_ids"] = [event.token]
        if event.finish is not None:
            pieces[-1]["finish_reason"] = self.finish
        return pieces

    def _deltas(self, event: Event) -> list[dict[str, Any]]:
        mark, deltas = self.marks.get(event.token, ""), list[dict[str, Any]]()
        if mark in (BEGIN, END) and self.thinker is not None and self.thinker.part == "answer":
            mark = ""  # a special token as any other
        text = mark + event.text
        if self.thinker is not None:
            thought, text = self.thinker.feed(text)
            self.thought_tokens += self.thinker.part == "thought"
            if event.finish is not None:
                last, rest = self.thinker.finish()
                thought, text = thought + last, text + rest
            if thought:
                self.thought += thought
                deltas.append({"reasoning_content": thought})
        if self.reader is None:
            self.content += text
            return [*deltas, {"content": text}] if text else deltas
        found = self.reader.feed(text)
        if event.finish is not None:
            found += self.reader.finish()
        return deltas + [self._take(delta) for delta in found]

    def _take(self, delta: Delta) -> dict[str, Any]:
        if delta.index is None:
            self.content += delta.content
            return {"content": delta.content}
        if delta.name is not None:
            function = {"name": delta.name, "arguments": ""}
            call: dict[str, Any] = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            self.calls.append(call)
            return {"tool_calls": [{"index": delta.index, **call, "function": dict(function)}]}
        self.calls[delta.index]["function"]["arguments"] += delta.arguments
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]}

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def opening(self) -> dict[str, Any]:
        """The first piece: who speaks."""
        return self._piece({"role": "assistant", "content": ""})

    def whole(self) -> dict[str, Any]:
        """The choice that is sent where nothing is streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        if self.thinker is not None:
            message["reasoning_content"] = self.thought or None
        logprobs = {"content": self.scored, "refusal": None} if self.body.logprobs else None
        finish = self.finish or "length"
        whole = {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": finish}
        return {**whole, "token_ids": self.tokens} if self.body.return_token_ids else whole

    def _score(self, event: Event) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            data = self.served.token_bytes(token)
            return {"token": self.served.token_text(token), "logprob": finite(logprob or 0.0), "bytes": list(data)}

        return {**entry(event.token, event.logprob), "top_logprobs": [entry(t, p) for t, p in event.top]}


def finite(logprob: float) -> float:
    """JSON has no infinities: what is impossible is very unlikely."""
    return max(logprob, -9999.0)


async def gather(handles: list[Handle]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several requests, with the number of the request, as they come."""
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def drain(number: int, handle: Handle) -> None:
        try:
            async for event in handle:
                queue.put_nowait((number, event))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    if len(handles) == 1:
        async for event in handles[0]:
            yield 0, event
        return
    tasks = [asyncio.create_task(drain(n, handle)) for n, handle in enumerate(handles)]
    try:
        left = len(handles)
        while left:
            number, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()


def usage_to_come(body: Generation) -> dict[str, Any]:
    """What each piece of a stream says of the usage where the last one is to tell it."""
    return {"usage": None} if body.stream_options is not None and body.stream_options.include_usage else {}

"""The application: routes of OpenAI's protocol, over one engine a model.

app = create_app([Served("my-model", Engine(model, tokenizer), tokenizer)], Limits(keys=["secret"]))
"""

from __future__ import annotations

import asyncio
import base64
import gc
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .. import malloc
from ..infer.engine import EngineError, Event, Handle
from ..infer.engine import Request as Wanted
from ..infer.engine.engine import GUIDE_FAILED
from .answers import ChatChoice, TextChoice, gather, head, merge_pieces, usage, usage_to_come
from .deadlines import Deadlines, shutting_down
from .errors import ApiError, Guard, bad, explain, queue_full
from .limits import Gate, Limits
from .metrics import Counted, Metrics
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .served import Served, ServedEncoder, decoder, find
from .stream import Gone, Stream, unless_gone

PAGE = Path(__file__).with_name("page")
TRIM_EVERY = 20.0  # seconds
T = TypeVar("T")


class Error(BaseModel):
    """What every error looks like."""

    error: dict[str, Any]


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}
MOST_ANSWERS = 2048  # of one call
SMALL = 1 << 14  # bytes of a request that is read in less time than a thread takes to begin
READERS = 2  # threads: each one more that computes keeps the event loop waiting for its turn


class Server:
    """What the routes share: models, limits, figures."""

    def __init__(self, models: Sequence[Served | ServedEncoder], limits: Limits) -> None:
        self.models = {served.name: served for served in models}
        if len(self.models) != len(models):
            raise ValueError("two models are served under one name; give each its own")
        self.limits, self.metrics = limits, Metrics(self.models)
        self.deadlines = Deadlines(limits.timeout)
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self.reading = 0

    async def read(self, request: Request, work: Callable[[], T], *, always: bool = False) -> T:
        """Do the work that it takes to understand a request: of a large one (or `always`) in a thread, so that everyone
        else is served meanwhile. The large ones share two, so that the small ones do not wait for them."""
        large = len(await request.body()) > SMALL
        if not large and not always:
            return work()
        if self.reading >= self.limits.queue:
            raise queue_full(self.reading, self.limits.queue)
        self.reading += 1
        try:
            async with self.deadlines.within():
                loop = asyncio.get_running_loop()
                return await unless_gone(request, loop.run_in_executor(self.readers if large else None, work))
        finally:
            self.reading -= 1

    def drain(self) -> None:
        """The server is about to end: nothing new is taken, and what runs has little time left."""
        if not self.deadlines.draining:
            self.deadlines.drain(self.limits.drain)

    async def submit(self, served: Served, requests: Sequence[Wanted]) -> list[Handle]:
        """Into the engine's queue. Raises a 429 where it is full, a 503 where the server is about to end."""
        if self.deadlines.draining:
            raise shutting_down()
        if not served.engine.running:
            raise ApiError(503, f"the engine of {served.name} has ended; the server is to be restarted", code="ended")
        waiting = served.engine.stats().waiting
        if waiting >= self.limits.queue:
            raise queue_full(waiting, self.limits.queue)
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(served.engine.submit(request))
                if len(handles) % 16 == 0:
                    await asyncio.sleep(0)  # others have their turn
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, ValueError):
                raise bad(str(error)) from None
            raise
        return handles

    async def events(self, served: Served, handles: list[Handle]) -> AsyncIterator[tuple[int, Event]]:
        """Of all handles, timed; whatever ends this early cancels the requests."""
        began = last = time.perf_counter()
        first = True
        try:
            async with self.deadlines.within():
                async for number, event in gather(handles):
                    now = time.perf_counter()
                    (self.metrics.first if first else self.metrics.between).labels(served.name).observe(now - last)
                    first, last = False, now
                    yield number, event
        except EngineError as error:
            if str(error).startswith(GUIDE_FAILED):
                raise bad(str(error), "response_format", "invalid_form") from None
            raise ApiError(500, str(error), code="engine_error") from None
        finally:
            for handle in handles:
                if not handle.done:
                    handle.cancel()
            self.metrics.whole.labels(served.name).observe(time.perf_counter() - began)

    # -- completions -----------------------------------------------------------------------------------------------

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        served = decoder(self.models, body.model)
        given = body.prompt
        batch: Any = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        if len(batch) > MOST_ANSWERS:
            raise bad(f"{len(batch)} prompts; {MOST_ANSWERS} at most", "prompt")
        if body.stream and (body.best_of or 1) > (body.n or 1):
            raise bad("best_of cannot be streamed", "best_of")
        if (answers := len(batch) * max(body.n or 1, body.best_of or 1)) > MOST_ANSWERS:
            raise bad(f"prompts times answers are {answers}; {MOST_ANSWERS} at most", "n")
        wanted = await self.read(
            request, lambda: [served.completion(body, prompt) for prompt in served.prompts(batch)],
            always=body.response_format is not None,
        )  # fmt: skip
        handles = await self.submit(served, wanted)
        shared, n = head("text_completion", served, "cmpl"), body.n or 1
        choices = [
            TextChoice(served, body if isinstance(given, str) else _one(body, batch[k]), k * n + i, handles[k])
            for k in range(len(batch))
            for i in range(n)
        ]
        if body.stream:
            shared |= usage_to_come(body)

            async def pieces() -> AsyncGenerator[dict[str, Any]]:
                async for number, event in self.events(served, handles):
                    yield {**shared, "choices": [choices[number * n + event.index].feed(event)]}
                if "usage" in shared:
                    yield {**shared, "choices": [], "usage": usage(handles, choices)}

            return Stream(pieces(), handles)
        parts: list[list[dict[str, Any]]] = [[] for _ in choices]

        async def collect() -> None:
            async for number, event in self.events(served, handles):
                parts[number * n + event.index].append(choices[number * n + event.index].feed(event))

        await unless_gone(request, collect())
        return JSONResponse({**shared, "choices": [merge_pieces(p) for p in parts], "usage": usage(handles, choices)})

    # -- chats -----------------------------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        served = decoder(self.models, body.model)
        if body.stream and (body.best_of or 1) > (body.n or 1):
            raise bad("best_of cannot be streamed", "best_of")

        def understand() -> Wanted:
            prompt = served.chat_prompt(body.messages, body.offered, body.chat_template_kwargs)
            return served.chat(body, prompt)

        wanted = await self.read(request, understand, always=body.response_format is not None or body.must_call)
        handles = await self.submit(served, [wanted])
        choices = [ChatChoice.of(served, body, wanted.prompt, i) for i in range(body.n or 1)]
        if body.stream:
            shared = head("chat.completion.chunk", served, "chatcmpl") | usage_to_come(body)

            async def pieces() -> AsyncGenerator[dict[str, Any]]:
                for choice in choices:
                    yield {**shared, "choices": [choice.opening()]}
                async for _, event in self.events(served, handles):
                    for piece in choices[event.index].feed(event):
                        yield {**shared, "choices": [piece]}
                if "usage" in shared:
                    yield {**shared, "choices": [], "usage": usage(handles, choices)}

            return Stream(pieces(), handles)

        async def collect() -> None:
            async for _, event in self.events(served, handles):
                choices[event.index].feed(event)

        await unless_gone(request, collect())
        shared = head("chat.completion", served, "chatcmpl")
        whole = [choice.whole() for choice in choices]
        return JSONResponse({**shared, "choices": whole, "usage": usage(handles, choices)})

    # -- the rest --------------------------------------------------------------------------------------------------

    async def embeddings(self, body: EmbeddingRequest) -> Response:
        served = find(self.models, body.model)
        if not isinstance(served, ServedEncoder):
            raise bad(f"{served.name} generates and gives no embeddings", "model")
        given = [body.input] if isinstance(body.input, str) else body.input
        if not all(isinstance(text, str) for text in given):
            raise bad("input is token ids; give texts, which the model's own tokenizer reads", "input")
        if len(given) > MOST_ANSWERS:
            raise bad(f"{len(given)} texts; {MOST_ANSWERS} at most", "input")
        texts = [text for text in given if isinstance(text, str)]

        def embed() -> tuple[np.ndarray, int]:
            vectors = served.encoder.embed(texts, cut=False).float().numpy()
            return vectors, sum(map(len, served.encoder.encode(texts)))

        try:
            async with self.deadlines.within():
                vectors, read = await asyncio.to_thread(embed)
        except ValueError as error:
            raise bad(str(error), "input") from None
        if body.dimensions is not None:
            if body.dimensions > vectors.shape[1]:
                raise bad(f"dimensions is {body.dimensions}, but vectors have {vectors.shape[1]}", "dimensions")
            vectors = vectors[:, : body.dimensions]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        coded = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(vector.tobytes()).decode() if coded else vector.tolist(),
            }
            for i, vector in enumerate(np.ascontiguousarray(vectors, dtype=np.float32))
        ]
        spent = {"prompt_tokens": read, "total_tokens": read}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": spent})

    async def tokenize(self, body: TokenizeRequest, request: Request) -> Response:
        served = decoder(self.models, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad("give either a prompt or messages", "prompt")

        def encode() -> Response:
            if body.messages is not None:
                ids = served.chat_prompt(body.messages)
            else:
                ids = served.tokens(body.prompt or "", body.add_special_tokens)
            return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": served.engine.longest})

        return await self.read(request, encode)

    async def detokenize(self, body: DetokenizeRequest, request: Request) -> Response:
        served = decoder(self.models, body.model)
        return await self.read(request, lambda: JSONResponse({"prompt": served.text(body.tokens)}))

    def listing(self) -> dict[str, Any]:
        data = []
        for served in self.models.values():
            entry = {"id": served.name, "object": "model", "created": served.created, "owned_by": "landmark"}
            if isinstance(served, Served):
                chats = served.tokenizer.chat_template is not None
                entry |= {"max_model_len": served.engine.longest, "chat": chats}
                if served.base is not None:
                    entry |= {"root": served.base.name, "parent": served.base.name}
            data.append(entry)
        return {"object": "list", "data": data}

    def stats(self) -> dict[str, Any]:
        return {name: asdict(s.engine.stats()) for name, s in self.models.items() if isinstance(s, Served)}


async def keep_trim() -> None:
    """Give free memory back for ever, beside the event loop."""
    while True:
        await asyncio.sleep(TRIM_EVERY)
        await asyncio.to_thread(malloc.trim)


def create_app(models: Sequence[Served | ServedEncoder], limits: Limits = Limits()) -> FastAPI:
    """The application; its lifespan starts and stops the engines' threads."""
    server = Server(models, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engines = [served.engine for served in models if isinstance(served, Served)]
        for engine in engines:
            engine.start()
        server.deadlines, server.readers = Deadlines(limits.timeout), ThreadPoolExecutor(READERS, "reader")
        trimming = asyncio.create_task(keep_trim())
        gc.collect()
        gc.freeze()  # models and modules stay; looking through them again would stop all answers for a while
        yield
        gc.unfreeze()
        trimming.cancel()
        server.drain()
        server.readers.shutdown(wait=False, cancel_futures=True)
        for engine in engines:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Landmark", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(Gate, limits=limits)
    app.add_middleware(Guard)
    app.add_middleware(Counted, metrics=server.metrics)

    @app.post("/v1/chat/completions", responses=RESPONSES)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer in a conversation."""
        return await server.chat(body, request)

    @app.post("/v1/completions", responses=RESPONSES)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, or lists of token ids."""
        return await server.completions(body, request)

    @app.post("/v1/embeddings", responses=RESPONSES)
    async def embeddings(body: EmbeddingRequest) -> Response:
        """Vectors of texts."""
        return await server.embeddings(body)

    @app.get("/v1/models", responses=RESPONSES)
    async def listing() -> dict[str, Any]:
        """The models that are served."""
        return server.listing()

    @app.get("/v1/models/{name:path}", responses=RESPONSES)
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        find(server.models, name)
        found: dict[str, Any] = next(entry for entry in server.listing()["data"] if entry["id"] == name)
        return found

    @app.post("/tokenize", responses=RESPONSES)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Ids of a text, or of a conversation."""
        return await server.tokenize(body, request)

    @app.post("/detokenize", responses=RESPONSES)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text of ids."""
        return await server.detokenize(body, request)

    @app.get("/health", responses=RESPONSES)
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        if server.deadlines.draining:
            raise shutting_down()
        if ended := [s.name for s in models if isinstance(s, Served) and not s.engine.running]:
            raise ApiError(503, f"the engine of {ended[0]} has ended; the server is to be restarted", code="ended")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """The engines' figures as JSON."""
        return server.stats()

    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE), name="page")

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html")

    _handle_errors(app, server)
    return app


def _handle_errors(app: FastAPI, server: Server) -> None:
    def answer(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, explain(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path}"
        elif error.status_code == 400:
            message = "the body is not JSON in UTF-8"
        return answer(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


def _one(body: CompletionRequest, prompt: Any) -> CompletionRequest:
    """The request as if it had only this one of its prompts."""
    return body.model_copy(update={"prompt": prompt})

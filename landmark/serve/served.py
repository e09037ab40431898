"""A model that is served: its engine, its tokenizer, and how requests of the protocol become the engine's."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..infer.chat import turn_ends, unended
from ..infer.constrain import Forms
from ..infer.defaults import recommended, stop_ids
from ..infer.engine import Engine, Request, Sampling
from ..infer.sentences import SentenceEncoder
from ..models.decoder import Decoder
from ..weights.tokenizer import Tokenizer
from .errors import ApiError, bad
from .reasoning import ReasoningReader, opened, thinks
from .schema import (
    MOST_BIASES,
    MOST_TOKENS,
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    NamedTool,
    RefusalPart,
    ResponseFormat,
    TextPart,
    Tool,
)
from .tools import Dialect, dialect, grammar


@dataclass
class Served:
    """A decoder with its engine, or, with `base`, the adapter of that one that bears this name. `created` is when it
    was put up, in Unix seconds. `reasoning` says whether what is thought before an answer is told apart ("auto": where
    the model has marks for it)."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))
    base: Served | None = None
    reasoning: Literal["auto", "none"] = "auto"

    def adapted(self) -> list[Served]:
        """The adapters of the engine's model, each a model of its own."""
        return [replace(self, name=name, base=self) for name in self.engine.adapters.names]

    @property
    def model(self) -> Decoder:
        return self.engine.model

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer."""
        return stop_ids(self.model, self.tokenizer)

    @cached_property
    def turn_ids(self) -> tuple[int, ...]:
        """What ends an answer in a conversation."""
        return self.stop_ids if self.tokenizer.chat_template is None else turn_ends(self.model, self.tokenizer)

    @cached_property
    def forms(self) -> Forms:
        return self.base.forms if self.base else Forms(self.tokenizer, self.model.cfg.head.vocab, self.turn_ids)

    @cached_property
    def dialect(self) -> Dialect:
        return dialect(self.tokenizer.chat_template)

    @cached_property
    def thinks(self) -> bool:
        return self.reasoning == "auto" and thinks(self.tokenizer)

    @cached_property
    def call_id(self) -> int | None:
        """The special token that begins a tool call, where it is one."""
        return next(iter(self.special([self.dialect.begin])), None)

    def special(self, names: Sequence[str]) -> dict[int, str]:
        """Those of these that are special tokens, which are no text, by their ids."""
        found = {self.tokenizer.token_to_id(name): name for name in names}
        return {token: name for token, name in found.items() if token in self.tokenizer.special_ids}

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompts(self, batch: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """Ids of texts to be continued, or ids as they were given. Texts are encoded many at once: calls that give the
        interpreter's lock away for a moment only, one after the other, keep other threads from it."""
        texts = [text for text in batch if isinstance(text, str)]
        for text in texts:
            self.check_text(len(text), "prompt")
        try:
            parts = [self.tokenizer.encode_batch(texts[n : n + 64], special=True) for n in range(0, len(texts), 64)]
        except ValueError as error:
            raise bad(str(error), "prompt") from None
        found = [unended(self.tokenizer, ids) for part in parts for ids in part]
        found = found or [list(ids) for ids in batch if not isinstance(ids, str)]
        for ids in found:
            self.check_length(ids, "prompt")
        return found

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids of a conversation, as the model's chat template writes it; `variables` are the template's."""
        if self.tokenizer.chat_template is None:
            raise bad(f"{self.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
        if taken := sorted({"self", "messages", "tools"} & set(variables or ())):
            raise bad(f"{taken[0]!r} is set by the request itself", "chat_template_kwargs")
        plain = [as_plain(message) for message in messages]
        if "developer" not in self.tokenizer.chat_template:  # it would be lost, or an error
            plain = [{**each, "role": "system"} if each["role"] == "developer" else each for each in plain]
        self.check_text(sum(len(each["content"]) for each in plain), "messages")
        functions = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
        try:
            ids = self.tokenizer.encode_chat(plain, functions, **(variables or {}))
        except ValueError as error:
            raise bad(str(error), "messages") from None
        self.check_length(ids, "messages")
        return ids

    @cached_property
    def longest_token(self) -> int | None:
        """Characters of a text that a token takes up at most; None where one may stand for any number of them, or texts
        are changed beforehand."""
        backend = self.tokenizer.backend
        split = "" if backend.pre_tokenizer is None else str(backend.pre_tokenizer.__getstate__())
        whole = "ByteLevel" in split and "Removed" not in split and backend.normalizer is None
        if not whole or getattr(backend.model, "unk_token", "?") is not None:
            return None
        return max(map(len, backend.get_vocab()))

    def check_text(self, characters: int, name: str) -> None:
        """Refuse at once a text that is too long whatever its tokens are: reading megabytes holds everyone up."""
        longest, most = self.engine.longest, self.longest_token
        if longest is not None and most is not None and characters > longest * most:
            raise bad(
                f"the prompt has {characters:,} characters; of tokens, {self.name} takes {longest} at most", name,
                "context_length_exceeded",
            )  # fmt: skip

    def check_length(self, ids: Sequence[int], name: str) -> None:
        longest, vocab = self.engine.longest, self.model.cfg.embed.vocab
        if not ids:
            raise bad("the prompt is empty; give at least one token", name)
        if longest is not None and len(ids) > longest:
            raise bad(
                f"the prompt has {len(ids)} tokens, but {self.name} takes {longest} at most", name,
                "context_length_exceeded",
            )  # fmt: skip
        if wrong := [token for token in ids if token >= vocab]:
            raise bad(f"the prompt holds the id {wrong[0]}, but the vocabulary ends at {vocab - 1}", name)

    # -- settings --------------------------------------------------------------------------------------------------

    def sampling(self, body: Generation, max_tokens: int, ends: tuple[int, ...]) -> Sampling:
        """How to draw, as the request says, or else the model's own files."""
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if not all(stop):
            raise bad("a stop string is empty; leave it out", "stop")
        if len(stop) > 64:
            raise bad(f"{len(stop)} stop strings; 64 at most", "stop")
        own = () if body.ignore_eos else ends
        changes: dict[str, Any] = {
            "temperature": cool(body.temperature),"top_p": body.top_p, "min_p": body.min_p, "seed": body.seed,
            "top_k": None if body.top_k is None else max(body.top_k, 0), "stop": stop, "max_tokens": max_tokens,
            "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty, "stop_ids": (*own, *(body.stop_token_ids or ())),
            "logit_bias": self.logit_bias(body.logit_bias),
        }  # fmt: skip
        if body.seed is not None and body.seed < 0:
            changes["seed"] = body.seed % 2**63
        try:
            return recommended(self.model, **changes)
        except ValueError as error:
            raise bad(str(error), str(error).split()[0]) from None

    def logit_bias(self, given: Mapping[str, Any] | None) -> dict[int, float] | None:
        if given is None:
            return None
        vocab = self.model.cfg.head.vocab
        for key, bias in given.items():
            if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= vocab:
                raise bad(f"{key[:40]!r} is no token id below {vocab}", "logit_bias")
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise bad(f"the bias of {key} is {str(bias)[:40]}; it is to be a number from -100 to 100", "logit_bias")
        return {int(key): bias for key, bias in given.items()}

    def room(self, prompt: Sequence[int], wanted: int | None) -> int:
        """How long an answer may be: as long as is wanted, or what the prompt leaves."""
        longest = self.engine.longest
        return wanted or (256 if longest is None else longest - len(prompt) + 1)

    def guide(self, form: ResponseFormat | None) -> Any:
        """What keeps an answer to `response_format`; None for plain text."""
        try:
            match form:
                case None | ResponseFormat(type="text"):
                    return None
                case ResponseFormat(type="json_object"):
                    return self.forms.json()
                case ResponseFormat(type="json_schema", json_schema=wanted) if wanted is not None:
                    return self.forms.json_schema(wanted.schema_)
                case ResponseFormat(type="regex", regex=wanted) if wanted is not None:
                    return self.forms.regex(wanted)
                case ResponseFormat(type="grammar", grammar=wanted) if wanted is not None:
                    return self.forms.grammar(wanted)
        except ValueError as error:
            raise bad(str(error), "response_format", "invalid_form") from None
        raise bad(f"response_format of type {form.type!r} needs the field {form.type!r}", "response_format")

    def completion(self, body: CompletionRequest, prompt: list[int]) -> Request:
        room = self.room(prompt, 16 if body.max_tokens is None else max(1, body.max_tokens))
        top = body.logprobs
        return self.request(
            body, prompt, self.sampling(body, room, self.stop_ids), top, guide=self.guide(body.response_format),
            prompt_logprobs=top if body.echo and top is not None else None,
        )  # fmt: skip

    def chat(self, body: ChatRequest, prompt: list[int]) -> Request:
        room = self.room(prompt, body.max_completion_tokens or body.max_tokens)
        if body.top_logprobs and not body.logprobs:
            raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
        guide, forced = self.guide(body.response_format), self.forced_call(body)
        if forced is not None and guide is not None:
            raise bad("response_format and a required tool call exclude each other", "tool_choice")
        top = body.top_logprobs or 0 if body.logprobs else None
        return self.request(body, prompt, self.sampling(body, room, self.turn_ids), top, guide=forced or guide)

    def reader(self, body: ChatRequest, prompt: Sequence[int]) -> ReasoningReader | None:
        """What tells thought and answer apart. An answer that has to keep to a form has no place for a thought."""
        formed = body.response_format is not None and body.response_format.type != "text"
        if not self.thinks or formed or body.must_call:
            return None
        return ReasoningReader(opened(self.tokenizer, prompt))

    def forced_call(self, body: ChatRequest) -> Any:
        """The form of an answer that has to call a function; None where it need not."""
        functions = [tool.function for tool in body.tools or ()]
        if missing := [name for name in body.named if name not in [function.name for function in functions]]:
            raise bad(f"tool_choice names {missing[0]!r}, which is not among the tools", "tool_choice")
        if not body.must_call:
            return None
        if not functions:
            raise bad("tool_choice asks for a call, but there are no tools", "tool_choice")
        if body.named:
            functions = [function for function in functions if function.name in body.named]
        parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
        described = [function.model_dump(exclude_none=True) for function in functions]
        try:
            return self.forms.grammar(grammar(self.dialect, described, parallel, self.call_id))
        except ValueError as error:
            raise bad(str(error), "tools", "invalid_form") from None

    def request(
        self, body: Generation, prompt: list[int], sampling: Sampling, top: int | None, *, guide: Any,
        prompt_logprobs: int | None = None,
    ) -> Request:  # fmt: skip
        n, vocab = body.n or 1, self.model.cfg.head.vocab
        if body.best_of is not None and body.best_of < n:
            raise bad(f"best_of is {body.best_of}, fewer than n = {n}", "best_of")
        if (biases := len(sampling.logit_bias) * max(n, body.best_of or 1)) > MOST_BIASES:
            raise bad(f"answers times biases are {biases:,}; {MOST_BIASES:,} at most", "logit_bias")
        if wrong := [token for token in sampling.stop_ids or () if token >= vocab]:
            raise bad(f"stop_token_ids holds {wrong[0]}, but the vocabulary ends at {vocab - 1}", "stop_token_ids")
        return Request(
            prompt=prompt, sampling=sampling, n=n, best_of=body.best_of, priority=body.priority, guide=guide,
            logprobs=None if top is None else body.logprobs_of, top=top or 0, prompt_logprobs=prompt_logprobs,
            adapter=self.name if self.base else None,
        )  # fmt: skip

    # -- tokens and text --------------------------------------------------------------------------------------------

    def tokens(self, text: str, special: bool) -> list[int]:
        """Ids of a text that nothing continues."""
        if (size := len(text.encode(errors="surrogatepass"))) > MOST_TOKENS:
            message = f"a text of {size:,} bytes; {MOST_TOKENS:,} at most, so send it in parts"
            raise ApiError(413, message, param="prompt", code="text_too_large")
        try:
            return self.tokenizer.encode(text, special)
        except ValueError as error:
            raise bad(str(error), "prompt") from None

    def text(self, tokens: Sequence[int]) -> str:
        if wrong := [token for token in set(tokens) if self.tokenizer.id_to_token(token) is None]:
            raise bad(f"the token id {wrong[0]} is not in the vocabulary", "tokens")
        return self.tokenizer.decode(tokens, skip_special=False)

    def token_text(self, token: int) -> str:
        """A token by itself; one that is no whole text as "bytes:\\xNN...", so that different tokens look different."""
        if token in self.tokenizer.special_ids:
            return self.tokenizer.id_to_token(token) or ""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def token_bytes(self, token: int) -> bytes:
        if token in self.tokenizer.special_ids or token >= self.tokenizer.vocab_size:
            return (self.tokenizer.id_to_token(token) or "").encode()
        try:
            return self.tokenizer.token_bytes(token)
        except ValueError:  # a hole in the vocabulary
            return b""


@dataclass
class ServedEncoder:
    """A model of sentence vectors."""

    name: str
    encoder: SentenceEncoder
    created: int = field(default_factory=lambda: int(time.time()))


def cool(temperature: float | None) -> float | None:
    """So little heat that numbers would overflow is none."""
    return 0.0 if temperature is not None and temperature < 1e-4 else temperature


def as_plain(message: Message) -> dict[str, Any]:
    """A message as chat templates read them: text in one piece, arguments of calls as objects."""
    plain = message.model_dump(exclude_none=True, include={"role", "name", "tool_call_id", "reasoning_content"})
    content = message.content or ()
    parts = [content] if isinstance(content, str) else [said(part) for part in content]
    plain["content"] = "".join(parts) or message.refusal or ""
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude_none=True, exclude={"index"}) for call in message.tool_calls]
        for call in plain["tool_calls"]:
            call["function"]["arguments"] = _json(call["function"]["arguments"])
    return plain


def said(part: TextPart | RefusalPart) -> str:
    return part.text if isinstance(part, TextPart) else part.refusal


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def find(models: Mapping[str, Served | ServedEncoder], name: str | None) -> Served | ServedEncoder:
    """The model of that name; without one, the only one that is no adapter. Raises a 404 that lists those there are."""
    whole = [served for served in models.values() if not (isinstance(served, Served) and served.base)]
    if name is None and len(whole) == 1:
        return whole[0]
    if name is None or name not in models:
        known = ", ".join(models)
        raise ApiError(404, f"there is no model {name!r}; served are: {known}", param="model", code="model_not_found")
    return models[name]


def decoder(models: Mapping[str, Served | ServedEncoder], name: str | None) -> Served:
    """The model of that name, if it generates."""
    found = find(models, name)
    if not isinstance(found, Served):
        raise bad(f"{found.name} gives embeddings and does not generate", "model")
    return found

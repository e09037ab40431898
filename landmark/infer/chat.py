"""A conversation with a model: its messages, and a session that reads only what is new in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..models.decoder import Decoder
from ..weights.tokenizer import Tokenizer
from .defaults import stop_ids
from .generate import Event, Request, decode
from .sampling import Sampling
from .session import Session, room_after
from .text import TextStream


@dataclass
class Conversation:
    """Messages in the form of chat templates. Without a template the model continues the last line of their text.

    `forgotten` counts the messages that no longer fit the context.
    """

    model: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0
    _session: Session | None = None
    _read: list[int] = field(default_factory=list)  # what the session holds
    _prompt: list[int] = field(default_factory=list)  # as much of it as was no answer
    _at_prompt: Any = None  # the session's state by then

    @property
    def templated(self) -> bool:
        return self.tokenizer.chat_template is not None

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages, self.forgotten = [], 0

    def reply(self, text: str) -> Iterator[Event]:
        """Say `text` and stream the answer, which becomes a message: as much of it as was taken from the iterator.

        Raises ValueError, and forgets `text`, if it alone is longer than the context.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, room = self._fit()
        except ValueError:
            self.messages.pop()
            raise
        return self._answer(prompt, room)

    def _answer(self, prompt: list[int], room: int) -> Iterator[Event]:
        session, new = self._resume(prompt)
        self._session = None  # until it has read all of it: an interrupt may leave it half way
        logits = session.extend([new])
        self._prompt, self._at_prompt = prompt, session.snapshot()
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        stream = TextStream(self.tokenizer, prompt, self.sampling.stop)
        tokens: list[int] = []
        for event in decode(session, logits, [Request(0, prompt, self.sampling, room, self._stop_ids(), stream)]):
            tokens.append(event.token)
            answer["content"] += event.text
            self._session, self._read = session, prompt + tokens[:-1]  # the last one has not been read back
            yield event
            self._session = None
        self._session = session

    def _fit(self) -> tuple[list[int], int]:
        """The prompt, and room for an answer in what it leaves of the context; the oldest messages go if need be."""
        while True:
            prompt = self._encode()
            context = self.model.cfg.context
            wanted = self.sampling.max_tokens
            least = min(wanted, 1 if context is None else context // 8)
            if len(self.messages) > 1 and context is not None and len(prompt) + least > context:
                gone = 2 if self.messages[1]["role"] == "assistant" else 1
                del self.messages[:gone]
                self.forgotten += gone
                continue
            return prompt, room_after(self.model, [prompt], [wanted])[0]

    def _encode(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.templated:
            return self.tokenizer.encode_chat([*system, *self.messages])
        text = "".join(("" if m["role"] == "assistant" else "\n") + m["content"] for m in [*system, *self.messages])
        return prompt_ids(self.tokenizer, text.removeprefix("\n"))

    def _resume(self, prompt: list[int]) -> tuple[Session, list[int]]:
        """The session and what it has yet to read of `prompt`: from where it stands, from its last prompt, or all."""
        session = self._session
        if session is not None and len(self._read) < len(prompt) and prompt[: len(self._read)] == self._read:
            return session, prompt[len(self._read) :]
        if session is not None and len(self._prompt) < len(prompt) and prompt[: len(self._prompt)] == self._prompt:
            session.restore(self._at_prompt)
            return session, prompt[len(self._prompt) :]
        capacity = self.model.cfg.context or len(prompt) + 1_000_000
        self._session = Session(self.model, 1, capacity)
        return self._session, prompt

    def _stop_ids(self) -> frozenset[int]:
        if self.sampling.stop_ids is not None:
            return frozenset(self.sampling.stop_ids)
        return frozenset(
            turn_ends(self.model, self.tokenizer) if self.templated else stop_ids(self.model, self.tokenizer)
        )


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that is to be continued: with what begins a text, and not with what ends it."""
    return unended(tokenizer, tokenizer.encode(text, special=True))


def unended(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids without what ends a text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] in (tokenizer.eos_id, tokenizer.sep_id) else ids


def turn_ends(model: Decoder, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer in a conversation, for a tokenizer with a chat template."""
    return tuple({*stop_ids(model, tokenizer), *end_of_turn(tokenizer)})


def end_of_turn(tokenizer: Tokenizer) -> list[int]:
    """The special token that the chat template puts after what the assistant says, if it does."""
    said = "\ue000"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    after = tokenizer.encode(text.rpartition(said)[2].lstrip())
    return after[:1] if after and after[0] in tokenizer.special_ids else []

"""Answers that keep to a form: a JSON schema, a regular expression, a grammar. llguidance says what may come next.

forms = Forms(tokenizer, vocab=model.cfg.head.vocab, stop_ids=(2,))
Request(prompt, guide=forms.json_schema({"type": "object", ...}))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..weights.tokenizer import Tokenizer

ANY_JSON = {"type": "object"}


class Form:
    """One answer on its way through a form; a `Guide` of the engine."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def allowed(self) -> Tensor:
        """[vocab], bool."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")[: self._vocab]
        mask = torch.zeros(self._vocab, dtype=torch.bool)
        mask[: len(bits)] = torch.from_numpy(bits).bool()
        return mask

    def accept(self, token: int) -> None:
        """Raises ValueError for a token that does not fit."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} does not fit the form: {self._matcher.get_error().splitlines()[0]}")

    def rollback(self, tokens: int) -> None:
        """Take back the last accepted tokens."""
        self._matcher.rollback(tokens)

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


class Forms:
    """Makes guides for a tokenizer; `stop_ids` end an answer whose form is complete."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._vocab, self._stop_ids = tokenizer, vocab, tuple(stop_ids)
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Callable[[], Form]:
        """A JSON value that a schema describes. Raises ValueError for what is no schema, or not supported of one."""
        from llguidance import LLMatcher

        text = json.dumps(schema)
        return self._factory(
            lambda: LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False}), "JSON schema"
        )

    def json(self) -> Callable[[], Form]:
        """Any JSON object."""
        return self.json_schema(ANY_JSON)

    def regex(self, pattern: str) -> Callable[[], Form]:
        """Text that a regular expression matches as a whole."""
        from llguidance import LLMatcher

        return self._factory(lambda: LLMatcher.grammar_from_regex(pattern), "regular expression")

    def grammar(self, lark: str) -> Callable[[], Form]:
        """Text of a context-free grammar in Lark's notation."""
        from llguidance import LLMatcher

        return self._factory(lambda: LLMatcher.grammar_from_lark(lark), "grammar")

    def choice(self, options: Sequence[str]) -> Callable[[], Form]:
        """One of some texts."""
        return self.grammar("start: " + " | ".join(json.dumps(option) for option in options))

    def _factory(self, grammar: Callable[[], str], what: str) -> Callable[[], Form]:
        try:
            matcher = self._compiled(grammar())
        except ValueError as error:
            raise ValueError(f"the {what} cannot be used: {' '.join(str(error).split())}") from None
        return lambda: Form(matcher.deep_copy(), self._vocab)

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._lexicon, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().splitlines()[0])
        first = matcher.deep_copy()
        try:
            first.compute_bitmask()  # what is too large shows here
        except ValueError as error:
            raise ValueError(str(error).splitlines()[0]) from None
        if first.is_error():
            raise ValueError(first.get_error().splitlines()[0])
        return matcher

    @cached_property
    def _lexicon(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(Lexicon(self._tokenizer, self._stop_ids)), eos_token=self._ends)

    @property
    def _ends(self) -> list[int]:
        return list(self._stop_ids) or [self._tokenizer.vocab_size]


class Lexicon:
    """A tokenizer as llguidance wants it: the bytes of every token, and ids of a text. A tokenizer without an end gets
    one that the model cannot say."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        known = set(tokenizer.backend.get_vocab(with_added_tokens=True).values())
        self.tokens = [tokenizer.token_bytes(i) if i in known else b"" for i in range(tokenizer.vocab_size)]
        if not stop_ids:
            self.tokens.append(b"<end>")
        self.eos_token_id = stop_ids[0] if stop_ids else tokenizer.vocab_size
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.special_ids, *stop_ids, self.eos_token_id})
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())

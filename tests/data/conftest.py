"""A small tokenizer, and shards made of given documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from string import ascii_lowercase

import pytest

from landmark.data.corpora import InMemory
from landmark.data.shards import Shards, write_shards
from landmark.weights.tokenizer import Tokenizer
from landmark.weights.tokenizer_train import train_tokenizer

MakeShards = Callable[..., Shards]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", [topics[name] for name in sorted(topics)][:20], 600)


@pytest.fixture(scope="session")
def make_shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Shards whose documents have the given numbers of tokens, eos among them: distinct, so that each can be told."""

    def make(lengths: Sequence[int], shard_tokens: int = 1 << 20, tag: str = "") -> Shards:
        texts = []
        for number, length in enumerate(lengths):
            text = f"{tag}{number}"
            count = len(tokenizer.encode(text)) + 1
            letters = random.Random(text)  # one token each: a line end, and a letter after it
            text += "".join(letters.choice(ascii_lowercase) if i % 2 else "\n" for i in range(length - count))
            texts.append(text)
        folder = tmp_path_factory.mktemp("shards")
        shards = write_shards(InMemory.of(texts), tokenizer, folder, shard_tokens=shard_tokens, progress=False)
        assert shards.lengths.tolist() == list(lengths)
        return shards

    return make

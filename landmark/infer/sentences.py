"""Sentence embeddings: texts to vectors whose cosine says how alike they are (Reimers & Gurevych 2019)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from ..config import nearest
from ..models.base import kind
from ..models.encoder import Encoder
from ..nn.heads import FirstToken, LastToken, MeanPool, Pool
from ..weights.checkpoint import load, locate
from ..weights.files import read_json
from ..weights.tokenizer import Tokenizer, check_ids, whole_characters

POOLS: Mapping[str, Pool] = {"mean": MeanPool(), "cls": FirstToken(), "lasttoken": LastToken()}
TOKENS = 8192  # of a batch, padding included


@dataclass(frozen=True)
class SentenceEncoder:
    """An encoder with its tokenizer, and how a text becomes one vector.

    `longest`: texts are cut there, special tokens included. `prompt` is put before every text.
    """

    model: Encoder
    tokenizer: Tokenizer
    longest: int
    pool: Pool = POOLS["mean"]
    normalise: bool = True
    prompt: str = ""
    lowercase: bool = False

    @classmethod
    def load(
        cls,
        where: str | Path,
        *,
        pool: str | None = None,
        normalise: bool | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> SentenceEncoder:
        """From a directory or hub id. What its modules.json says of pooling, normalising and length is followed where
        `pool` ("mean", "cls", "lasttoken") and `normalise` do not say otherwise; a plain encoder is pooled by the mean
        and normalised. Raises ValueError for modules that are not known, and what `landmark.load` raises."""
        directory = locate(where)
        told = _read_modules(directory)
        home = directory / told.pop("path", "")
        model = load(home, dtype=dtype, device=device)
        if not isinstance(model, Encoder):
            raise ValueError(f"{where} is {kind(model)}; sentence embeddings need an encoder")
        tokenizer = Tokenizer.load(home)
        limits = (told.pop("longest", None), tokenizer.config.get("model_max_length"), model.cfg.context)
        if pool is not None:
            told["pool"] = _pool(pool, "pool")
        if normalise is not None:
            told["normalise"] = normalise
        return cls(model, tokenizer, longest=int(min(limit for limit in limits if limit is not None)), **told)

    def encode(self, texts: Sequence[str], *, cut: bool = True) -> list[list[int]]:
        """Ids of each text with the special tokens around it, cut to `longest`, or else ValueError for one beyond."""
        backend = Backend.from_str(self.tokenizer.backend.to_str())
        if cut:
            backend.enable_truncation(self.longest)
        else:
            backend.no_truncation()
        texts = [(self.prompt + text).strip() for text in texts]
        texts = [text.lower() for text in texts] if self.lowercase else texts
        with whole_characters(texts):
            encodings = backend.encode_batch(texts)
        found = [encoding.ids for encoding in encodings]
        if cut and (n := sum(bool(encoding.overflowing) for encoding in encodings)):
            told = "a text is" if n == 1 else f"{n} texts are"
            warnings.warn(f"{told} longer than the {self.longest} tokens that are read at once, and cut", stacklevel=3)
        for ids in found:
            check_ids(ids, self.model.cfg.embed.vocab)
        if beyond := [i for i, ids in enumerate(found) if len(ids) > self.longest]:
            n = len(found[beyond[0]])
            raise ValueError(f"text {beyond[0]} has {n} tokens, more than the {self.longest} that are read at once")
        return found

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, cut: bool = True) -> Tensor:
        """[len(texts), dim], on the model's device; `cut` as in `encode`. Raises ValueError for a text without any
        token."""
        ids = self.encode(texts, cut=cut)
        if empty := [i for i, tokens in enumerate(ids) if not tokens]:
            raise ValueError(f"text {empty[0]} has no tokens, so it has no embedding; leave it out")
        out = torch.empty(len(ids), self.model.cfg.dim, dtype=self.model.dtype, device=self.model.device)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while order:
            rows = max(1, TOKENS // len(ids[order[-1]]))
            batch, order = order[-rows:], order[:-rows]
            tokens = torch.zeros(len(batch), len(ids[batch[-1]]), dtype=torch.long)
            segments = torch.zeros_like(tokens)
            for row, i in enumerate(batch):
                tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                segments[row, : len(ids[i])] = 1
            tokens, segments = tokens.to(out.device), segments.to(out.device)
            out[batch] = self.model.embed_sentences(tokens, segments, pool=self.pool, normalise=self.normalise)
        return out


def _read_modules(directory: Path) -> dict[str, Any]:
    """What modules.json and the files beside it say, by our field names; nothing where there is none."""
    if not (directory / "modules.json").is_file():
        return {}
    told: dict[str, Any] = {"normalise": False}
    for module in read_json(directory / "modules.json"):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if kind == "Transformer":
            told["path"] = path
        elif kind == "Pooling":
            told["pool"] = _read_pooling(directory / path / "config.json")
        elif kind == "Normalize":
            told["normalise"] = True
        else:
            raise ValueError(
                f"{directory / 'modules.json'}: a module {kind} is not supported; Pooling and Normalize are"
            )
    if (path := directory / "sentence_bert_config.json").is_file():
        told |= {
            "longest": read_json(path).get("max_seq_length"),
            "lowercase": read_json(path).get("do_lower_case", False),
        }
    if (path := directory / "config_sentence_transformers.json").is_file():
        prompts = read_json(path)
        told["prompt"] = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    return told


def _read_pooling(path: Path) -> Pool:
    config = read_json(path)
    if not config.get("include_prompt", True):
        raise ValueError(f"{path}: include_prompt = false is not supported")
    old = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
    prefix = "pooling_mode_"
    modes = [
        old.get(key.removeprefix(prefix), key) for key, on in config.items() if key.startswith(prefix) and on is True
    ]
    mode = config.get("pooling_mode", modes[0] if len(modes) == 1 else modes or "mean")
    return _pool(mode, str(path))


def _pool(mode: Any, where: str) -> Pool:
    if mode not in POOLS:
        near = nearest(str(mode), POOLS)
        raise ValueError(f"{where}: pooling {mode!r} is not supported{near}; choose one of {', '.join(POOLS)}")
    return POOLS[mode]

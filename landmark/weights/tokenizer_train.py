"""Training tokenizers: byte-level BPE, WordPiece and Unigram."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from .chat_template import CHATML
from .tokenizer import Tokenizer
from .tokenizer_formats import (
    CL100K_PATTERN,
    bert_frame,
    byte_alphabet,
    byte_level,
    reserved_split,
    unigram,
    wrap,
)

Kind = Literal["bpe", "wordpiece", "unigram"]

DEFAULT_SPECIAL: Mapping[Kind, Mapping[str, str]] = {
    "bpe": {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"},
    "wordpiece": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "unigram": {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"},
}
"""The special tokens that each kind gets unless told otherwise, by role."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def train_tokenizer(
    kind: Kind,
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Mapping[str, str] | None = None,
    extra_tokens: Sequence[str] | None = None,
    pattern: str = CL100K_PATTERN,
    lowercase: bool = True,
    progress: bool = False,
) -> Tokenizer:
    """Trains a vocabulary of `vocab_size` tokens (fewer when `texts` do not yield so many).

    `bpe` is byte-level (Sennrich et al., 1508.07909, over the 256 bytes as in GPT-2): every text round-trips.  Words
    are cut by `pattern`.  `wordpiece` is BERT's (Devlin et al., 1810.04805), after its normaliser (`lowercase`).
    `unigram` is sentencepiece's (Kudo, 1804.10959) with byte fallback: every text round-trips, but for U+2581, its
    mark for a space.  `special_tokens` maps roles to tokens (`DEFAULT_SPECIAL`) and `extra_tokens` are special
    tokens without a role: by default none, but for bpe ChatML's, with its template.

    The same texts give the same tokenizer, but for `unigram`, whose trainer adds in hash order: there the order of
    pieces of equal score differs between runs, and a score by some parts in ten thousand.
    Raises ValueError for a vocabulary that is too small, or when there is no text.
    """
    if kind not in DEFAULT_SPECIAL:
        raise ValueError(f"tokenizer kind {kind!r}: choose one of {', '.join(DEFAULT_SPECIAL)}")
    roles = dict(DEFAULT_SPECIAL[kind] if special_tokens is None else special_tokens)
    for role in ("unk", "cls", "sep") if kind == "wordpiece" else ("unk",) if kind == "unigram" else ():
        roles.setdefault(role, DEFAULT_SPECIAL[kind][role])
    chat = kind == "bpe" and extra_tokens is None
    names = list(dict.fromkeys([*roles.values(), *(CHAT_TOKENS if chat else extra_tokens or ())]))
    least = len(names) + (1 if kind == "wordpiece" else 256)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {kind} with these special tokens needs {least} or more"
        )

    counted = _Counted(texts)
    if kind == "bpe":
        backend = Backend(models.BPE())
        byte_level(backend, pattern)
        alphabet = sorted(byte_alphabet())
        backend.train_from_iterator(
            counted,
            trainers.BpeTrainer(
                vocab_size=vocab_size, special_tokens=names, initial_alphabet=alphabet, show_progress=progress
            ),
        )
        wrap(backend, roles.get("bos"), None)
    elif kind == "wordpiece":
        backend = _train_wordpiece(counted, vocab_size, names, roles["unk"], lowercase, progress)
        bert_frame(backend, roles["cls"], roles["sep"])
    else:
        backend = _train_unigram(counted, vocab_size, names, roles, progress)
    if not counted.characters:
        raise ValueError("there is no text to train a tokenizer on; give a corpus that is not empty")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend, roles, {"default": CHATML} if chat else None)


def _train_wordpiece(
    texts: Iterable[str], vocab_size: int, names: Sequence[str], unknown: str, lowercase: bool, progress: bool
) -> Backend:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    # The library's own trainer numbers characters inside words in hash order, anew in each run.  Byte-pair merging in
    # which such a character has a stand-in from the planes of Unicode without characters is the same, and repeatable.
    stand_in: dict[str, str] = {}

    @functools.lru_cache(maxsize=1 << 20)
    def mark(word: str) -> str:
        return word[0] + "".join([stand_in.setdefault(c, chr(0x40000 + len(stand_in))) for c in word[1:]])

    def marked() -> Iterator[str]:
        for text in texts:
            words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
            yield " ".join([mark(word) for word, _ in words])

    pairs = Backend(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(names), show_progress=progress)
    pairs.train_from_iterator(marked(), trainer)
    character = {stand: c for c, stand in stand_in.items()}
    vocab = {
        ("##" if token[0] in character else "") + "".join([character.get(c, c) for c in token]): index
        for token, index in pairs.get_vocab().items()
    }
    backend = Backend(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, splitter, decoders.WordPiece()
    return backend


# Line ends with the indentation after them, spaces but the last, letters with the signs behind them, digits in threes,
# signs; the last space goes with what follows. Finer cuts compress worse; cuts at spaces alone train for much longer.
_UNIGRAM_WORDS = "|".join(
    [
        r"\n+▁*(?=▁)",
        r"\n+",
        r"▁+(?=▁)",
        r"▁?\p{L}+[^▁\n\p{L}\p{N}]*",
        r"▁?\p{N}{1,3}",
        r"▁?[^▁\n\p{L}\p{N}]+",
        r"▁",
    ]
)


def _train_unigram(
    texts: Iterable[str], vocab_size: int, names: Sequence[str], roles: Mapping[str, str], progress: bool
) -> Backend:
    reserved = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
    pipeline = Backend(models.Unigram())
    pipeline.normalizer = normalizers.Replace(" ", "▁")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", "first", split=False),  # a prefix before every text, as in from_sentencepiece
            pre_tokenizers.Metaspace("▁", "never", split=False),
            pre_tokenizers.Split(Regex(_UNIGRAM_WORDS), "isolated"),
            reserved_split(reserved),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=max(vocab_size - len(reserved), 1), unk_token=roles["unk"], show_progress=progress
    )
    try:
        pipeline.train_from_iterator(texts, trainer)
    except Exception as error:  # the library has no kind of its own for this
        if "not large enough" not in str(error):
            raise
        raise ValueError(
            f"vocab_size {vocab_size} is too small: unigram needs a piece for every character of the corpus besides "
            f"the {len(reserved)} reserved ones; give more"
        ) from None
    # The trainer knows no byte fallback: its pieces become the end of a vocabulary that begins with the bytes.
    learned = [tuple(entry) for entry in json.loads(pipeline.to_str())["model"]["vocab"] if entry[0] not in reserved]
    lowest = min((score for _, score in learned), default=0.0)
    pieces = [(name, lowest) for name in reserved] + learned[: vocab_size - len(reserved)]
    backend = Backend(unigram(pieces, reserved.index(roles["unk"]), byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrap(backend, roles.get("bos"), None)
    return backend


class _Counted:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text

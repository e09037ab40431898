"""Vocabulary files as pipelines of the `tokenizers` library that give the ids of the program that wrote them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

# How a text is cut into words before byte-level merging.  The later ones keep a leading space or sign with its word,
# and take digits in threes and line ends together.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN_PATTERN = CL100K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

PATTERNS = frozenset((GPT2_PATTERN, CL100K_PATTERN, QWEN_PATTERN, O200K_PATTERN))
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's names of bytes: a printable Latin-1 byte is its own character, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


def read(path: Path, config: Mapping[str, Any], added: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, bytes]]:
    """The pipeline of a directory or vocabulary file, and the vocabulary files by name.

    `config` is its tokenizer_config.json and `added` its added_tokens.json ({text: id}), as far as there are such.
    """
    files = _vocabulary_files(path)
    name, data = next(iter(files.items()))
    try:
        if name.endswith(".json") and name != "vocab.json":
            return Tokenizer.from_str(data.decode()), {"tokenizer.json": data}
        if name == "vocab.json":
            backend = from_merges(json.loads(data), files["merges.txt"].decode(), config)
        elif name.endswith(".txt"):
            backend = from_wordpiece(_lines(data.decode()), config)
        elif _is_tiktoken(data):
            backend = from_tiktoken(name, data, config)
        else:
            backend = from_sentencepiece(data, config)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise ValueError(f"{path}: {name} is not a tokenizer that can be read: {error}") from error
    _add_tokens(backend, config.get("added_tokens_decoder", {}), added)
    return backend, files


def _vocabulary_files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        files = [path]
        if path.name == "vocab.json":
            files.append(path.with_name("merges.txt"))
    else:
        choices = [["tokenizer.json"], *([p.name] for p in sorted(path.glob("*.tiktoken"))), ["tiktoken.model"]]
        choices += [[name] for name in SENTENCEPIECE_NAMES] + [["vocab.json", "merges.txt"], ["vocab.txt"]]
        present = [[path / name for name in names] for names in choices if (path / names[0]).is_file()]
        if not present:
            wanted = "tokenizer.json, *.tiktoken, tokenizer.model, spiece.model, vocab.json with merges.txt, vocab.txt"
            raise ValueError(f"{path} holds no tokenizer; it needs one of {wanted}")
        files = present[0]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing: {files[0].name} alone is not a tokenizer")
    return {file.name: file.read_bytes() for file in files}


def _lines(text: str) -> list[str]:
    """Lines that end in a line feed alone: a vocabulary has tokens that `str.splitlines` would break."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def wrap(backend: Tokenizer, first: str | None, last: str | None) -> None:
    """Makes the pipeline put `first` before and `last` after each text when special tokens are asked for."""
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    pair = single + [part.replace("$A", "$B") + ":1" for part in single]
    ids = [(token, backend.token_to_id(token)) for token in {first, last} if token]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def bert_frame(backend: Tokenizer, cls: str = "[CLS]", sep: str = "[SEP]") -> None:
    """`[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`, the second text of type 1."""
    backend.post_processor = TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )


def reserved_split(names: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Breaks each of `names` in a text after its first character.  Unigram's lattice matches every piece of its
    vocabulary, and the names of control and byte pieces must not be made by a text that spells them."""
    pattern = "|".join(f"(?:{_escape(name[0])}(?={_escape(name[1:])}))" for name in names if len(name) > 1)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def unigram(scores: Iterable[tuple[str, float]], unk_id: int, byte_fallback: bool) -> models.Unigram:
    """A Unigram model of pieces and their log-probabilities, to nine digits: all that float32 has, and as many as a
    tokenizer.json gives back unchanged."""
    return models.Unigram([(piece, float(f"{score:.9g}")) for piece, score in scores], unk_id, byte_fallback)


def merges_by_rank(rank: Mapping[Any, float]) -> list[tuple[Any, Any]]:
    """Every pair of tokens whose join is a token, in the order in which byte-pair encoding merges them: by the rank of
    the join, and for equal ranks the shorter left part first."""
    merges = []
    for token, order in rank.items():
        for cut in range(1, len(token)):
            if token[:cut] in rank and token[cut:] in rank:
                merges.append((order, cut, token))
    merges.sort(key=lambda merge: merge[0])
    return [(token[:cut], token[cut:]) for _, cut, token in merges]


def _add_tokens(backend: Tokenizer, decoder: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Adds the tokens that the directory lists beside its vocabulary, at the ids that it gives them."""
    listed = {int(index): AddedToken(token, special=True, normalized=False) for token, index in added.items()}
    for key, entry in decoder.items():
        listed[int(key)] = AddedToken(**{name: value for name, value in entry.items() if name != "__type"})
    for index, token in sorted(listed.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        got = backend.token_to_id(token.content)
        if got != index:
            raise ValueError(f"added token {token.content!r} should have id {index}; the vocabulary gives it {got}")


# -- sentencepiece -----------------------------------------------------------------------------------------------------


def from_sentencepiece(data: bytes, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """A sentencepiece model (BPE or Unigram) with sentencepiece's own ids (Kudo and Richardson, 1808.06226).

    Control symbols become special tokens.  Differences remain for cuts of exactly equal score (sentencepiece breaks
    the tie by the rounding of float32), for spaces before user-defined symbols of a BPE model that removes extra
    spaces, and for U+2581 in a text.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError("sentencepiece models need `pip install sentencepiece protobuf`") from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(data)
    kind = type(proto).SentencePiece
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
    reserved = [p.piece for p in proto.pieces if p.type in (kind.CONTROL, kind.UNKNOWN, kind.BYTE)]
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise ValueError("only sentencepiece models of type unigram and bpe are read, not word or char")
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise ValueError("sentencepiece models with suffixed or unescaped spaces are not read")
    if any(piece.type == kind.UNUSED for piece in proto.pieces):
        raise ValueError("sentencepiece models with unused pieces (a restricted vocabulary) are not read")

    unknown = next(p.piece for p in proto.pieces if p.type == kind.UNKNOWN)
    splits: list[pre_tokenizers.PreTokenizer] = []
    if trainer.model_type == trainer.BPE:
        rank = {p.piece: -p.score for p in proto.pieces if p.type == kind.NORMAL}
        backend = Tokenizer(
            models.BPE(
                vocab={piece: index for index, piece in enumerate(pieces)},
                merges=merges_by_rank(rank),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        splits.append(reserved_split(reserved))
        # A user-defined piece takes part in the lattice with a score that beats any way to cut it.
        best = max(p.score for p in proto.pieces if p.type == kind.NORMAL)
        scores = [len(p.piece) * best - 0.1 if p.type == kind.USER_DEFINED else p.score for p in proto.pieces]
        backend = Tokenizer(unigram(zip(pieces, scores, strict=True), pieces.index(unknown), trainer.byte_fallback))

    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if (config or {}).get("do_lower_case"):
        steps.append(normalizers.Lowercase())
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r" +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    whole = any("▁" in piece[1:] for piece in pieces)  # pieces that cross a space forbid a cut at spaces
    if rules.remove_extra_whitespaces or not rules.add_dummy_prefix:
        scheme = "first" if rules.add_dummy_prefix else "never"
        spaces = [pre_tokenizers.Metaspace("▁", scheme, split=not whole)]
    else:
        # Metaspace adds no prefix before a leading space, and sentencepiece does.  With the spaces written out before
        # it, a Metaspace whose mark is the space itself always adds one, to the beginning of the text alone.
        steps.append(normalizers.Replace(" ", "▁"))
        spaces = [pre_tokenizers.Metaspace(" ", "first", split=False)]
        spaces.append(pre_tokenizers.Metaspace("▁", "never", split=not whole))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*spaces, *splits])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])
    )
    control = [p.piece for p in proto.pieces if p.type in (kind.CONTROL, kind.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if trainer.model_type == trainer.BPE:
        user = [p.piece for p in proto.pieces if p.type == kind.USER_DEFINED]
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in user])
    if "[CLS]" in pieces and "[SEP]" in pieces:
        bert_frame(backend)
    else:  # Llama marks the beginning; T5, which has no mark for it, marks the end
        bos, eos = (pieces[i] if 0 <= i < len(pieces) else None for i in (trainer.bos_id, trainer.eos_id))
        wrap(backend, bos, None if bos else eos)
    return backend


def _escape(text: str) -> str:
    return "".join(character if character.isalnum() else f"\\{character}" for character in text)


# -- tiktoken ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """What a tiktoken file leaves unsaid: the pattern and the special tokens' ids."""

    pattern: str
    special: Mapping[str, int]
    bos: str | None = None


def _llama3_special(count: int = 256) -> dict[str, int]:
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(count))
    names = [named[n] if n in named else f"reserved_special_token_{next(reserved)}" for n in range(count)]
    return {f"<|{name}|>": 128000 + n for n, name in enumerate(names)}


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS: dict[int, Encoding] = {
    50256: Encoding(GPT2_PATTERN, {"<|endoftext|>": 50256}),  # r50k
    50280: Encoding(GPT2_PATTERN, {"<|endoftext|>": 50256}),  # p50k, whose file leaves that id free
    100256: Encoding(CL100K_PATTERN, {"<|endoftext|>": 100257, **_FIM, "<|endofprompt|>": 100276}),
    199998: Encoding(O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    128000: Encoding(CL100K_PATTERN, _llama3_special(), bos="<|begin_of_text|>"),
    151643: Encoding(QWEN_PATTERN, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
}
"""The published tiktoken vocabularies, told apart by the number of their ranks."""


def _is_tiktoken(data: bytes) -> bool:
    token, _, rank = data.partition(b"\n")[0].strip().partition(b" ")
    return rank.isdigit() and len(token) % 4 == 0


def from_tiktoken(
    name: str, data: bytes, config: Mapping[str, Any] | None = None, encoding: Encoding | None = None
) -> Tokenizer:
    """A tiktoken file (lines of a base64 token and its rank), by default as the published vocabulary of that size."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a base64 token and its rank") from error
    encoding = encoding or ENCODINGS.get(len(ranks))
    if encoding is None:
        known = ", ".join(map(str, ENCODINGS))
        raise ValueError(f"no known tiktoken vocabulary has {len(ranks)} ranks (known: {known}); use a tokenizer.json")
    name_of = {byte: character for character, byte in byte_alphabet().items()}
    text = {token: "".join(name_of[byte] for byte in token) for token in ranks}
    backend = Tokenizer(
        models.BPE(
            vocab={text[token]: rank for token, rank in ranks.items()} | dict(encoding.special),
            merges=[(text[left], text[right]) for left, right in merges_by_rank(ranks)],
            ignore_merges=True,  # tiktoken takes a word that is a token whole
        )
    )
    byte_level(backend, encoding.pattern)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in encoding.special])
    if encoding.bos:
        wrap(backend, encoding.bos, None)
    return backend


def byte_level(backend: Tokenizer, pattern: str) -> None:
    """Words by `pattern`, their bytes as the characters of `byte_alphabet`."""
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


# -- vocab.json with merges.txt, vocab.txt -----------------------------------------------------------------------------


def from_merges(vocab: Mapping[str, int], merges_text: str, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """GPT-2's vocab.json and merges.txt, with RoBERTa's or DeBERTa's frame when their tokens are there; or GPT-1's,
    whose words end in `</w>`."""
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_lines(merges_text)):
        if not line or (number == 0 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"merges.txt: {line!r} is not a pair of tokens")
        merges.append((left, right))
    names = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<mask>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
    special = [
        AddedToken(token, special=True, normalized=False, lstrip=token in ("<mask>", "[MASK]"))
        for token in names
        if token in vocab
    ]
    if any(token.endswith("</w>") for token in vocab):
        if "Ġ" in vocab or "<|startoftext|>" in vocab:
            raise ValueError("CLIP's byte-level vocabulary with </w> is read from its tokenizer.json only")
        backend = Tokenizer(
            models.BPE(vocab=dict(vocab), merges=merges, unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=False)
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        backend.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
        return backend
    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges))
    spaced = bool((config or {}).get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if "<s>" in vocab and "</s>" in vocab:
        backend.post_processor = TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])],
        )
    elif "[CLS]" in vocab and "[SEP]" in vocab:
        bert_frame(backend)
    return backend


def from_wordpiece(tokens: list[str], config: Mapping[str, Any] | None = None) -> Tokenizer:
    """BERT's vocab.txt, one token a line; lower case unless `do_lower_case` is false."""
    config = config or {}
    vocab = {token: index for index, token in enumerate(tokens)}
    if missing := [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]:
        raise ValueError(f"vocab.txt lacks {', '.join(missing)}")
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
    bert_frame(backend)
    return backend

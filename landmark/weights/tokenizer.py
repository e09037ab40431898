"""One tokenizer for every format: text to ids and back, at once or as a stream, with its chat templates and files."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as Backend

from . import tokenizer_formats
from .chat_template import ChatTemplate, Message
from .files import beside

ROLES = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")
"""The special tokens that have a name; `Tokenizer.special_tokens` maps these to the tokens' text."""

LONG = 1 << 16
"""Characters from which on one text is encoded as a batch is: faster, and other threads may run meanwhile."""

# What published vocabularies call them, for a directory that does not say.
_USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
}


@contextmanager
def whole_characters(texts: Sequence[str]) -> Iterator[None]:
    """Within, texts are encoded. Raises ValueError for one with half a character of UTF-16, which is no text."""
    try:
        yield
    except TypeError:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"U+{ord(text[error.start]):04X}"
                raise ValueError(f"the text holds half a character, {half} at {error.start}; send whole ones") from None
        raise


def check_ids(ids: Iterable[int], vocab: int) -> None:
    """Raises ValueError for ids of a text that a model with so large a vocabulary does not have."""
    if (largest := max(ids, default=0)) >= vocab:
        raise ValueError(
            f"the text has the token id {largest}, but the model's vocabulary ends at {vocab - 1}: its tokenizer "
            "belongs to another model"
        )


class Tokenizer:
    """Text to ids and back.

    `backend` is the pipeline of the `tokenizers` library.  `special_tokens` says which token plays which of
    `ROLES`, `chat_templates` holds Jinja sources by name (`default`, perhaps `tool_use`), `config` is
    tokenizer_config.json, and `files` are the bytes that the tokenizer was read from, which `save` writes again.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        backend.no_truncation()  # a saved pipeline may cut or pad what it encodes; here that is the caller's to do
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.config = dict(config or {})
        self._files = dict(files or {})
        self._saved_templates = dict(self.chat_templates)
        self._pieces: dict[int, bytes] = {}
        if unknown := set(self.special_tokens) - set(ROLES):
            raise ValueError(f"special token roles {sorted(unknown)}: the roles are {', '.join(ROLES)}")

    # -- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a directory, or one vocabulary file: tokenizer.json, tiktoken, sentencepiece, vocab.json with
        merges.txt, or vocab.txt, the first of these that is there.  Raises ValueError when none is or it is broken."""
        path = Path(path).expanduser()
        if not path.exists():
            raise ValueError(f"{path}: no such tokenizer; give a directory with tokenizer.json or a vocabulary file")
        folder = path if path.is_dir() else path.parent
        files = {name: (folder / name).read_bytes() for name in _SIDE_FILES if (folder / name).is_file()}
        files |= {
            f"additional_chat_templates/{extra.name}": extra.read_bytes()
            for extra in sorted(folder.glob("additional_chat_templates/*.jinja"))
        }
        config = _json_file(folder, files, "tokenizer_config.json")
        special_map = _json_file(folder, files, "special_tokens_map.json")
        backend, vocabulary = tokenizer_formats.read(path, config, _json_file(folder, files, "added_tokens.json"))
        roles = {
            role: _content(value)
            for role in ROLES
            if (value := config.get(f"{role}_token") or special_map.get(f"{role}_token"))
        }
        if not roles:
            roles = _usual_roles(backend)
        roles = {role: token for role, token in roles.items() if backend.token_to_id(token) is not None}
        asked = {"add_bos_token", "add_eos_token"} & config.keys()
        if asked and "tokenizer.json" not in vocabulary:  # which says itself what to add, and is believed
            bos, eos = (roles.get(role) if config.get(f"add_{role}_token") else None for role in ("bos", "eos"))
            tokenizer_formats.wrap(backend, bos, eos)
        return cls(backend, roles, _templates(folder, files, config), config, files | vocabulary)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what `load` and transformers' AutoTokenizer read.  A tokenizer that was loaded is written as the
        files that it came from, with a tokenizer.json beside them when it had none."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a tokenizer is saved as a directory, so give another name")
        files = dict(self._files)
        if "tokenizer.json" not in files:
            files["tokenizer.json"] = self.backend.to_str(pretty=True).encode()
        if "tokenizer_config.json" not in files:
            files["tokenizer_config.json"] = json.dumps(self._config_json(), indent=2, ensure_ascii=False).encode()
        if self.chat_templates != self._saved_templates or not self._files:
            for name, source in self.chat_templates.items():
                main = name == "default"
                files["chat_template.jinja" if main else f"additional_chat_templates/{name}.jinja"] = source.encode()
        for name, data in files.items():
            with beside(folder / name) as temporary:
                temporary.write_bytes(data)

    def _config_json(self) -> dict[str, Any]:
        # The class that takes tokenizer.json as it is, whatever model lies beside it.
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return defaults | self.config | {f"{role}_token": token for role, token in self.special_tokens.items()}

    # -- vocabulary ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id (a vocabulary may have holes): the least number of embedding rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)

    bos_id = property(lambda self: self._role_id("bos"), doc="Beginning of a sequence, or None.")
    eos_id = property(lambda self: self._role_id("eos"), doc="End of a sequence, or None.")
    pad_id = property(lambda self: self._role_id("pad"), doc="Padding, or None.")
    unk_id = property(lambda self: self._role_id("unk"), doc="Unknown piece, or None.")
    mask_id = property(lambda self: self._role_id("mask"), doc="The mask of masked language models, or None.")
    cls_id = property(lambda self: self._role_id("cls"), doc="Classification token, or None.")
    sep_id = property(lambda self: self._role_id("sep"), doc="Separator, or None.")

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of every special token, with a role or without."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids: a hash of the pipeline and the roles."""
        state = self.backend.to_str() + json.dumps(self.special_tokens, sort_keys=True)
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    # -- text to ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False, literal: bool = False) -> list[int]:
        """Ids of `text`.  `special` adds what the model expects around a text (bos, [CLS] ... [SEP]).  `literal`
        reads the text of a special token inside `text` as text, so that no document can forge a boundary."""
        if len(text) > LONG:
            return self.encode_batch([text], special, literal)[0]
        backend = self._literal if literal else self.backend
        with whole_characters([text]):
            return backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False, literal: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        backend = self._literal if literal else self.backend
        with whole_characters(texts):
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    @functools.cached_property
    def _literal(self) -> Backend:
        twin = Backend.from_str(self.backend.to_str())
        twin.encode_special_tokens = True
        return twin

    @functools.cached_property
    def breaks_at_lines(self) -> bool:
        """Whether a line feed before an ASCII letter always ends a token, so that a text may be encoded in parts."""
        splitter = self.backend.pre_tokenizer
        if splitter is None or self.backend.normalizer is not None:
            return False
        state = json.loads(splitter.__getstate__())
        parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
        patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
        byte_level = parts[-1]["type"] == "ByteLevel" and len(parts) == len(patterns) + 1
        return byte_level and (parts[-1]["use_regex"] or patterns[0] in tokenizer_formats.PATTERNS)

    # -- ids to text -----------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.step(token_id) for token_id in ids]) + stream.flush()

    def stream(self, prompt: Sequence[int] = (), skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one after `prompt`."""
        return StreamDecoder(self, prompt, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that it does not begin, as UTF-8 bytes (a byte-level token may be a part of a
        character).  Raises ValueError for an id outside the vocabulary."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._rule.piece(token_id)
        return piece

    def byte_lengths(self) -> np.ndarray:
        """uint16 [vocab_size]: bytes of text that each id stands for; 0 for special tokens and for holes."""
        lengths = np.zeros(self.vocab_size, np.uint16)
        for token_id in self.backend.get_vocab(with_added_tokens=True).values():
            if token_id not in self.special_ids:
                lengths[token_id] = len(self.token_bytes(token_id))
        return lengths

    @functools.cached_property
    def _rule(self) -> _PieceRule:
        return _PieceRule(self.backend)

    # -- conversations ---------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template, or None."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        ChatTemplate(source)
        self.chat_templates["default"] = source

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation.  `tools` are JSON schemas of functions; `variables` go to the template."""
        template, variables = self._chat(tools, add_generation_prompt, variables)
        return template.render(messages, **variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of `apply_chat_template`."""
        return self.encode(self.apply_chat_template(messages, tools, add_generation_prompt, **variables))

    def encode_chat_mask(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant says: those that overlap the template's
        `{% generation %}` blocks, the tokens that supervised fine-tuning learns."""
        template, variables = self._chat(tools, False, variables)
        prompt, spans = template.render_spans(messages, **variables)
        if not spans and any(message["role"] == "assistant" for message in messages):
            raise ValueError("chat template: what the assistant says is not marked; put it in {% generation %} blocks")
        encoding = self.backend.encode(prompt, add_special_tokens=False)
        mask = [any(start < b and a < end for a, b in spans) for start, end in encoding.offsets]
        return encoding.ids, mask

    def _chat(
        self, tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[ChatTemplate, dict[str, Any]]:
        source = self.chat_templates.get("tool_use") if tools else None
        source = source or self.chat_templates.get("default")
        if source is None:
            raise ValueError("this tokenizer has no chat template; set tokenizer.chat_template to a Jinja template")
        tokens = {f"{role}_token": token for role, token in self.special_tokens.items()}
        tool_list = list(tools) if tools is not None else None
        given = {"tools": tool_list, "documents": None, "add_generation_prompt": add_generation_prompt}
        return _compiled(source), tokens | given | dict(variables)


class StreamDecoder:
    """Decodes ids as they come.  The steps and the flush together are the text that `decode` gives for all of the
    ids after `prompt`; no step returns a part of a character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._strip = tokenizer._rule.strip_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # a space that goes if nothing follows
        self._strip &= all(token_id in self._skip for token_id in prompt)
        for token_id in prompt[-16:]:  # enough for a character that the prompt begins and the stream ends
            self.step(token_id)

    def step(self, token_id: int) -> str:
        """The text that this id completes, perhaps none."""
        if token_id in self._skip:
            return ""
        text = self.held + self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self.held = ""
        if self._strip and text:
            text, self._strip = text.removeprefix(" "), False
        if self._tokenizer._rule.strip_end and text.endswith(" "):
            text, self.held = text[:-1], " "
        return text

    def flush(self) -> str:
        """What is left when no id follows: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


class _PieceRule:
    """How one token becomes text, told by the pipeline's own decoder.

    A decoder maps a list of tokens to a text, and all that are in use work token by token but for the two ends of the
    text.  So a token's share is what it adds between two others, and the ends are two flags.  Byte tokens alone would
    come back as U+FFFD, so they are read from their names.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        decoder = backend.decoder
        kinds = {part["type"] for part in _flat(json.loads(decoder.__getstate__()))} if decoder else set()
        self._byte_level = "ByteLevel" in kinds
        self._byte_names = "ByteFallback" in kinds
        self._added = backend.get_added_tokens_decoder()
        self._head, self._pair = len(self._join(["a"])), len(self._join(["a", "a"]))
        self.strip_start = any(self._strips([probe, "a"], probe, 0) for probe in ("a", "▁a"))
        self.strip_end = self._strips(["a", "a</w>"], "a</w>", -1)

    def piece(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token id {token_id} is not in the vocabulary")
        if self._byte_level:
            if token_id not in self._added and all(character in _BYTE_OF for character in token):
                return bytes(_BYTE_OF[character] for character in token)
            return token.encode()
        if self._byte_names and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return self._between(token).encode()

    def _join(self, tokens: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    def _between(self, token: str) -> str:
        text = self._join(["a", token, "a"])
        return text[self._head : len(text) - (self._pair - self._head)]

    def _strips(self, tokens: list[str], probe: str, end: int) -> bool:
        return self._between(probe)[end] == " " and not (self._join(tokens)[end] == " ")


_BYTE_OF = tokenizer_formats.byte_alphabet()
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield decoder
    for part in decoder.get("decoders", ()):
        yield from _flat(part)


def _json_file(folder: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{folder / name} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, not a {type(value).__name__}")
    return value


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _usual_roles(backend: Backend) -> dict[str, str]:
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return {role: name for role, names in _USUAL_NAMES.items() for name in reversed(names) if name in added}


def _templates(folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("chat_template")
    templates = {"default": found} if isinstance(found, str) else {}
    if isinstance(found, list):
        templates = {entry["name"]: entry["template"] for entry in found}
    if "chat_template.json" in files:
        templates["default"] = _json_file(folder, files, "chat_template.json")["chat_template"]
    if "chat_template.jinja" in files:
        templates["default"] = files["chat_template.jinja"].decode()
    for name, source in files.items():
        if name.startswith("additional_chat_templates/"):
            templates[Path(name).stem] = source.decode()
    return templates

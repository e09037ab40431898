"""How encoders read: [CLS] A [SEP], or [CLS] A [SEP] B [SEP], by whatever names a tokenizer has for these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from ...data.labelled import Example
from ...models.backbone import Backbone
from ...models.base import Model
from ...weights.tokenizer import Tokenizer
from ...weights.tokenizer_formats import bert_frame
from ...weights.tokenizer_train import DEFAULT_SPECIAL, Kind, train_tokenizer

# As BERT, RoBERTa and ALBERT name and number them.
SPECIAL: Mapping[Kind, Mapping[str, str]] = {
    "wordpiece": DEFAULT_SPECIAL["wordpiece"],
    "bpe": {
        "bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>",
    },
    "unigram": {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
}  # fmt: skip


def train_framed(kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer for encoders, which frames each text when special tokens are asked for."""
    roles = SPECIAL[kind]
    tokenizer = train_tokenizer(kind, texts, vocab_size, special_tokens=roles, extra_tokens=())
    bert_frame(tokenizer.backend, roles["cls"], roles["sep"])
    return tokenizer


def frame(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids before and between texts. Raises ValueError for a tokenizer that has none."""
    before = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
    between = tokenizer.eos_id if tokenizer.sep_id is None else tokenizer.sep_id
    if before is None or between is None:
        raise ValueError("this tokenizer has no [CLS] and [SEP], nor bos and eos; name another in tokenizer.path")
    return before, between


def framed_reader(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with [CLS] as its bos and [SEP] as its eos, so that documents are framed as texts are."""
    roles = tokenizer.special_tokens
    wanted = {"bos": roles.get("cls", roles.get("bos")), "eos": roles.get("sep", roles.get("eos"))}
    return Tokenizer(tokenizer.backend, {**roles, **{role: name for role, name in wanted.items() if name is not None}})


class Framer:
    """Texts to framed ids of at most `length`; of two texts that are too long the longer one is cut first, at its end.

    The text of a special token inside a text is text.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        frame(tokenizer)
        self.backend = Backend.from_str(tokenizer.backend.to_str())
        self.backend.encode_special_tokens = True
        self.length = length

    def __call__(self, a: str | list[str], b: str | None = None, *, cut_second: bool = False) -> Encoding:
        """`a` may be words. With `cut_second` only the second text is cut. Raises ValueError where nothing is left."""
        first = self.backend.encode(a, is_pretokenized=not isinstance(a, str), add_special_tokens=False)
        second = None if b is None else self.backend.encode(b, add_special_tokens=False)
        room = self.length - self.backend.num_special_tokens_to_add(b is not None)
        one, two = len(first.ids), 0 if second is None else len(second.ids)
        if second is None:
            one = min(one, room)
        elif cut_second:
            two = min(two, room - one)
        elif one + two > room:
            longest = max(room // 2, room - min(one, two))
            one, two = min(one, longest), min(two, longest)
        if min(one, two) < 0:
            raise ValueError(f"data.length is {self.length}, in which a text and its frame do not fit; choose more")
        first.truncate(one)
        if second is not None:
            second.truncate(two)
        return self.backend.post_process(first, second)


def untyped(examples: list[Example], model: Model) -> list[Example]:
    """The examples as they are for models that tell the types of two texts apart, for others without."""
    assert isinstance(model, Backbone)
    return examples if model.cfg.embed.types > 1 else [example._replace(types=None) for example in examples]

"""What the published encoders share: their tasks by name, and the labels, pooler and masked-LM head in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..nn.embedding import Head, Transform
from ..nn.heads import SequenceHead, TokenHead
from ..nn.norm import LayerNorm
from ..ops.activation import Activation
from ..weights.rules import Drop, Rename, Rule
from .encoder import Encoder, HeadConfig
from .registry import Keys

# The heads of each task; the first is the one that a call returns (for "Model", a call returns hidden states).
TASKS: Mapping[str, tuple[str, ...]] = {
    "Model": ("pooled",),
    "ForPreTraining": ("mlm", "pair"),
    "ForMaskedLM": ("mlm",),
    "ForNextSentencePrediction": ("pair",),
    "ForSequenceClassification": ("classify",),
    "ForMultipleChoice": ("choose",),
    "ForTokenClassification": ("tag",),
    "ForQuestionAnswering": ("span",),
}


def task(keys: Keys) -> str:
    """The part of the architecture's name after the family's."""
    return next(task for task in TASKS if keys.name.endswith(task))


def with_task(model: Encoder.Config, keys: Keys, known: Mapping[str, HeadConfig]) -> Encoder.Config:
    """A body with this architecture's heads, among those that the family knows."""
    name = task(keys)
    heads = {head: known[head] for head in TASKS[name] if head in known}
    return replace(model, heads=heads, main=None if name == "Model" else TASKS[name][0])


def labels(keys: Keys) -> tuple[str, ...]:
    """The names of the labels in order; two without names where config.json says nothing."""
    names: Mapping[str, str] | None = keys.get("id2label")
    count = keys.get("num_labels", len(names) if names else 2)
    if names is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    by_number = {int(number): label for number, label in names.items()}
    if sorted(by_number) != list(range(count)):
        raise ValueError(f"config.json: id2label numbers its labels {sorted(by_number)}; it must be 0 to {count - 1}")
    return tuple(by_number[i] for i in range(count))


def common_heads(
    keys: Keys, norm: LayerNorm.Config, act: Activation, width: int | None = None
) -> dict[str, HeadConfig]:
    """The heads that are alike in all families: masked LM, on embeddings of `width` where that is not the model's, and
    the start and end of a span."""
    keys.fixed("tie_word_embeddings", True)
    if task(keys) == "ForQuestionAnswering" and (count := len(labels(keys))) != 2:
        raise ValueError(f"config.json: a span has a start and an end, but there are {count} labels")
    transform = Transform.Config(act=act, norm=norm)
    return {
        "mlm": Head.Config(vocab=keys["vocab_size"], tied=True, bias=True, width=width, transform=transform),
        "span": TokenHead.Config(labels=("start", "end")),
    }


def pooled(*labels: str, dropout: float = 0.0) -> SequenceHead.Config:
    """Labels on BERT's pooler: the first token through a tanh layer. Without labels, that vector itself."""
    return SequenceHead.Config(labels=labels, act="tanh", dropout=dropout)


def head_rules(keys: Keys, known: Mapping[str, list[Rule]]) -> list[Rule]:
    """The rules of this architecture's heads, among those that the family knows."""
    return [rule for head in TASKS[task(keys)] for rule in known.get(head, [])]


def renames(pairs: Mapping[str, str], theirs: str = "", ours: str = "") -> list[Rule]:
    """One `Rename` for each pair, under two prefixes."""
    return [Rename(theirs + a, ours + b) for a, b in pairs.items()]


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """A LayerNorm; the oldest files call its weight gamma and its bias beta."""
    names = (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias"))
    return [Rename(theirs + a, ours + b) for a, b in names]


def layer_rules(theirs: str, ours: str) -> list[Rule]:
    """A layer of BERT but for its attention's projections, which DeBERTa names otherwise."""
    return [
        Rename(theirs + "attention.output.dense.", ours + "attn.fn.out."),
        *norm_rules(theirs + "attention.output.LayerNorm.", ours + "attn.norm."),
        Rename(theirs + "intermediate.dense.", ours + "ffn.fn.up."),
        Rename(theirs + "output.dense.", ours + "ffn.fn.down."),
        *norm_rules(theirs + "output.LayerNorm.", ours + "ffn.norm."),
    ]


def embedding_rules(theirs: str) -> list[Rule]:
    """Token, position and type embeddings with their norm."""
    return [
        Drop(theirs + "position_ids"),
        Drop(theirs + "token_type_ids"),
        Rename(theirs + "word_embeddings.", "embed.tokens."),
        Rename(theirs + "position_embeddings.", "embed.positions.table."),
        Rename(theirs + "token_type_embeddings.", "embed.types."),
        *norm_rules(theirs + "LayerNorm.", "embed.norm."),
    ]

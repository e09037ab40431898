"""BERT (Devlin et al. 2018): post-norm layers that look both ways, learned positions, token types, a pooled [CLS]."""

from __future__ import annotations

from typing import Any

from ..config import ModuleConfig
from ..nn.attention import Attention
from ..nn.embedding import Embedding
from ..nn.feedforward import MLP
from ..nn.heads import TokenHead
from ..nn.norm import LayerNorm
from ..nn.position import LearnedPositions
from ..nn.residual import PostNorm
from ..weights.rules import Drop, Rename, Rule
from .base import Init
from .encoder import Encoder
from .encoder_keys import (
    common_heads,
    embedding_rules,
    head_rules,
    labels,
    layer_rules,
    norm_rules,
    pooled,
    renames,
    with_task,
)
from .registry import Family, Keys, register


def norm(keys: Keys) -> LayerNorm.Config:
    return LayerNorm.Config(eps=keys.get("layer_norm_eps", 1e-12))


def body(keys: Keys, *, offset: int = 0, act: str = "gelu", dropout: float = 0.1) -> Encoder.Config:
    """BERT without heads; the first `offset` rows of its position table are unused (RoBERTa). `act` and `dropout` are
    what a config.json means that does not name them."""
    head_dim = keys.quotient("hidden_size", "num_attention_heads")
    dim, heads, context = keys["hidden_size"], keys["num_attention_heads"], keys.get("max_position_embeddings", 512)
    keys.fixed("position_embedding_type", "absolute")
    keys.fixed("is_decoder", False)
    keys.fixed("add_cross_attention", False)
    attn = Attention.Config(
        heads=heads, kv_heads=heads, head_dim=head_dim, bias=True, out_bias=True, causal=False,
        dropout=keys.get("attention_probs_dropout_prob", dropout),
    )  # fmt: skip
    ffn = MLP.Config(hidden=keys["intermediate_size"], act=keys.activation(default=act))
    dropout = keys.get("hidden_dropout_prob", dropout)

    def wrap(fn: ModuleConfig) -> PostNorm.Config:
        return PostNorm.Config(fn=fn, norm=norm(keys), dropout=dropout)

    embed = Embedding.Config(
        vocab=keys["vocab_size"], positions=LearnedPositions.Config(size=context - offset, offset=offset),
        types=keys.get("type_vocab_size", 2), norm=norm(keys), dropout=dropout,
    )  # fmt: skip
    return Encoder.Config(
        dim=dim,
        embed=embed,
        layers=({"attn": wrap(attn), "ffn": wrap(ffn)},) * keys["num_hidden_layers"],
        norm=None,
        context=context - offset,
        init=Init(std=keys.get("initializer_range", 0.02), residual=False),
        heads={},
    )


def config(keys: Keys) -> Encoder.Config:
    names, dropout = labels(keys), keys.get("classifier_dropout", keys.get("hidden_dropout_prob", 0.1))
    known = {
        **common_heads(keys, norm(keys), keys.activation(default="gelu")),
        "pooled": pooled(),
        "pair": pooled("next", "random"),
        "classify": pooled(*names, dropout=dropout),
        "choose": pooled("score", dropout=dropout),
        "tag": TokenHead.Config(labels=names, dropout=dropout),
    }
    return with_task(body(keys), keys, known)


def body_rules(prefix: str) -> list[Rule]:
    layer, ours = prefix + "encoder.layer.{i}.", "layers.{i}."
    projections = {"query.": "q.", "key.": "k.", "value.": "v."}
    return [
        *embedding_rules(prefix + "embeddings."),
        *renames(projections, layer + "attention.self.", ours + "attn.fn."),
        *layer_rules(layer, ours),
    ]


def rules(keys: Keys) -> list[Rule]:
    prefix = "" if keys.name == "BertModel" else "bert."
    pooler, mlm = prefix + "pooler.dense.", "cls.predictions."
    known = {
        "mlm": [
            Drop(mlm + "decoder.weight", same_as="bert.embeddings.word_embeddings.weight"),
            Drop(mlm + "decoder.bias", same_as=mlm + "bias"),
            Rename(mlm + "bias", "heads.mlm.bias"),
            Rename(mlm + "transform.dense.", "heads.mlm.transform.dense."),
            *norm_rules(mlm + "transform.LayerNorm.", "heads.mlm.transform.norm."),
        ],
        "pooled": renames({pooler: "heads.pooled.dense."}),
        "pair": renames({pooler: "heads.pair.dense.", "cls.seq_relationship.": "heads.pair.linear."}),
        "classify": renames({pooler: "heads.classify.dense.", "classifier.": "heads.classify.linear."}),
        "choose": renames({pooler: "heads.choose.dense.", "classifier.": "heads.choose.linear."}),
        "tag": renames({"classifier.": "heads.tag.linear."}),
        "span": renames({"qa_outputs.": "heads.span.linear."}),
    }
    unused = [Drop(pooler), Drop("cls.seq_relationship.")]  # of pre-training, in files whose task needs neither
    return [*body_rules(prefix), *head_rules(keys, known), *unused]


def size(vocab: int, dim: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": depth,
        "num_attention_heads": dim // 64, "intermediate_size": 4 * dim, "max_position_embeddings": 512,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    }  # fmt: skip


SIZES = {
    "bert-base-uncased": size(30522, 768, 12),
    "bert-base-cased": size(28996, 768, 12),
    "bert-large-uncased": size(30522, 1024, 24),
    "bert-large-cased": size(28996, 1024, 24),
}
register(
    Family(
        name="bert",
        architectures=(
            "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForSequenceClassification",
            "BertForMultipleChoice", "BertForTokenClassification", "BertForQuestionAnswering",
        ),
        config=config,
        rules=rules,
        prefix="bert.",
        sizes=SIZES,
    )
)  # fmt: skip
register(Family(name="bert", architectures=("BertModel",), config=config, rules=rules, headed="bert."))

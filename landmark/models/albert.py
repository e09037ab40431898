"""ALBERT (Lan et al. 2019): BERT whose layers share their weights, whose embeddings are narrow, and that learns the
order of sentences instead of whether one follows the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from ..nn.heads import TokenHead
from ..nn.residual import Repeat
from ..weights.rules import Drop, Rename, Rule
from .bert import body, norm
from .encoder import Encoder
from .encoder_keys import common_heads, embedding_rules, head_rules, labels, norm_rules, pooled, renames, with_task
from .registry import Family, Keys, register


def config(keys: Keys) -> Encoder.Config:
    plain = body(keys, act="gelu_new", dropout=0.0)
    for key in ("gap_size", "net_structure_type", "num_memory_blocks"):
        keys.fixed(key, 0)
    keys.fixed("down_scale_factor", 1)
    width, depth, groups = keys.get("embedding_size", 128), len(plain.layers), keys.get("num_hidden_groups", 1)
    times = Counter(int(i / (depth / groups)) for i in range(depth))
    inner = (plain.layers[0],) * keys.get("inner_group_num", 1)
    shared = tuple(Repeat.Config(layers=inner, times=times[group]) for group in range(groups))
    model = replace(plain, embed=replace(plain.embed, width=width), layers=shared)
    names, dropout = labels(keys), keys.get("classifier_dropout_prob", 0.1)
    known = {
        **common_heads(keys, norm(keys), keys.activation(default="gelu_new"), width),
        "pooled": pooled(),
        "pair": pooled("ordered", "swapped", dropout=dropout),
        "classify": pooled(*names, dropout=dropout),
        "choose": pooled("score", dropout=dropout),
        "tag": TokenHead.Config(labels=names, dropout=dropout),
    }
    return with_task(model, keys, known)


def rules(keys: Keys) -> list[Rule]:
    prefix = "" if keys.name == "AlbertModel" else "albert."
    layer, ours = prefix + "encoder.albert_layer_groups.{i}.albert_layers.{j}.", "layers.{i}.layers.{j}."
    matrices = {"query": "attn.fn.q", "key": "attn.fn.k", "value": "attn.fn.v", "dense": "attn.fn.out"}
    pooler = prefix + "pooler."
    known = {
        "mlm": [
            Drop("predictions.decoder.weight", same_as="albert.embeddings.word_embeddings.weight"),
            Drop("predictions.decoder.bias", same_as="predictions.bias"),
            Rename("predictions.bias", "heads.mlm.bias"),
            Rename("predictions.dense.", "heads.mlm.transform.dense."),
            *norm_rules("predictions.LayerNorm.", "heads.mlm.transform.norm."),
        ],
        "pooled": renames({pooler: "heads.pooled.dense."}),
        "pair": renames({pooler: "heads.pair.dense.", "sop_classifier.classifier.": "heads.pair.linear."}),
        "classify": renames({pooler: "heads.classify.dense.", "classifier.": "heads.classify.linear."}),
        "choose": renames({pooler: "heads.choose.dense.", "classifier.": "heads.choose.linear."}),
        "tag": renames({"classifier.": "heads.tag.linear."}),
        "span": renames({"qa_outputs.": "heads.span.linear."}),
    }
    return [
        *embedding_rules(prefix + "embeddings."),
        Rename(prefix + "encoder.embedding_hidden_mapping_in.", "embed.project."),
        *(Rename(f"{layer}attention.{theirs}.", f"{ours}{mine}.") for theirs, mine in matrices.items()),
        *norm_rules(layer + "attention.LayerNorm.", ours + "attn.norm."),
        Rename(layer + "ffn.", ours + "ffn.fn.up."),
        Rename(layer + "ffn_output.", ours + "ffn.fn.down."),
        *norm_rules(layer + "full_layer_layer_norm.", ours + "ffn.norm."),
        *head_rules(keys, known),
        Drop(pooler),
        Drop("sop_classifier.classifier."),
    ]


def size(dim: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "albert", "vocab_size": 30000, "embedding_size": 128, "hidden_size": dim,
        "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * dim, "num_hidden_groups": 1,
        "inner_group_num": 1, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_act": "gelu_new",
    }  # fmt: skip


SIZES = {
    "albert-base-v2": size(768, 12, 12),
    "albert-large-v2": size(1024, 16, 24),
    "albert-xlarge-v2": size(2048, 16, 24),
    "albert-xxlarge-v2": size(4096, 64, 12),
}
register(
    Family(
        name="albert",
        architectures=(
            "AlbertForPreTraining", "AlbertForMaskedLM", "AlbertForSequenceClassification", "AlbertForMultipleChoice",
            "AlbertForTokenClassification", "AlbertForQuestionAnswering",
        ),
        config=config,
        rules=rules,
        prefix="albert.",
        sizes=SIZES,
    )
)  # fmt: skip
register(Family(name="albert", architectures=("AlbertModel",), config=config, rules=rules, headed="albert."))

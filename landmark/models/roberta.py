"""RoBERTa (Liu et al. 2019): BERT without token types or sentence pairs; its positions begin after the padding id's."""

from __future__ import annotations

from typing import Any

from ..nn.heads import SequenceHead, TokenHead
from ..weights.rules import Drop, Rename, Rule
from .bert import body, body_rules, norm
from .encoder import Encoder
from .encoder_keys import common_heads, head_rules, labels, norm_rules, pooled, renames, with_task
from .registry import Family, Keys, register


def config(keys: Keys) -> Encoder.Config:
    names, hidden_dropout = labels(keys), keys.get("hidden_dropout_prob", 0.1)
    dropout = keys.get("classifier_dropout", hidden_dropout)
    known = {
        **common_heads(keys, norm(keys), "gelu"),
        "pooled": pooled(),
        "classify": SequenceHead.Config(labels=names, act="tanh", pool_dropout=dropout, dropout=dropout),
        "choose": pooled("score", dropout=hidden_dropout),
        "tag": TokenHead.Config(labels=names, dropout=dropout),
    }
    return with_task(body(keys, offset=keys.get("pad_token_id", 1) + 1), keys, known)


def rules(keys: Keys) -> list[Rule]:
    prefix = "" if keys.name == "RobertaModel" else "roberta."
    pooler = prefix + "pooler.dense."
    known = {
        "mlm": [
            Drop("lm_head.decoder.weight", same_as="roberta.embeddings.word_embeddings.weight"),
            Drop("lm_head.decoder.bias", same_as="lm_head.bias"),
            Rename("lm_head.bias", "heads.mlm.bias"),
            Rename("lm_head.dense.", "heads.mlm.transform.dense."),
            *norm_rules("lm_head.layer_norm.", "heads.mlm.transform.norm."),
        ],
        "pooled": renames({pooler: "heads.pooled.dense."}),
        "classify": renames({"dense.": "dense.", "out_proj.": "linear."}, "classifier.", "heads.classify."),
        "choose": renames({pooler: "heads.choose.dense.", "classifier.": "heads.choose.linear."}),
        "tag": renames({"classifier.": "heads.tag.linear."}),
        "span": renames({"qa_outputs.": "heads.span.linear."}),
    }
    return [*body_rules(prefix), *head_rules(keys, known), Drop(pooler)]


def size(dim: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": dim, "num_hidden_layers": depth,
        "num_attention_heads": dim // 64, "intermediate_size": 4 * dim, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1,
    }  # fmt: skip


register(
    Family(
        name="roberta",
        architectures=(
            "RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaForMultipleChoice",
            "RobertaForTokenClassification", "RobertaForQuestionAnswering",
        ),
        config=config,
        rules=rules,
        prefix="roberta.",
        sizes={"roberta-base": size(768, 12), "roberta-large": size(1024, 24)},
    )
)  # fmt: skip
register(Family(name="roberta", architectures=("RobertaModel",), config=config, rules=rules, headed="roberta."))

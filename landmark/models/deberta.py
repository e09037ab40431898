"""DeBERTa (He et al. 2020), v2 and v3 (He et al. 2021): disentangled attention on relative positions in BERT's layers.

v1 fuses its projections and tells every distance apart; v2 has logarithmic buckets and, in its largest size, a
convolution beside the first layer; v3 is a v2 that shares the projections of contents and positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..config import ModuleConfig
from ..nn.disentangled import Beside, Convolution, DisentangledAttention, MaskDecoder, RelativePositions
from ..nn.embedding import Embedding
from ..nn.feedforward import MLP
from ..nn.heads import SequenceHead, TokenHead
from ..nn.norm import LayerNorm
from ..nn.position import LearnedPositions
from ..nn.residual import PostNorm
from ..weights.rules import Drop, Rename, Rule, Split
from .base import Init
from .encoder import Encoder, HeadConfig
from .encoder_keys import common_heads, embedding_rules, head_rules, labels, layer_rules, norm_rules, renames, with_task
from .registry import Family, Keys, register


def second(keys: Keys) -> bool:
    return keys.name.startswith("DebertaV2")


def terms(keys: Keys) -> tuple[bool, bool]:
    """Whether content looks at position (c2p), and position at content (p2c)."""
    kinds = keys.get("pos_att_type", ())
    kinds = [kind.strip() for kind in kinds.lower().split("|")] if isinstance(kinds, str) else list(kinds)
    if not kinds or not {"c2p", "p2c"}.issuperset(kinds):
        raise ValueError(f"config.json: pos_att_type {kinds} is not supported for {keys.name}; only c2p, p2c or both")
    return "c2p" in kinds, "p2c" in kinds


def relative(keys: Keys, norm: LayerNorm.Config) -> RelativePositions.Config:
    if not keys.get("relative_attention", False):
        raise ValueError(f"config.json: {keys.name} without relative_attention is not supported")
    longest, buckets, normed = keys.get("max_relative_positions", -1), -1, False
    if longest < 1:
        longest = keys.get("max_position_embeddings", 512)
    if second(keys):
        buckets, normed = keys.get("position_buckets", -1), "layer_norm" in keys.get("norm_rel_ebd", "none").lower()
    span, reach = (buckets, longest) if buckets > 0 else (longest, None)
    return RelativePositions.Config(span=span, longest=reach, norm=norm if normed else None)


def config(keys: Keys) -> Encoder.Config:
    dim, heads, context = keys["hidden_size"], keys["num_attention_heads"], keys.get("max_position_embeddings", 512)
    dropout, probs_dropout = keys.get("hidden_dropout_prob", 0.1), keys.get("attention_probs_dropout_prob", 0.1)
    norm, act = LayerNorm.Config(eps=keys.get("layer_norm_eps", 1e-7)), keys.activation(default="gelu")
    keys.fixed("talking_head", False)
    head_dim = keys.quotient("hidden_size", "num_attention_heads")
    keys.fixed("attention_head_size", head_dim)
    keys.fixed("embedding_size", dim)
    keys.fixed("pooler_hidden_size", dim)
    c2p, p2c = terms(keys)
    attn = DisentangledAttention.Config(
        heads=heads, head_dim=head_dim, c2p=c2p, p2c=p2c, key_bias=second(keys), position_key_bias=second(keys),
        shared=second(keys) and keys.get("share_att_key", False), dropout=probs_dropout, table_dropout=dropout,
    )  # fmt: skip
    ffn = MLP.Config(hidden=keys["intermediate_size"], act=act)
    layer: Mapping[str, ModuleConfig] = {
        "attn": PostNorm.Config(fn=attn, norm=norm, dropout=dropout),
        "ffn": PostNorm.Config(fn=ffn, norm=norm, dropout=dropout),
    }
    layers = [layer] * keys["num_hidden_layers"]
    if second(keys) and keys.get("conv_kernel_size", 0) > 0:
        convolution = Convolution.Config(
            kernel=keys["conv_kernel_size"], groups=keys.get("conv_groups", 1),
            act=keys.activation("conv_act", "tanh"), dropout=dropout,
        )  # fmt: skip
        layers[0] = {"conv": Beside.Config(layer=layer, fn=convolution, norm=norm)}
    biased = keys.get("position_biased_input", True)
    model = Encoder.Config(
        dim=dim,
        embed=Embedding.Config(
            vocab=keys["vocab_size"], positions=LearnedPositions.Config(size=context) if biased else None,
            types=keys.get("type_vocab_size", 0), norm=norm, dropout=dropout,
        ),
        layers=tuple(layers),
        norm=None,
        context=context,
        init=Init(std=keys.get("initializer_range", 0.02), residual=False),
        relative=relative(keys, norm),
        heads={},
    )  # fmt: skip
    pool = SequenceHead.Config(
        act=keys.activation("pooler_hidden_act", "gelu"), pool_dropout=keys.get("pooler_dropout", 0.0),
        dropout=keys.get("cls_dropout", dropout),
    )  # fmt: skip
    known: dict[str, HeadConfig] = {
        **common_heads(keys, norm, act),
        "classify": replace(pool, labels=labels(keys)),
        "choose": replace(pool, labels=("score",)),
        "tag": TokenHead.Config(labels=labels(keys), dropout=dropout),
    }
    keys.inert("legacy", "z_steps")
    return with_task(model, keys, known)


def attention_rules(keys: Keys, theirs: str, ours: str) -> list[Rule]:
    if second(keys):
        names = {
            "query_proj": "q",
            "key_proj": "k",
            "value_proj": "v",
            "pos_key_proj": "position_k",
            "pos_query_proj": "position_q",
        }
        return renames({a + ".": b + "." for a, b in names.items()}, theirs, ours)
    dim = keys["hidden_size"]
    fused = [ours + f"{n}.weight" for n in "qkv"]
    return [
        Split(theirs + "in_proj.weight", fused, (dim, dim, dim), heads=keys["num_attention_heads"]),
        Rename(theirs + "q_bias", ours + "q.bias"),
        Rename(theirs + "v_bias", ours + "v.bias"),
        Rename(theirs + "pos_proj.", ours + "position_k."),
        Rename(theirs + "pos_q_proj.", ours + "position_q."),
    ]


def mlm_rules(legacy: bool) -> list[Rule]:
    """The masked-LM head under two names, of which `legacy` says the one to write: v3's files have the other one."""
    both: list[tuple[str, str]] = [("cls.predictions.", "transform."), ("lm_predictions.lm_head.", "")]
    return [
        rule
        for theirs, transform in (both if legacy else both[::-1])
        for rule in (
            Drop(theirs + "decoder.weight", same_as="deberta.embeddings.word_embeddings.weight"),
            Drop(theirs + "decoder.bias", same_as=theirs + "bias"),
            Rename(theirs + "bias", "heads.mlm.bias"),
            Rename(theirs + transform + "dense.", "heads.mlm.transform.dense."),
            *norm_rules(theirs + transform + "LayerNorm.", "heads.mlm.transform.norm."),
        )
    ]


def rules(keys: Keys) -> list[Rule]:
    prefix = "" if keys.name.endswith("Model") else "deberta."
    encoder = prefix + "encoder."
    layers = [(encoder + "layer.{i}.", "layers.{i}.")]
    if second(keys) and keys.get("conv_kernel_size", 0) > 0:
        layers.insert(0, (encoder + "layer.0.", "layers.0.conv.layer."))
    pooler = {"pooler.dense.": "dense.", "classifier.": "linear."}
    known = {
        "mlm": [*mlm_rules(keys.get("legacy", True)), Drop("mask_predictions.")],  # of v3's replaced-token detector
        "classify": renames(pooler, ours="heads.classify."),
        "choose": renames(pooler, ours="heads.choose."),
        "tag": renames({"classifier.": "heads.tag.linear."}),
        "span": renames({"qa_outputs.": "heads.span.linear."}),
    }
    unbiased = [] if keys.get("position_biased_input", True) else [Drop(prefix + "embeddings.position_embeddings.")]
    return [
        *unbiased,
        *embedding_rules(prefix + "embeddings."),
        Rename(encoder + "rel_embeddings.", "relative.table."),
        *norm_rules(encoder + "LayerNorm.", "relative.norm."),
        Rename(encoder + "conv.conv.", "layers.0.conv.fn."),
        *norm_rules(encoder + "conv.LayerNorm.", "layers.0.conv.norm."),
        *(
            rule
            for theirs, ours in layers
            for rule in attention_rules(keys, theirs + "attention.self.", ours + "attn.fn.")
        ),
        *(rule for theirs, ours in layers for rule in layer_rules(theirs, ours)),
        *head_rules(keys, known),
    ]


def with_mask_decoder(cfg: Encoder.Config, steps: int = 2) -> Encoder.Config:
    """The model while it is pre-trained: its last layer is the enhanced mask decoder (He et al. 2020, sec. 3.2)."""
    last = cfg.layers[-1]
    assert isinstance(last, Mapping)
    attn, ffn = last["attn"], last["ffn"]
    assert isinstance(attn, PostNorm.Config) and isinstance(attn.fn, DisentangledAttention.Config)
    assert isinstance(ffn, PostNorm.Config) and cfg.context is not None
    decoder = MaskDecoder.Config(
        attn=attn.fn, ffn=ffn.fn, norm=attn.norm, positions=LearnedPositions.Config(size=cfg.context), steps=steps,
        dropout=attn.dropout,
    )  # fmt: skip
    return replace(cfg, layers=(*cfg.layers[:-1], {"decoder": decoder}))


def without_mask_decoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of such a model, as those of the plain one that is fine-tuned."""
    kept = {name: tensor for name, tensor in weights.items() if ".decoder.positions." not in name}
    return {name.replace(".decoder.", "."): tensor for name, tensor in kept.items()}


def size(vocab: int, dim: int, depth: int, heads: int | None = None) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads or dim // 64,
        "intermediate_size": 4 * dim, "max_position_embeddings": 512, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
        "hidden_act": "gelu", "relative_attention": True, "max_relative_positions": -1, "position_biased_input": False,
        "pos_att_type": ["c2p", "p2c"],
    }  # fmt: skip


V1: Mapping[str, Any] = {"model_type": "deberta"}
V2: Mapping[str, Any] = {
    "model_type": "deberta-v2", "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
}  # fmt: skip
CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}
register(
    Family(
        name="deberta",
        architectures=(
            "DebertaForMaskedLM", "DebertaForSequenceClassification", "DebertaForTokenClassification",
            "DebertaForQuestionAnswering",
        ),
        config=config,
        rules=rules,
        prefix="deberta.",
        sizes={
            "deberta-base": {**V1, **size(50265, 768, 12)},
            "deberta-large": {**V1, **size(50265, 1024, 24)},
            "deberta-xlarge": {**V1, **size(50265, 1024, 48)},
        },
    )
)  # fmt: skip
register(
    Family(
        name="deberta-v2",
        architectures=(
            "DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification", "DebertaV2ForMultipleChoice",
            "DebertaV2ForTokenClassification", "DebertaV2ForQuestionAnswering",
        ),
        config=config,
        rules=rules,
        prefix="deberta.",
        sizes={
            "deberta-v2-xlarge": {**V2, **CONVOLUTION, **size(128100, 1536, 24)},
            "deberta-v2-xxlarge": {**V2, **CONVOLUTION, **size(128100, 1536, 48)},
            "deberta-v3-xsmall": {**V2, **size(128100, 384, 12)},
            "deberta-v3-small": {**V2, **size(128100, 768, 6)},
            "deberta-v3-base": {**V2, **size(128100, 768, 12)},
            "deberta-v3-large": {**V2, **size(128100, 1024, 24)},
            "mdeberta-v3-base": {**V2, **size(251000, 768, 12)},
        },
    )
)  # fmt: skip
register(Family(name="deberta", architectures=("DebertaModel",), config=config, rules=rules, headed="deberta."))
register(Family(name="deberta-v2", architectures=("DebertaV2Model",), config=config, rules=rules, headed="deberta."))

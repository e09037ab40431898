"""Fewer key-value heads for a trained model (Ainslie et al. 2023, sec. 2.1): where a short further training starts."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..config import Config
from ..models.base import Model
from ..nn.attention import Attention
from .rebuild import rebuilt, replace_configs


def pool_heads(model: Model, kv_heads: int) -> Model:
    """A new model whose self-attentions have `kv_heads` key-value heads, each the mean of a group of the old ones.

    Query heads keep their groups: those that shared a pooled head share it still. The model goes on to be trained, a
    few percent of its first training sufficed (sec. 3.1). Raises ValueError if some attention's heads cannot be pooled
    so, or if there is none.
    """
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
    if not attentions:
        raise ValueError("this model has no self-attention whose heads could be pooled")
    weights: dict[str, Tensor] = dict(model.state_dict())
    for name, attention in attentions.items():
        heads = attention.cfg.kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{name} has {heads} key-value heads, which do not pool to {kv_heads}; choose a divisor")
        for part in ("k.weight", "k.bias", "v.weight", "v.bias", "k_norm.norm.weight", "k_norm.norm.bias"):
            tensor = weights.get(f"{name}.{part}")
            if tensor is not None and tensor.shape[0] == heads * attention.cfg.head_dim:
                pooled = tensor.unflatten(0, (kv_heads, heads // kv_heads, attention.cfg.head_dim)).mean(1)
                weights[f"{name}.{part}"] = pooled.flatten(0, 1)

    def fewer(config: Config) -> Config:
        if not isinstance(config, Attention.Config):
            return config
        return dataclasses.replace(config, kv_heads=kv_heads)

    config = replace_configs(model.cfg, fewer)
    return rebuilt(model, config, weights, {"num_key_value_heads": kv_heads})

"""What families of sparse experts have in common in config.json and in their files."""

from __future__ import annotations

from collections.abc import Mapping

from ..weights.rules import Rename, Rule, Stack
from .registry import Keys

MLP = "model.layers.{i}.mlp."
FFN = "layers.{i}.ffn.fn."
PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def expert_rules(
    experts: int, *, theirs: str = MLP, ours: str = FFN, names: Mapping[str, str] = PROJECTIONS, router: str = "gate"
) -> list[Rule]:
    """A router's matrix, and one tensor an expert and projection; `names` maps theirs to ours."""
    return [
        Rename(f"{theirs}{router}.weight", f"{ours}router.linear.weight"),
        *(
            Stack(f"{theirs}experts.{{e}}.{name}.weight", f"{ours}experts.{own}.weight", experts)
            for name, own in names.items()
        ),
    ]


def balance(keys: Keys, active: int, layers: int) -> float:
    """The weight of each layer's balance loss that makes them together as strong as transformers' one over all layers:
    it is `active` for an even load, and only in the loss if `output_router_logits` is set."""
    weight: float = keys.get("router_aux_loss_coef", 0.001)
    return weight * active / max(layers, 1) if keys.get("output_router_logits", False) else 0.0

"""Models whose rotations depend on how long a text is: what of it has to be read in one call.

LongRoPE rotates all of a text by other frequencies once it is longer than the context it was trained for; dynamic NTK
rotates each token as the text's length at that moment has it. So the state that a text leaves depends on how it was
cut, and on what was read of it at once. Within the original context neither does anything, and texts are as any others.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...models.decoder import Decoder
from ...nn.attention import Attention
from ...nn.rope_scaling import DynamicNTKRope, LongRoPE
from ..session import turning_lengths
from .request import Held


@dataclass(frozen=True)
class Lengths:
    """Texts of up to `plain` tokens (None: all) may be cut, and begin after what was read before. At the lengths
    `turns` a text is read anew."""

    plain: int | None
    turns: frozenset[int]

    @classmethod
    def of(cls, model: Decoder) -> Lengths:
        """Raises ValueError for a scaling by length that it does not know."""
        ropes = [module.rope for module in model.modules() if isinstance(module, Attention) and module.rope is not None]
        scalings = [rope.cfg.scaling for rope in ropes if rope.cfg.scaling is not None and rope.cfg.scaling.per_length]
        originals = []
        for scaling in scalings:
            if not isinstance(scaling, LongRoPE | DynamicNTKRope):
                raise ValueError(f"the engine does not know how {type(scaling).__name__} depends on a text's length")
            originals.append(scaling.original)
        turns = turning_lengths(model)
        context = model.cfg.context
        if originals and context is not None and context <= min(originals):
            return cls(None, frozenset())
        return cls(min(originals, default=None), frozenset(turns))

    def depends(self, run: Held) -> bool:
        """Whether what a text leaves in the state depends on how it is read."""
        return self.plain is not None and len(run.tokens) > self.plain

    def whole(self, run: Held) -> int | None:
        """How much of a text has to be read in the next call; None: as much as one likes."""
        if not self.depends(run):
            return None
        if self.turns:
            return run.pending
        return max(1, len(run.ticket.request.prompt) - run.computed)  # what was said since was read token by token

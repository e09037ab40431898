"""A recurrent mixer that no other code knows of, for tests of what has to serve any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from landmark.config import ModuleConfig
from landmark.ctx import Ctx
from landmark.nn.cache import SlotState
from landmark.nn.linear import Linear


class Decay(nn.Module):
    """h_t = a h_(t-1) + x_t, y_t = out(h_t), with a decay a channel; the first h is learned."""

    class Config(ModuleConfig):
        decay: float = 0.9

        def build(self, dim: int) -> Decay:
            return Decay(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.start = nn.Parameter(torch.zeros(dim))
        self.out = Linear(dim, dim, False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.start)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        return SlotState(h=self.start.detach().to(dtype).expand(slots, -1).clone().to(device))

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        flat, out, ends = x.flatten(0, 1), [], []
        for i, (start, n) in enumerate(ctx.bounds.sequences):
            h = self.start if state is None else state.tensors["h"][i]
            for token in flat[start : start + n]:
                h = self.cfg.decay * h + token
                out.append(h)
            ends.append(h)
        if state is not None:
            state.tensors["h"] = torch.stack(ends)
        y: Tensor = self.out(torch.stack(out).view_as(x))
        return y

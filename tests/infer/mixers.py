"""Mixers of every kind of state, for tests of what has to serve any; one of them is known to no other code."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from landmark.config import ModuleConfig
from landmark.ctx import Ctx
from landmark.nn.attention import Attention
from landmark.nn.cache import SlotState
from landmark.nn.linear import Linear
from landmark.nn.mamba import Mamba
from landmark.nn.mamba2 import Mamba2
from landmark.nn.neural_memory import NeuralMemory
from landmark.nn.persistent import PersistentAttention
from landmark.nn.rope import Rope
from landmark.nn.rwkv4 import RWKV4
from landmark.nn.rwkv7 import RWKV7
from landmark.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from landmark.nn.ttt import TTTLinear


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


ATTENTION = Attention.Config(heads=2, kv_heads=1, head_dim=16, rope=Rope.Config(), window=16)
PERSISTENT = PersistentAttention.Config(heads=2, kv_heads=1, head_dim=16, rope=Rope.Config(), window=6, tokens=3)
MEMORY = NeuralMemory.Config(heads=2, chunk=4)
MIXERS: dict[str, tuple[ModuleConfig, ...]] = {  # of the layers, in turn
    "recurrence": (Decay.Config(),),
    "recurrence and attention": (Decay.Config(), ATTENTION),
    "mamba": (Mamba.Config(state=4),),
    "mamba-2 and attention": (Mamba2.Config(heads=4, head_dim=16, state=8, chunk=8), ATTENTION),
    "rwkv-4": (RWKV4.Config(),),
    "rwkv-7 and attention": (RWKV7.Config(head_dim=16), ATTENTION),
    "test-time training": (TTTLinear.Config(heads=2, batch=4),),
    "memory": (MEMORY,),
    "memory as gate": (MemoryAsGate.Config(attention=ATTENTION, memory=MEMORY),),
    "memory as layer": (MemoryAsLayer.Config(attention=PERSISTENT, memory=MEMORY), Decay.Config()),
    "memory as context": (
        MemoryAsContext.Config(attention=replace(ATTENTION, window=None), memory=MEMORY, segment=8, persistent=3),
    ),
}

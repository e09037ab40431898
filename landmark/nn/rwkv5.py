"""Eagle and Finch (Peng et al. 2024, 2404.05892), RWKV-5 and -6: every head remembers a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.delta import delta_rule, with_bonus
from ..ops.fused import glu
from .cache import SlotState
from .linear import Linear
from .norm import LayerNorm
from .token_shift import LowRank, TokenShift, depth, fill

EPS = 64e-5  # of the norm of each head


class MatrixMixer(nn.Module):
    """What RWKV-5, -6 and -7 share: heads of width `head_dim`, each with a matrix of keys by values as its state."""

    rows: int  # of the token shift
    own = False

    def __init__(self, name: str, head_dim: int, dim: int) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"{name}.head_dim is {head_dim}, which does not divide the width {dim}; choose a divisor")
        self.dim, self.head_dim, self.heads = dim, head_dim, dim // head_dim
        self.shift = TokenShift(dim, self.rows, own=self.own)
        self.r, self.k, self.v, self.out = (Linear(dim, dim, bias=False) for _ in range(4))
        self.bonus = nn.Parameter(torch.empty(self.heads, head_dim))
        self.norm = LayerNorm.Config(eps=EPS).build(dim, groups=self.heads)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        wide, shape = torch.promote_types(dtype, torch.float32), (slots, self.heads, self.head_dim, self.head_dim)
        return SlotState(
            last=torch.zeros(slots, self.dim, dtype=dtype, device=device),
            matrix=torch.zeros(shape, dtype=wide, device=device),
        )

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the layer's own weights, however long the text: decay, read, add."""
        return 5 * self.dim * self.head_dim

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def mix(
        self, r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, ctx: Ctx, state: SlotState | None,
        a: Tensor | None = None, b: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`delta_rule` from and to the decoding state."""
        initial = None if state is None else state.tensors["matrix"]
        y, final = delta_rule(r, log_decay, k, v, ctx.bounds, initial, a=a, b=b)
        if state is not None:
            state.tensors["matrix"] = final
        return y


class RWKV5(MatrixMixer):
    """out(silu(g) * norm(y)), y_t = r_t (S_{t-1} + diag(u) k_t^T v_t), with decays that are learned (eq. 4 to 7)."""

    class Config(ModuleConfig):
        head_dim: int = 64

        def build(self, dim: int) -> RWKV5:
            return RWKV5(self, dim)

    rows = 4  # k, v, r, g
    own = True

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__("RWKV5", cfg.head_dim, dim)
        self.gate = Linear(dim, dim, bias=False)
        self.decay = nn.Parameter(torch.empty(self.heads, self.head_dim))  # log of the rate, as in RWKV-4

    @torch.no_grad()
    def reset_at(self, layer: int, layers: int) -> None:
        deep, shallow = depth(layer, layers)
        self.shift.start(shallow, shallow, 0.5 * shallow, 0.5 * shallow, shift=(0, 0.3 * deep, 0, 0))
        self.decay.copy_(decays(self, deep).view_as(self.decay))
        start(self, layer, layers)

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        k, v, r, g = self.shift(x, ctx, state)
        r, k, v = self.by_head(self.r(r)), self.by_head(self.k(k)), self.by_head(self.v(v))
        rate = -self.decay.to(torch.promote_types(x.dtype, torch.float32)).exp()
        y = with_bonus(self.mix(r, rate.expand(r.shape), k, v, ctx, state), r, k, v, self.bonus)
        out: Tensor = self.out(glu(self.gate(g), self.norm(y.flatten(-2)), "silu"))
        return out


class RWKV6(MatrixMixer):
    """RWKV-5 whose decays, and whose mixing with the token before, depend on the token (eq. 14 to 20).

    `mix_rank` and `decay_rank`: the widths of the maps that say so.
    """

    class Config(ModuleConfig):
        head_dim: int = 64
        mix_rank: int = 32
        decay_rank: int = 64

        def build(self, dim: int) -> RWKV6:
            return RWKV6(self, dim)

    rows = 6  # of the mixing itself, w, k, v, r, g

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__("RWKV6", cfg.head_dim, dim)
        self.mix_down = Linear(dim, 5 * cfg.mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(5, cfg.mix_rank, dim))
        self.gate = Linear(dim, dim, bias=False)
        self.decay = LowRank(dim, cfg.decay_rank, dim, act="tanh")

    @torch.no_grad()
    def reset_at(self, layer: int, layers: int) -> None:
        deep, shallow = depth(layer, layers)
        powers = (shallow, shallow, shallow, shallow, 0.5 * shallow, 0.5 * shallow)
        self.shift.start(*powers, shift=(0, 0, 0, 0.3 * deep, 0, 0))
        fill(self.mix_down, 0)
        nn.init.uniform_(self.mix_up, -0.01, 0.01)
        self.decay.start(decays(self, deep))
        nn.init.uniform_(self.decay.up.weight, -0.01, 0.01)
        start(self, layer, layers)

    def mixing_flops(self, context: int) -> int:
        """As for RWKV-5, and what mixes each input."""
        return super().mixing_flops(context) + 2 * self.mix_up.numel()

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        base = torch.cat([self.shift.weight[:1], torch.ones_like(self.shift.weight[:1])])
        mixed, before = self.shift(x, ctx, state, base)
        low = self.mix_down(mixed).tanh().flatten(0, 1).unflatten(-1, (5, -1)).transpose(0, 1)
        more = torch.baddbmm(self.shift.weight[1:, None], low, self.mix_up).unflatten(1, x.shape[:2])
        w, k, v, r, g = torch.addcmul(x, before - x, more).unbind()
        r, k, v = self.by_head(self.r(r)), self.by_head(self.k(k)), self.by_head(self.v(v))
        rate = self.decay(w)
        rate = -self.by_head(rate.to(torch.promote_types(rate.dtype, torch.float32))).exp()
        y = with_bonus(self.mix(r, rate, k, v, ctx, state), r, k, v, self.bonus)
        out: Tensor = self.out(glu(self.gate(g), self.norm(y.flatten(-2)), "silu"))
        return out


def decays(mixer: MatrixMixer, deep: float) -> Tensor:
    """[dim]: logs of rates from which heads begin, slow to fast."""
    channel = torch.arange(mixer.dim, device=mixer.bonus.device)
    return -6 + 5 * (channel / max(1, mixer.dim - 1)) ** (0.7 + 1.3 * deep)


@torch.no_grad()
def start(mixer: RWKV5 | RWKV6, layer: int, layers: int) -> None:
    """What RWKV-5 and -6 begin with alike."""
    channel, deep = torch.arange(mixer.dim, device=mixer.bonus.device), depth(layer, layers)[0]
    bonus = deep * (1 - channel / max(1, mixer.dim - 1)) + 0.1 * ((channel + 1) % 3 - 1)
    mixer.bonus.copy_(bonus.view_as(mixer.bonus))
    mixer.norm.weight.fill_(((1 + layer) / layers) ** 0.7)
    for linear, scale in ((mixer.r, 1), (mixer.k, 0.1), (mixer.v, 1), (mixer.gate, 0.1), (mixer.out, 0)):
        fill(linear, scale)

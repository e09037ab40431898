"""Multi-head latent attention (DeepSeek-V2, 2024, sec. 2.1): keys and values are views of one short vector a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Bounds, Ctx
from ..ops.attention import attention
from ..ops.attention.pages import Pages
from ..ops.headwise import headwise
from ..ops.latent import cpu
from .cache import KVCache
from .linear import Linear
from .norm import NormConfig, RMSNorm
from .rope import Rope
from .together import together


class LatentAttention(nn.Module):
    """c = norm(W_DKV x) [kv_rank] gives the keys W_UK c and values W_UV c of every head (eq. 9-13); `rope_dim` further
    dimensions of a key carry the position and are the same for all heads (eq. 14-19).

    While decoding, c and the shared part are all that is kept: W_UK goes to the query's side, W_UV to the output's, and
    heads attend to the one latent vector as their common key and value. `q_rank`: queries are compressed, too; None:
    they are not. `scale` is what scores are multiplied by, 1 / sqrt(head_dim + rope_dim) unless said.
    """

    class Config(ModuleConfig):
        heads: int
        kv_rank: int = 512
        q_rank: int | None = None
        head_dim: int = 128  # of a key's part that knows no position
        rope_dim: int = 64
        v_dim: int = 128
        rope: Rope.Config = Rope.Config(interleaved=True)
        norm: NormConfig = RMSNorm.Config(eps=1e-6)
        bias: bool = False  # of the compressing matrices and the output
        scale: float | None = None
        dropout: float = 0.0

        def build(self, dim: int) -> LatentAttention:
            return LatentAttention(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        wide = c.heads * (c.head_dim + c.rope_dim)
        if c.q_rank is None:
            self.q = Linear(dim, wide, bias=False)
        else:
            self.q_down, self.q_norm = Linear(dim, c.q_rank, c.bias), c.norm.build(c.q_rank)
            self.q_up = Linear(c.q_rank, wide, bias=False)
        self.kv_down, self.kv_norm = Linear(dim, c.kv_rank + c.rope_dim, c.bias), c.norm.build(c.kv_rank)
        self.kv_up = Linear(c.kv_rank, c.heads * (c.head_dim + c.v_dim), bias=False)
        self.out = Linear(c.heads * c.v_dim, dim, c.bias)
        self.rope = c.rope.build(c.rope_dim)
        self.scale = (c.head_dim + c.rope_dim) ** -0.5 if c.scale is None else c.scale
        # With more new tokens than this, expanding all that was kept costs less than attending to it as it is.
        self.many = c.kv_rank * (c.head_dim + c.v_dim) // max(1, 2 * c.kv_rank - c.head_dim - c.v_dim)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """One key of kv_rank + rope_dim a token; its first kv_rank dimensions are the value."""
        return KVCache(slots, capacity, 1, self.cfg.kv_rank + self.cfg.rope_dim, 0, dtype, device)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights', for a token that sees `context` tokens, keys and values expanded."""
        return 2 * context * self.cfg.heads * (self.cfg.head_dim + self.cfg.rope_dim + self.cfg.v_dim)

    def forward(self, x: Tensor, ctx: Ctx, state: KVCache | None = None) -> Tensor:
        c = self.cfg
        q, down = together(x, self.q if c.q_rank is None else self.q_down, self.kv_down)
        if c.q_rank is not None:
            q = self.q_up(self.q_norm(q))
        q = q.view(*x.shape[:-1], c.heads, c.head_dim + c.rope_dim)
        if state is not None and ctx.bounds.longest == 1 and (y := self._step(q, down, ctx, state)) is not None:
            stepped: Tensor = self.out(y)
            return stepped
        q, q_rope = q[..., : c.head_dim], self.rope(q[..., c.head_dim :], ctx)
        latent, k_rope = self.kv_norm(down[..., : c.kv_rank]), self.rope(down[..., None, c.kv_rank :], ctx)
        if state is None:
            y = self._expanded(q, q_rope, latent, k_rope, ctx.bounds, ctx.bounds)
        else:
            entry = torch.cat([latent.unsqueeze(-2), k_rope], -1)
            kept, _, seen = state.extend(entry, entry[..., :0], ctx)
            if kept is entry:
                y = self._expanded(q, q_rope, latent, k_rope, ctx.bounds, seen)
            else:
                y = self._over_kept(q, q_rope, kept, ctx.bounds, seen)
        out: Tensor = self.out(y.flatten(-2))
        return out

    def _step(self, q: Tensor, down: Tensor, ctx: Ctx, state: KVCache) -> Tensor | None:
        """One token of each sequence, absorbed, in as few calls as there can be; None where the kernel cannot run.
        q [B, T, heads, head_dim + rope_dim], down [B, T, kv_rank + rope_dim] -> [B, T, heads * v_dim]."""
        c, norm = self.cfg, self.kv_norm
        if type(norm) is not RMSNorm or self.rope.dim != c.rope_dim:
            return None
        up_k, up_v = self._up()
        cos, sin = self.rope.tables(ctx, q.dtype)
        if cpu.why_not(q, down, up_k, norm.weight, cos) is not None:
            return None
        q, entry = cpu.absorb(
            q, down, up_k, norm.weight, cos, sin, norm.eps, norm.offset, self.rope.cfg.interleaved
        )  # fmt: skip
        kept, _, seen = state.extend(entry, entry[..., :0], ctx)
        y = attention(
            q, kept, kept[..., : c.kv_rank], bounds=ctx.bounds, k_bounds=seen, scale=self.scale, causal=True
        )  # fmt: skip
        return headwise(y, up_v).flatten(-2)

    def _up(self) -> tuple[Tensor, Tensor]:
        """W_UK [heads, head_dim, kv_rank] and W_UV [heads, v_dim, kv_rank]."""
        c = self.cfg
        both: Tensor = self.kv_up.weight.view(c.heads, c.head_dim + c.v_dim, c.kv_rank)
        return both.narrow(1, 0, c.head_dim), both.narrow(1, c.head_dim, c.v_dim)

    def _over_kept(self, q: Tensor, q_rope: Tensor, kept: Tensor, bounds: Bounds, seen: Bounds) -> Tensor:
        """Whichever way costs less, for each sequence where all are in pages: a step of an engine continues many
        answers by a token while it reads a long prompt."""
        if bounds.longest <= self.many:
            return self._absorbed(q, q_rope, kept, bounds, seen)
        if isinstance(seen, Pages):
            pages = seen
            split = bounds.memo(("few", self.many, pages.key), lambda: _split(bounds, pages, self.many))
            if split is not None:
                (first, first_seen), (rest, rest_seen) = split
                short = self._absorbed(q[:, : first.width], q_rope[:, : first.width], kept, first, first_seen)
                long = self._over_kept(q[:, first.width :], q_rope[:, first.width :], kept, rest, rest_seen)
                return torch.cat([short, long], 1)
            kept, seen = pages.gather(kept), pages.gathered
        parts = kept.squeeze(-2)[..., : self.cfg.kv_rank], kept[..., self.cfg.kv_rank :]
        return self._expanded(q, q_rope, *parts, bounds, seen)

    def _expanded(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, bounds: Bounds, seen: Bounds
    ) -> Tensor:
        """Keys and values of every head. latent [B, S, kv_rank], k_rope [B, S, 1, rope_dim] -> [B, T, heads, v_dim]."""
        c = self.cfg
        k, v = self.kv_up(latent).view(*latent.shape[:-1], c.heads, -1).split([c.head_dim, c.v_dim], -1)
        k = torch.cat([k, k_rope.expand(*k.shape[:-1], -1)], -1)
        return attention(
            torch.cat([q, q_rope], -1), k, v, bounds=bounds, k_bounds=seen, scale=self.scale, causal=True,
            dropout=c.dropout if self.training else 0.0,
        )  # fmt: skip

    def _absorbed(self, q: Tensor, q_rope: Tensor, kept: Tensor, bounds: Bounds, seen: Bounds) -> Tensor:
        """Heads share `kept` as key and its beginning as value (sec. 2.1.2: the matrices are absorbed)."""
        c = self.cfg
        up_k, up_v = self._up()
        q = torch.cat([headwise(q, up_k.mT), q_rope], -1)
        y = attention(q, kept, kept[..., : c.kv_rank], bounds=bounds, k_bounds=seen, scale=self.scale, causal=True)
        return headwise(y, up_v)


def _split(bounds: Bounds, seen: Pages, many: int) -> tuple[tuple[Bounds, Pages], tuple[Bounds, Pages]] | None:
    """The sequences of at most `many` tokens that stand first, end to end in one row, and the others."""
    few = end = 0
    for start, length in bounds.sequences:
        if bounds.rows > 1 or start != end or length > many:
            break
        few, end = few + 1, end + length
    if not few:
        return None
    lengths = tuple(length for _, length in bounds.sequences)
    return (Bounds.of_lengths(lengths[:few]), seen[:few]), (Bounds.of_lengths(lengths[few:]), seen[few:])

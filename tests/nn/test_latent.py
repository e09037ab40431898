"""Latent attention: absorbed and expanded are one map, and what is kept of a token is one vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from landmark.ctx import Bounds, Ctx
from landmark.infer.engine import Engine, Request
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.models.decoder import Decoder
from landmark.models.inspect import figures
from landmark.nn import latent as module
from landmark.nn.cache import KVCache
from landmark.nn.latent import LatentAttention
from landmark.nn.rope import Rope
from landmark.nn.rope_scaling import YaRN
from landmark.ops.attention import attention

from ..models.families import perturb
from .mixers import check_sequences, small

BASE: dict[str, Any] = dict(heads=4, kv_rank=16, head_dim=8, rope_dim=8, v_dim=8)
YARN = Rope.Config(interleaved=True, scaling=YaRN(factor=4.0, original=8, mscale=0.7, mscale_all=0.7))
VARIANTS: dict[str, LatentAttention.Config] = {
    "plain": LatentAttention.Config(**BASE),
    "compressed queries": LatentAttention.Config(**BASE, q_rank=12),
    "biases": LatentAttention.Config(**BASE, q_rank=12, bias=True),
    "half-split rotary": LatentAttention.Config(**BASE, rope=Rope.Config()),
    "yarn": LatentAttention.Config(**BASE, rope=YARN, scale=0.3),
    "odd widths": LatentAttention.Config(heads=3, kv_rank=10, head_dim=6, rope_dim=4, v_dim=14),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_sequences(cfg: LatentAttention.Config) -> None:
    check_sequences(cfg)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_absorbed_is_expanded(cfg: LatentAttention.Config) -> None:
    """The same call over a past, both ways, in float64; both are what no cache at all gives."""
    torch.manual_seed(0)
    attn = cfg.build(24)
    perturb(attn)
    attn = attn.double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    want = attn(x, context(2, 11))
    for new in (1, 4):
        for many in (0, 100):
            attn.many = many
            state = attn.new_state(2, 11, torch.float64, torch.device("cpu"))
            attn(x[:, :-new], context(2, 11 - new, past=0), state)
            got = attn(x[:, -new:], context(2, new, past=11 - new), state)
            torch.testing.assert_close(got, want[:, -new:], rtol=1e-11, atol=1e-12)


def context(rows: int, width: int, past: int | None = None) -> Ctx:
    positions = torch.arange(width).expand(rows, width) + (past or 0)
    return Ctx(positions, Bounds(rows, width), None if past is None else (past,) * rows)


@torch.no_grad()
def test_the_equations() -> None:
    """Equations 9 to 19 of the paper, written out for one sequence."""
    cfg = LatentAttention.Config(**BASE, q_rank=12)
    attn: Any = cfg.build(24)
    perturb(attn)
    attn = attn.double()
    h = torch.randn(7, 24, dtype=torch.float64)
    ctx = context(1, 7)
    c_q = attn.q_norm(h @ attn.q_down.weight.T)
    q = (c_q @ attn.q_up.weight.T).view(7, 4, 16)
    down = h @ attn.kv_down.weight.T
    c_kv, k_r = attn.kv_norm(down[:, :16]), attn.rope(down[None, :, None, 16:], ctx)[0, :, 0]
    q_r = attn.rope(q[None, :, :, 8:], ctx)[0]
    out = torch.zeros(7, 32, dtype=torch.float64)
    for head in range(4):
        rows = attn.kv_up.weight[16 * head : 16 * (head + 1)]
        k, v = c_kv @ rows[:8].T, c_kv @ rows[8:].T
        for t in range(7):
            scores = (k[: t + 1] @ q[t, head, :8] + k_r[: t + 1] @ q_r[t, head]) / 16**0.5
            out[t, 8 * head : 8 * (head + 1)] = scores.softmax(0) @ v[: t + 1]
    torch.testing.assert_close(attn(h[None], ctx)[0], out @ attn.out.weight.T, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_one_vector_a_token_is_kept() -> None:
    model = small(LatentAttention.Config(**BASE), layers=3)
    assert figures(model, context=100).cache_per_token == 3 * 2 * (16 + 8)  # in bfloat16
    state = model.new_state(2, 64)
    model(torch.zeros(2, 64, dtype=torch.long), state=state)
    for leaf in state.leaves():
        assert isinstance(leaf, KVCache) and leaf.k.shape == (2, 1, 64, 24) and leaf.v.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_widths(dtype: torch.dtype) -> None:
    """Keys of 192 and values of 128, forward and backward; keys of 576 whose beginning is the value."""
    bounds = Bounds.of_lengths((37, 26))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 63, 2, d, generator=generator) for d in (192, 192, 128)]
    grad, made = torch.randn(1, 63, 2, 128, generator=generator), {}
    for backend, kind in (("reference", torch.float64), (None, dtype)):
        q, k, v = (x.to(dtype).to(kind).requires_grad_() for x in tensors)
        y = attention(q, k, v, bounds=bounds, scale=192**-0.5, causal=True, backend=backend)
        made[backend] = [y, *torch.autograd.grad(y, (q, k, v), grad.to(dtype).to(kind))]
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    for got, want in zip(made[None], made["reference"], strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
    q, kept = torch.randn(3, 1, 16, 576).to(dtype), torch.randn(3, 41, 1, 576).to(dtype)
    where = {"bounds": Bounds(3, 1), "k_bounds": Bounds.padded((41, 7, 20), 41), "scale": 0.07, "causal": True}
    with torch.no_grad():
        got = attention(q, kept, kept[..., :512], **where)  # type: ignore[arg-type]
        wide = kept.double()
        want = attention(q.double(), wide, wide[..., :512], backend="reference", **where)  # type: ignore[arg-type]
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_an_engine_reads_prompts_while_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that go on by a token stay absorbed beside the part of a prompt that is better expanded."""
    splits = []
    split = module._split

    def spy(*given: Any) -> Any:
        splits.append(split(*given))
        return splits[-1]

    monkeypatch.setattr(module, "_split", spy)
    model = small(LatentAttention.Config(**BASE)).double().eval()
    assert isinstance(model, Decoder)
    perturb(model)
    generator = torch.Generator().manual_seed(0)
    vocab = model.cfg.embed.vocab
    prompts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in (3, 5, 90, 70, 2)]
    greedy = Sampling(temperature=0, max_tokens=12, stop_ids=())
    engine = Engine(model, memory=1 << 20, max_batch=5, chunk=32, block=8)
    answers = engine.generate([Request(prompt=prompt, sampling=greedy) for prompt in prompts])
    assert any(found is not None for found in splits)
    for (answer,), alone in zip(answers, generate(model, prompts, greedy), strict=True):
        assert answer.tokens == alone.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_rank=0), r"LatentAttention\.kv_rank is 0"),
        (dict(q_rank=0), r"LatentAttention\.q_rank is 0"),
        (dict(rope_dim=7), "choose an even part of 7"),
    ],
)
def test_what_cannot_be_built(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentAttention.Config(**{**BASE, **change}).build(24)

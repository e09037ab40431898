"""The public function and its backends.

`cpu` is a C kernel that takes ragged batches as they are; `decode` another, for one new token a sequence. `sdpa` serves
what is left: torch's fused kernel, fed so that no work is done across sequences. That is one call for equal lengths,
one masked call where every row holds one sequence, a call a sequence otherwise, and blocks of queries where a window is
shorter than the text, so that the cost follows the pairs that can see each other. It has no soft cap; `plain` has.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...ctx import Bounds
from ..native import transformed
from . import cpu, decode
from .pages import Pages
from .reference import reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds: Bounds,
    k_bounds: Bounds | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within each sequence of a batch (Vaswani et al. 2017, eq. 1).

    q [B, T, heads, d], k [B', S, kv_heads, d], v [B', S, kv_heads, d_v] -> [B, T, heads, d_v]. Sequence i of `bounds`
    (over q) sees sequence i of `k_bounds` (over k and v; default: the same); the last query stands at the last key.
    kv_heads divides heads (Ainslie et al. 2023). A query sees keys at a distance below `window`; `softcap` squashes
    scores to cap * tanh(score / cap) (Gemma 2); `bias` [B, heads, T, S] is added to scaled scores (needs B' = B).
    Tokens outside of every sequence come out as zeros. With `Pages` as k_bounds, k and v are pools of blocks
    [blocks, kv_heads, size, d]. Raises ValueError if a forced `backend` cannot serve the call.
    """
    k_bounds = k_bounds or bounds
    masks: Masks = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    if isinstance(k_bounds, Pages):
        if bias is not None or dropout:
            raise ValueError("attention over pages has no bias and no dropout; it serves generation")
        return _paged(q, k, v, bounds, k_bounds, backend, masks)
    if backend is None:
        backend = _pick(q, k, v, bounds, k_bounds, softcap, dropout, bias)
    elif reason := why_not(
        backend, q, k, v, bounds=bounds, k_bounds=k_bounds, softcap=softcap, dropout=dropout, bias=bias
    ):
        raise ValueError(f"attention backend {backend!r} cannot serve this call: {reason}")
    if backend == "decode":
        return decode.decode(q, k, v, k_bounds, scale=scale, window=window, softcap=softcap)
    if backend == "cpu":
        return cpu.attend(q, k, v, bounds=bounds, k_bounds=k_bounds, **masks)
    if backend == "reference":
        return reference(q, k, v, bounds=bounds, k_bounds=k_bounds, bias=bias, **masks)
    kernel = _fused if backend == "sdpa" else _plain
    return _ragged(kernel, q, k, v, bounds, k_bounds, dropout=dropout, bias=bias, **masks)


class Masks(TypedDict):
    scale: float
    causal: bool
    window: int | None
    softcap: float | None


def _paged(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, pages: Pages, backend: str | None, masks: Masks
) -> Tensor:  # fmt: skip
    """One new token of the first sequences each, answered from their pages; longer parts of the others, whose keys and
    values are gathered."""
    scale, window, softcap = masks["scale"], masks["window"], masks["softcap"]
    if backend in (None, "decode") and decode.why_not(q, k, v, bounds, pages) is None:
        return decode.decode(q, k, v, pages, scale=scale, window=window, softcap=softcap)
    ones = bounds.memo("ones", lambda: _leading_ones(bounds)) if backend is None else 0
    if ones:
        first, rest, rest_pages = bounds.memo(("split", pages.key), lambda: _split(bounds, pages, ones))
        alone = q[0, :ones, None]
        if decode.why_not(alone, k, v, Bounds(ones, 1), first) is None:
            done = decode.decode(alone, k, v, first, scale=scale, window=window, softcap=softcap)
            late = attention(q[:, ones:], k, v, bounds=rest, k_bounds=rest_pages, **masks)
            return torch.cat([done.transpose(0, 1), late], 1)
    keys, values = pages.gather(k), pages.gather(v)
    return attention(q, keys, values, bounds=bounds, k_bounds=pages.gathered, backend=backend, **masks)


def _leading_ones(bounds: Bounds) -> int:
    """How many sequences of one token stand first in a flat row."""
    if bounds.rows > 1:
        return 0
    return next((n for n, (start, length) in enumerate(bounds.sequences) if (start, length) != (n, 1)), 0)


def _split(bounds: Bounds, pages: Pages, ones: int) -> tuple[Pages, Bounds, Pages]:
    return pages[:ones], Bounds.of_lengths(tuple(n for _, n in bounds.sequences[ones:])), pages[ones:]


def _pick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    k_bounds: Bounds,
    softcap: float | None,
    dropout: float,
    bias: Tensor | None,
) -> str:
    if bounds.width == 1 and bias is None and not dropout and decode.why_not(q, k, v, bounds, k_bounds) is None:
        return "decode"
    if cpu.why_not(q, k, v, dropout=dropout, bias=bias) is None:
        return "cpu"
    return "plain" if softcap is not None or transformed() else "sdpa"


def why_not(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds: Bounds,
    k_bounds: Bounds | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> str | None:
    """Why a backend cannot serve a call of `attention` with these arguments, or None if it can."""
    if backend == "cpu":
        return cpu.why_not(q, k, v, dropout=dropout, bias=bias)
    if backend == "decode":
        if bias is not None or dropout:
            return "it takes one query a sequence, without bias and dropout"
        return decode.why_not(q, k, v, bounds, k_bounds or bounds)
    if backend == "reference":
        return "it has no dropout" if dropout else None
    if backend == "sdpa":
        return "the fused kernel has no soft cap" if softcap is not None else None
    if backend == "plain":
        return None
    return "there is no such backend; choose 'cpu', 'decode', 'sdpa', 'plain' or 'reference'"


def visible(bounds: Bounds, k_bounds: Bounds, *, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """[B, 1, T, S]: which keys a query sees, for batches whose rows hold the same sequences."""
    shift = torch.tensor([tk - tq for (_, tq), (_, tk) in zip(bounds.sequences, k_bounds.sequences, strict=True)])
    at_q = (bounds.offsets(device) + bounds.per_token(shift.to(device)))[:, None, :, None]
    distance = at_q - k_bounds.offsets(device)[:, None, None, :]
    index_q, index_k = bounds.index(device)[:, None, :, None], k_bounds.index(device)[:, None, None, :]
    keep = (index_q == index_k) & (index_k >= 0)
    if causal:
        keep &= distance >= 0
    if window is not None:
        keep &= distance.abs() < window
    return keep


def _mask(bounds: Bounds, k_bounds: Bounds, *, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """`visible`, but a query outside of every sequence, whose output is dropped, sees all keys: softmax needs one."""
    keep = visible(bounds, k_bounds, causal=causal, window=window, device=device)
    return keep if bounds.dense else keep | ~keep.any(-1, keepdim=True)


def _masked(bounds: Bounds, k_bounds: Bounds) -> bool:
    """Whether one masked call serves rows of one sequence each better than a call a sequence."""
    return not k_bounds.dense if bounds.dense else bounds.rows > 1 and k_bounds.width <= 512


def _ragged(  # type: ignore[no-untyped-def]
    kernel, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, k_bounds: Bounds, *, causal, window, bias, **options
) -> Tensor:
    """Cut the batch into calls of `kernel`, each over tensors [rows, heads, tokens, d] with one mask for all rows."""
    if causal and bounds.longest == 1:
        causal = False  # the last query sees everything (up to its window)
    if window is not None and k_bounds.longest <= window:
        window = None
    rows = bounds.one_a_row and k_bounds.one_a_row and bounds.rows == k_bounds.rows
    if bias is not None or (rows and _masked(bounds, k_bounds)):
        mask = bounds.memo(
            ("mask", k_bounds, causal, window, q.device),
            lambda: _mask(bounds, k_bounds, causal=causal, window=window, device=q.device),
        )
        if bias is not None:
            mask = bias.to(q.dtype).masked_fill(~mask, -torch.inf)
        width = k_bounds.longest if bias is None else k.shape[1]
        mask = mask[..., :width]
        out = kernel(_heads(q), _heads(k[:, :width]), _heads(v[:, :width]), mask=mask, causal=False, **options)
        out = out.transpose(1, 2)
        return out if bounds.dense else out * (bounds.index(q.device) >= 0)[:, :, None, None]
    if bounds.dense and k_bounds.dense:
        return _banded(kernel, q, k, v, causal, window, options)
    parts, at = [], 0
    for (qs, tq), (ks, tk) in zip(bounds.sequences, k_bounds.sequences, strict=True):
        if qs > at:
            parts.append(q.new_zeros(1, qs - at, q.shape[2], v.shape[3]))
        qi, ki, vi = _cut(q, qs, tq), _cut(k, ks, tk), _cut(v, ks, tk)
        parts.append(_banded(kernel, qi, ki, vi, causal, window, options))
        at = qs + tq
    if at < q.shape[0] * q.shape[1]:
        parts.append(q.new_zeros(1, q.shape[0] * q.shape[1] - at, q.shape[2], v.shape[3]))
    return torch.cat(parts, 1).view(*q.shape[:3], v.shape[3])


def _cut(x: Tensor, start: int, length: int) -> Tensor:
    row, column = divmod(start, x.shape[1])
    return x[row : row + 1, column : column + length]


def _banded(kernel, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, options: dict) -> Tensor:  # type: ignore[no-untyped-def]
    """Equal lengths: q [B, T, H, d], k [B, S, H', d]; the last query stands at the last key."""
    queries, keys = q.shape[1], k.shape[1]
    if window is not None and window >= keys:
        window = None
    if window is None and (not causal or queries == keys or queries == 1):
        causal = causal and queries > 1
        return kernel(_heads(q), _heads(k), _heads(v), mask=None, causal=causal, **options).transpose(1, 2)
    block = queries if window is None or queries < 2 * window else max(window, 128)
    outs, shift = [], keys - queries
    for first in range(0, queries, block):
        last = min(first + block, queries)
        low = 0 if window is None else max(0, first + shift - window + 1)
        high = last + shift if causal else min(keys, last + shift + window - 1)  # type: ignore[operator]
        at_q = torch.arange(first + shift, last + shift, device=q.device)[:, None]
        distance = at_q - torch.arange(low, high, device=q.device)
        keep = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            keep &= distance.abs() < window
        mask = None if last - first == 1 and bool(keep.all()) else keep
        ki, vi = _heads(k[:, low:high]), _heads(v[:, low:high])
        outs.append(kernel(_heads(q[:, first:last]), ki, vi, mask=mask, causal=False, **options).transpose(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float, softcap: None, dropout: float
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.shape[2] == 1 and (mask is None or mask.shape[1] == 1):
        # One query a head: heads that share keys are as many queries of one head, and no key is repeated.
        y = sdpa(q.unflatten(1, (-1, group)).squeeze(3), k, v, mask, dropout, scale=scale)
        return y.flatten(1, 2).unsqueeze(2)
    return sdpa(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=group > 1)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    group, work = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT).to(work) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.nn.functional.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v

"""The same with torch's own operations, for any device and dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """As `landmark.ops.draw.draw`."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    greedy = temperature == 0
    if bool(greedy.all()):
        most, tokens = x.max(1)
        return tokens.masked_fill(~most.isfinite(), x.shape[1]), most
    scaled = x / temperature.to(x.dtype).masked_fill(greedy, 1.0)[:, None]
    if bool((top_k > 0).any()):
        scaled = _above(scaled, top_k_threshold(scaled, top_k[:, None]))
    if bool((top_p < 1).any()):
        scaled = _above(scaled, top_p_threshold(scaled, top_p[:, None]))
    if bool((min_p > 0).any()):
        scaled = _above(scaled, min_p_threshold(scaled, min_p[:, None]))
    cuts = x.masked_fill(scaled == -math.inf, math.inf).amin(1)
    most, likeliest = x.max(1)
    tokens = torch.where(greedy, likeliest, pick(scaled, uniform))
    return tokens.masked_fill(~most.isfinite(), x.shape[1]), torch.where(greedy, most, cuts)


def top_k_threshold(logits: Tensor, k: Tensor) -> Tensor:
    """[B, 1]: the k-th largest of logits [B, V]; -inf where k [B, 1] is 0."""
    widest = int(k.clamp(max=logits.shape[1]).max())
    kth = logits.topk(max(widest, 1)).values.gather(1, (k.clamp(max=logits.shape[1]) - 1).clamp_min(0))
    return kth.masked_fill(k == 0, -math.inf)


def top_p_threshold(logits: Tensor, p: Tensor, head: int = 512) -> Tensor:
    """[B, 1]: the smallest logit of the smallest set with mass of at least p [B, 1], among logits [B, V].

    Only the `head` most likely tokens are sorted, or more of them where their mass is too small.
    """
    values = logits.topk(min(head, logits.shape[1])).values
    # The mass above each; first in the row, where it is 0, the mass of all of them.
    most = values[:, :1]
    mass = (values - most).exp().cumsum(1, dtype=torch.float64)
    before = (mass / (logits - most).exp().sum(1, keepdim=True, dtype=torch.float64)).roll(1, 1)
    if values.shape[1] < logits.shape[1] and bool(((before[:, :1] < p) & (p < 1)).any()):
        return top_p_threshold(logits, p, 16 * head)
    before[:, 0] = 0.0
    last = (before < p).sum(1, keepdim=True) - 1
    return values.gather(1, last).masked_fill(p >= 1, -math.inf)


def min_p_threshold(logits: Tensor, p: Tensor) -> Tensor:
    """[B, 1]: the logit of a token that is p [B, 1] times as likely as the likeliest; -inf where p is 0."""
    return logits.amax(1, keepdim=True) + p.log()


def pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """[B]: the token at which the cumulated probability of logits [B, V] reaches uniform [B], in (0, 1]."""
    cumulated = logits.softmax(1).cumsum(1, dtype=torch.float64)
    return torch.searchsorted(cumulated, (uniform[:, None] * cumulated[:, -1:]).contiguous()).squeeze(1)


def _above(logits: Tensor, threshold: Tensor) -> Tensor:
    return logits.masked_fill(logits < threshold, -math.inf)

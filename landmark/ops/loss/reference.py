"""Cross-entropy of a linear head, with the whole [N, V] logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CrossEntropy(NamedTuple):
    """Sums over the counted targets (those that are not -100); divide by `count` for means."""

    loss: Tensor  # scalar: what to differentiate, with label smoothing and z-loss
    nll: Tensor  # scalar, detached: -log p(target)
    count: Tensor  # type: ignore[assignment]  # scalar int64: counted targets; hides tuple.count
    z: Tensor  # scalar, detached: logsumexp(logits)^2, without z_loss's factor


class Head(NamedTuple):
    """What turns hidden W^T + b into the loss, besides the targets."""

    softcap: float | None = None
    scale: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """[N, V] in float32 (float64 for float64): scale (hidden W^T + b), soft-capped to cap tanh(. / cap) (Gemma 2)."""
    y = hidden @ weight.mT
    if bias is not None:
        y = y + bias
    y = (y if y.dtype == torch.float64 else y.float()) * head.scale
    return y if head.softcap is None else head.softcap * torch.tanh(y / head.softcap)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head) -> CrossEntropy:
    """hidden [N, D], weight [V, D], targets [N] -> sums over the targets that are not -100.

    Label smoothing e (Szegedy et al., 2016): (1 - e) nll + e mean_v(-log p_v); z-loss (PaLM, 2022): z_loss log(Z)^2.
    """
    keep = targets != -100
    y = logits(hidden.masked_fill(~keep[:, None], 0.0), weight, bias, head)
    lse = y.logsumexp(-1)
    nll = lse - y.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    e = head.label_smoothing
    loss = (1 - e) * nll + e * (lse - y.mean(-1)) + head.z_loss * lse.square()
    loss, likelihood, z = (t.where(keep, 0.0).sum() for t in (loss, nll.detach(), lse.detach().square()))
    return CrossEntropy(loss, likelihood, keep.sum(), z)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """log p(target) of each row [N], float32 (float64 for float64); 0 where the target is -100."""
    y = logits(hidden, weight, bias, head)
    chosen = y.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(targets == -100, 0.0, chosen - y.logsumexp(-1))

"""Cross-entropy of a linear head, a chunk of rows at a time: the [N, V] logits never exist at once.

One sweep computes losses and gradients together: the gradient of a chunk's logits (softmax minus one-hot) takes their
place, is multiplied into grad_hidden and grad_weight, and is forgotten. Backward multiplies by the incoming scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear.cpu import MIN_PRODUCT, ONEDNN_IS_FASTER, onednn
from ..products import mm, widened
from . import cpu
from .reference import Head

CHUNK_BYTES = 2**27  # of logits at a time: smaller chunks slow the matrix products, larger ones gain little
SLICE_BYTES = 2**20  # of grad_weight at a time, so that its float32 accumulation reads the product from cache


def default_chunk(weight: Tensor) -> int:
    """Rows of logits in a chunk."""
    return max(64, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))


def reduce_rows(logits: Tensor, targets: Tensor, head: Head, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`cpu.reduce_rows` in plain torch, on any device and dtype."""
    y = (logits if logits.dtype == torch.float64 else logits.float()) * head.scale
    if head.softcap is not None:
        y = head.softcap * torch.tanh(y / head.softcap)
    lse, mean = y.logsumexp(-1), y.mean(-1)
    nll = lse - y.gather(-1, targets[:, None]).squeeze(-1)
    if grad:
        g = (y - lse[:, None]).exp_().mul_((1 + 2 * head.z_loss * lse)[:, None])
        g -= head.label_smoothing / y.shape[-1]
        g.scatter_add_(-1, targets[:, None], torch.full_like(g[:, :1], head.label_smoothing - 1))
        if head.softcap is not None:
            g *= 1 - (y / head.softcap).square_()
        torch.mul(g, head.scale, out=g)
        logits.copy_(g)
    return nll, lse, mean


def through_onednn(weight: Tensor) -> bool:
    """Whether products of many rows with `weight` run faster in oneDNN than in torch."""
    return ONEDNN_IS_FASTER and weight.is_cpu and weight.dtype == torch.float32 and 16 * weight.numel() >= MIN_PRODUCT


def empty_weight_gradient(weight: Tensor, several: bool) -> Tensor:
    """[V, D]: float32 where `several` chunks are summed in it; stored [D, V] where oneDNN's product comes so."""
    if through_onednn(weight):
        return weight.new_empty(weight.mT.shape).mT
    return weight.new_empty(weight.shape, dtype=_wide(weight) if several else weight.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Gradients:
    """grad_hidden, grad_weight and grad_bias of the chunks so far; those not wanted stay of no size."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], several: bool
    ) -> None:
        self.needs = needs
        empty = [weight.new_empty(0) for _ in needs]  # outputs of a custom op may not be one and the same tensor
        self.hidden = torch.zeros_like(hidden) if needs[0] else empty[0]
        self.weight = empty_weight_gradient(weight, several) if needs[1] else empty[1]
        self.bias = torch.zeros_like(bias, dtype=_wide(bias)) if needs[2] and bias is not None else empty[2]

    def add(self, g: Tensor, hidden: Tensor, weight: Tensor, index: Tensor, first: bool) -> None:
        """g [n, V] is the gradient of the logits of hidden [n, D], rows at `index`; `first` if none before."""
        fast = through_onednn(weight)
        if self.needs[0]:
            self.hidden[index] = onednn(g, weight.mT, None) if fast else mm(g, weight)
        if self.needs[1]:
            if fast:
                product = onednn(hidden.mT, g.mT, None).mT
                self.weight = product if first else self.weight.add_(product)
            elif self.weight.dtype == g.dtype and not widened(g, hidden):
                torch.addmm(self.weight, g.mT, hidden, beta=0 if first else 1, out=self.weight)
            else:
                step = max(1, SLICE_BYTES // (hidden.shape[1] * g.element_size()))
                for part, columns in zip(self.weight.split(step), g.split(step, dim=1), strict=True):
                    product = mm(columns.mT, hidden)
                    part.copy_(product) if first else part.add_(product)
        if self.needs[2]:
            self.bias += g.sum(0, dtype=self.bias.dtype)


def sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    chunk: int,
    native: bool,
    needs: Sequence[bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Gradients]:
    """Rows whose target counts (their indices), and their nll, lse and mean logit; and the gradients."""
    index = (targets != -100).nonzero().squeeze(-1)
    kept = targets[index]
    if kept.device.type == "cpu" and len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < weight.shape[0]:
        bad = int(kept.min()) if kept.min() < 0 else int(kept.max())
        raise ValueError(f"target {bad} is outside the vocabulary of {weight.shape[0]}; ignored targets are -100")
    chunks = max(1, -(-len(index) // chunk))
    rows = max(1, -(-len(index) // chunks))  # chunks of equal length
    fast = through_onednn(weight)
    buffer = hidden.new_empty(0 if fast else min(rows, len(index)), weight.shape[0])
    gradients = Gradients(hidden, weight, bias, needs, len(hidden) > chunk)
    if not len(index):
        gradients.weight.zero_()
    nll, lse, mean = hidden.new_empty(3, len(index), dtype=_wide(hidden)).unbind()
    reduce = cpu.reduce_rows if native else reduce_rows
    for at in range(0, len(index), rows):
        part = slice(at, at + rows)
        h = hidden[part] if len(index) == len(hidden) else hidden[index[part]]
        logits = onednn(h, weight, bias) if fast else mm(h, weight.mT, bias, buffer[: len(h)])
        nll[part], lse[part], mean[part] = reduce(logits, kept[part], head, any(needs))
        if any(needs):
            gradients.add(logits, h, weight, index[part], first=at == 0)
        del logits  # before the next chunk's
    return index, nll, lse, mean, gradients

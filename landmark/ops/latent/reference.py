"""The parts of latent attention's step, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused import rms_norm, rotary


def absorb(
    q: Tensor, down: Tensor, weight: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in the public function; any dtype, differentiable."""
    head_dim, rank = weight.shape[1:]
    turned = rotary(q[..., head_dim:], cos, sin, interleaved=interleaved)
    latent = rms_norm(down[..., :rank], scale, eps, offset)
    key = rotary(down[..., None, rank:], cos, sin, interleaved=interleaved)
    query = torch.cat([torch.einsum("bthd,hdr->bthr", q[..., :head_dim], weight), turned], -1)
    return query, torch.cat([latent.unsqueeze(-2), key], -1)

"""RWKV-7's decoded token in one call, against the layer's own equations in float64."""

from __future__ import annotations

import pytest
import torch

from landmark.ctx import Bounds, Ctx
from landmark.nn.rwkv7 import RWKV7, VALUES
from landmark.ops.delta import goose

from ..models.families import perturb

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.skipif(goose.SOURCE.why_not() is not None, reason=str(goose.SOURCE.why_not()))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_step(residual: bool, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixer, dim = RWKV7.Config(head_dim=head_dim, value_residual=residual).build(3 * head_dim), 3 * head_dim
    mixer.reset_at(1, 3)
    perturb(mixer)
    for tokens in (1, 5):
        x, first = torch.randn(2, tokens, 1, dim).to(dtype)
        results = {}
        for kind in (dtype, torch.float64):
            mixer.to(dtype).to(kind)
            state = mixer.new_state(tokens, 9, kind, torch.device("cpu"))
            filled = torch.randn(state.tensors["matrix"].shape, generator=torch.Generator().manual_seed(1))
            state.tensors["matrix"] = before = filled.to(state.tensors["matrix"].dtype)
            ctx = Ctx(torch.zeros(tokens, 1, dtype=torch.long), Bounds(tokens, 1), (1,) * tokens)
            ctx.shared[VALUES] = first.to(kind)
            reason = goose.why_not(head_dim, before, x.to(kind), mixer.remove)
            assert (reason is None) == (kind is dtype)
            results[kind] = mixer(x.to(kind), ctx, state), state.tensors["matrix"]
            assert torch.equal(before, filled.to(before.dtype))  # a snapshot may hold on to it
        for got, want in zip(results[dtype], results[torch.float64], strict=True):
            assert got.shape == want.shape
            assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


def test_what_cannot_run() -> None:
    x, state = torch.zeros(1, 1, 24), torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        assert "multiple of 16" in str(goose.why_not(8, state, x))
        assert "float64" in str(goose.why_not(16, state, x.double()))
    assert "gradient" in str(goose.why_not(16, state, x))

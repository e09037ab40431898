"""Drawing: the kernel against torch's operations and against the settings' definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from landmark.ops.draw import cpu, draw, reference, why_not

needs_kernel = pytest.mark.skipif(cpu.SOURCE.why_not() is not None, reason="no C compiler")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_kernel)]
SETTINGS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (1.0, 0, 0.99, 0.0),
    (0.8, 40, 0.9, 0.0), (1.0, 0, 1.0, 0.1), (1.5, 30, 0.8, 0.05), (0.1, 1, 1.0, 0.0), (1.0, 10_000, 0.5, 0.0),
    (2.0, 0, 1e-6, 0.0), (1.0, 0, 0.999999, 0.0), (1.0, 0, 1.0, 1.0), (5.0, 3, 0.4, 0.3),
]  # fmt: skip


def columns(settings: list[tuple[float, int, float, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heat, k, p, m = zip(*settings, strict=True)
    return torch.tensor(heat), torch.tensor(k), torch.tensor(p), torch.tensor(m)


def kept(x: Tensor, heat: float, k: int, p: float, m: float) -> list[int]:
    """The tokens that may be drawn from x [V], one setting after the other, by their definitions."""
    order = sorted(range(len(x)), key=lambda i: -x[i].item())
    if heat == 0:
        return order[:1]
    if 0 < k < len(order):
        order = [i for i in order if x[i] >= x[order[k - 1]]]
    weights = {i: math.exp((x[i].item() - x[order[0]].item()) / heat) for i in order}
    if p < 1:
        mass, count = 0.0, 0
        while mass < p * sum(weights.values()):
            mass += weights[order[count]]
            count += 1
        order = [i for i in order if x[i] >= x[order[count - 1]]]
    return [i for i in order if weights[i] >= m]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 7, 97, 1500, 5000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_what_may_be_drawn(backend: str, vocab: int, scale: float) -> None:
    g = torch.Generator().manual_seed(vocab)
    x = torch.randn(len(SETTINGS), vocab, generator=g) * scale
    heat, k, p, m = columns(SETTINGS)
    _, cuts = draw(x, heat, k, p, m, torch.full((len(x),), 0.5, dtype=torch.float64), backend=backend)
    for row, cut, setting in zip(x, cuts, SETTINGS, strict=True):
        expected = kept(row.double(), *setting)
        # the last one kept by mass may differ by rounding
        assert abs(int((row >= cut).sum()) - len(expected)) <= (setting[2] < 1), setting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_kernel
def test_the_cut_of_top_k_is_the_kth_largest(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    for turn in range(300):
        vocab = int(torch.randint(2, 3000, (1,), generator=g))
        k = int(torch.randint(1, vocab if turn % 3 else min(vocab, 60), (1,), generator=g))
        x = (torch.randn(2, vocab, generator=g) * 10.0 ** (turn % 9 - 4)).to(dtype)
        if turn % 5 == 0:
            x[:, 1 + torch.randperm(vocab - 1, generator=g)[: vocab // 2]] = -math.inf
        if turn % 7 == 0:
            x = x.round()  # many ties
        settings = columns([(1.0, k, 1.0, 0.0)] * 2)
        _, cuts = draw(x, *settings, torch.full((2,), 0.5, dtype=torch.float64), backend="cpu")
        assert torch.equal(cuts, x.float().topk(k).values[:, -1]), (vocab, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_kernel
def test_the_kernel_draws_what_the_equations_draw(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    settings = SETTINGS * 40
    wide = torch.randn(len(settings), 3100, generator=g) * torch.rand(len(settings), 1, generator=g) * 8
    x = wide.to(dtype)[:, 3:3003]  # rows that do not begin where the last one ends
    x[::7, 100:] = -math.inf
    uniform = 1 - torch.rand(len(settings), dtype=torch.float64, generator=g)
    ours, cuts = draw(x, *columns(settings), uniform, backend="cpu")
    theirs, their_cuts = draw(x, *columns(settings), uniform, backend="reference")
    assert (ours == theirs).float().mean() > 0.99  # the rest by rounding
    same = ((x.float() >= cuts[:, None]) == (x.float() >= their_cuts[:, None])).all(1)
    assert same.float().mean() > 0.95
    assert (x.float().gather(1, ours[:, None]).squeeze(1) >= cuts).all()
    for n in range(0, len(settings), 31):  # alone, and with other threads: the same
        one, _ = draw(x[n : n + 1], *columns(settings[n : n + 1]), uniform[n : n + 1], backend="cpu")
        assert one.item() == ours[n].item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies(backend: str) -> None:
    """A grid of numbers in (0, 1] finds each token as often as its probability says."""
    x, grid = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -math.inf, 1.5]), 20_000
    uniform = (torch.arange(grid, dtype=torch.float64) + 1) / grid
    settings = columns([(0.9, 0, 1.0, 0.0)] * grid)
    tokens, _ = draw(x.expand(grid, -1).contiguous(), *settings, uniform, backend=backend)
    expected = (x / 0.9).softmax(0)
    assert (torch.bincount(tokens, minlength=7) / grid - expected).abs().max() < 2 / grid


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_ends_and_ties(backend: str, heat: float) -> None:
    tied = torch.tensor([[1.0, 3.0, 3.0, -1.0]]).expand(3, -1).contiguous()
    settings = columns([(heat, 1, 1.0, 0.0)] * 3)
    tokens, _ = draw(tied, *settings, torch.tensor([1e-300, 0.6, 1.0], dtype=torch.float64), backend=backend)
    assert tokens.tolist() == ([1, 1, 1] if heat == 0 else [1, 2, 2])
    flat = torch.zeros(2, 5000)
    tokens, _ = draw(flat, *columns([(1.0, 0, 0.5, 0.0)] * 2), torch.tensor([1e-300, 1.0]).double(), backend=backend)
    assert tokens.tolist() == [0, 4999]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_what_is_no_number(backend: str, heat: float) -> None:
    x = torch.randn(4, 130)
    x[0, 77], x[1], x[2, 5] = math.nan, -math.inf, math.inf
    tokens, _ = draw(x, *columns([(heat, 0, 1.0, 0.0)] * 4), torch.full((4,), 0.5).double(), backend=backend)
    assert tokens[:3].tolist() == [130, 130, 130] and tokens[3] < 130


def test_a_number_reads_the_cumulative_distribution() -> None:
    x = torch.tensor([[0.0, -math.inf, math.log(2), math.log(1), -math.inf]]).repeat(5, 1)
    u = torch.tensor([1e-12, 0.2499, 0.2501, 0.7499, 1.0], dtype=torch.float64)
    assert reference.pick(x, u).tolist() == [0, 0, 2, 2, 3]


def test_ties_with_the_last_one_kept_stay() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert (x >= reference.top_k_threshold(x, torch.tensor([[2]]))).tolist() == [[True, True, True, False]]
    assert (x >= reference.top_p_threshold(x, torch.tensor([[0.7]]))).tolist() == [[True, True, True, False]]
    assert (x >= reference.min_p_threshold(x, torch.tensor([[0.3]]))).tolist() == [[True, True, True, False]]


def test_forcing_the_kernel_where_it_cannot() -> None:
    x, settings = torch.randn(1, 5, dtype=torch.float64), columns([(1.0, 0, 1.0, 0.0)])
    with pytest.raises(ValueError, match="float32 and bfloat16 on cpu"):
        draw(x, *settings, torch.tensor([0.5]).double(), backend="cpu")
    with pytest.raises(ValueError, match="unknown backend"):
        why_not("triton", x)  # type: ignore[arg-type]

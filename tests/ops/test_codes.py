"""Weights as codes: the layouts, what they keep, and every backend against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landmark.ops.quant import codes as package
from landmark.ops.quant.codes import (
    Backend,
    Bits,
    Map,
    encode,
    exact,
    linear,
    linears,
    reference,
    restore,
    restore_rows,
)

SHAPES = [(1, 64, 5), (3, 96, 7), (8, 256, 33), (9, 130, 4), (16, 33, 64), (45, 70, 40)]


def made(out: int, width: int, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0
    if bits == 11:
        weight[out - 1, -22:] = (4.0 ** -torch.arange(5, 16)).repeat(2)  # not all are in a table
        weight[out - 1, -11:] *= -1
    weight = weight.bfloat16().float() if bits == 11 else weight
    return weight, *encode(weight.bfloat16() if bits == 11 else weight, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_code_of_every_weight(shape: tuple[int, int, int], bits: Bits) -> None:
    _, width, out = shape
    weight, codes, side = made(out, width, bits)
    pairs, groups = -(-out // 32), -(-width // 32)
    assert codes.shape == (pairs, groups, 2, 64 * bits) and side.shape == (pairs, groups, 2, 16)
    back = reference.restore(codes, side, bits, out, width, torch.float32)
    of_rows = side.view(torch.float16).float().abs().permute(0, 2, 3, 1).flatten(0, 2)[:out]
    step = of_rows.repeat_interleave(32, 1)[:, :width]
    assert ((back - weight).abs() <= step * (0.502 if bits == 8 else 1.002)).all()  # 4 bits: one side is cut by a step
    assert torch.equal(restore(codes, side, bits, out, width, torch.float32), back)
    assert torch.equal(restore(codes, side, bits, out, width, torch.bfloat16), back.bfloat16())
    ids = torch.tensor([out - 1, 0, out // 2])
    assert torch.equal(restore_rows(codes, side, bits, ids, width, torch.float32), back[ids])


def bits_of(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int16)


@pytest.mark.parametrize("shape", SHAPES)
def test_eleven_bits_keep_every_bit(shape: tuple[int, int, int]) -> None:
    _, width, out = shape
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    odd = [1e30, -1e-39, 5e-41, float("inf"), float("-inf"), float("nan"), -0.0, 1e-20, -1e-30, 1e10, -1e-10, 0.0, 3e38]
    weight[0, : len(odd)] = torch.tensor(odd)
    weight[out // 2] = 0
    codes, side = encode(weight, 11)
    plain = reference.encode(weight, 11)
    assert torch.equal(codes, plain[0]) and torch.equal(side, plain[1])
    assert codes.shape == (-(-out // 16), -(-width // 32), 704)
    assert exact.parts(side, len(codes))[0][-1] >= 3  # numbers whose exponents are in no table
    for found in (restore, reference.restore):
        assert torch.equal(bits_of(found(codes, side, 11, out, width, torch.bfloat16)), bits_of(weight))
        wide = found(codes, side, 11, out, width, torch.float32)
        assert torch.equal(wide.nan_to_num(7), weight.float().nan_to_num(7))
    ids = torch.tensor([out - 1, 0, out // 2, 0])
    assert torch.equal(bits_of(restore_rows(codes, side, 11, ids, width, torch.bfloat16)), bits_of(weight[ids]))


def test_eleven_bits_lie_as_documented() -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[18, :24], weight[17, 5] = 4.0 ** -torch.arange(5, 29), -1e30  # more exponents than a table has
    codes, side = encode(weight, 11)
    starts, tables, beside = side[:4].tolist(), side[4:10].view(torch.uint8), side[10:].view(torch.uint8)
    for tile in range(3):
        places = [(tile * 16 + i // 16 * 4 + i % 8 // 2, step * 32 + j * 4 + i % 16 // 8 * 2 + i % 2)
                  for step in range(2) for j in range(8) for i in range(64)]  # fmt: skip
        rest = iter(beside[starts[tile] : starts[tile + 1]].tolist())
        for n, (row, column) in enumerate(places):
            step, j, i = codes[tile, n // 512].tolist(), n // 64 % 8, n % 64
            pointer = (step[j // 4 * 64 + i] >> 2 * (j % 4) & 3) + 4 * (step[128 + 8 * j + i // 8] >> i % 8 & 1)
            exponent = int(tables[8 * tile + pointer]) if pointer < 7 else next(rest)
            own = step[192 + 64 * j + i]
            if row < 40 and column < 40:
                want = int(bits_of(weight)[row, column]) & 0xFFFF
                assert (own & 128) << 8 | (exponent & 127) << 8 | exponent & 128 | own & 127 == want
            else:
                assert pointer == own == 0
        assert not list(rest)
    assert starts[2] - starts[1] > 17


def test_eleven_bits_are_few() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, side = encode(weight, 11)
    assert 8 * (codes.nbytes + side.nbytes) / weight.numel() < 11.25
    noise = torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16).view(torch.bfloat16)  # kept all the same
    assert torch.equal(bits_of(restore(*encode(noise, 11), 11, 64, 64, torch.bfloat16)), bits_of(noise))


def test_what_eleven_bits_cannot_keep() -> None:
    with pytest.raises(ValueError, match="keep bfloat16 numbers, and these are float32"):
        encode(torch.zeros(2, 2), 11)
    with pytest.raises(ValueError, match="of 4 or 8 bits, not of 11"):
        linear(torch.zeros(1, 2), *encode(torch.zeros(2, 2).bfloat16(), 11), None, 11, 2, round_x=True)
    _, side = encode(torch.randn(40, 40).bfloat16(), 11)
    exact.check_side(side, 40, 40)
    backward, long = side.clone(), side.clone()
    backward[1], long[3] = -1, 2**30
    for bad in (backward, long, side[:-1], torch.cat([side, side[:1]])):
        with pytest.raises(ValueError, match="does not say where the exponents of its 3 tiles begin"):
            exact.check_side(bad, 40, 40)
    for bad in (side.short(), side[:20], side[None]):
        with pytest.raises(ValueError, match=r"40 x 40 numbers need int32 \[58\] or longer"):
            exact.check_side(bad, 40, 40)


def test_rows_of_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "ROWS_AT_ONCE", 3)
    weight, codes, side = made(70, 40, 11)
    ids = torch.tensor([69, 0, 3, 3, 16, 40, 69])
    assert torch.equal(exact.decode_rows(codes, side, ids, 40).float(), weight[ids])
    assert exact.decode_rows(codes, side, ids[:0], 40).shape == (0, 40)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_lie_as_documented(bits: Bits) -> None:
    numbers = torch.randint(-7 if bits == 4 else -127, 8 if bits == 4 else 128, (3, 2, 16, 32)).float()
    codes = reference.pack(numbers, bits)
    assert torch.equal(reference.unpack(codes, bits), numbers)
    tile = codes[2, 1].tolist()
    for row, column in [(0, 0), (5, 9), (15, 31), (8, 22)]:
        if bits == 4:
            byte = tile[column // 8 * 64 + row * 4 + column % 2 * 2 + column % 8 // 4]
            found = (byte >> column % 4 // 2 * 4 & 15) - 8
        else:
            byte = tile[column // 4 * 64 + row // 4 * 16 + column % 4 // 2 * 8 + row % 4 * 2 + column % 2]
            found = (byte & 127) * (-1 if byte & 128 else 1)
        assert found == numbers[2, 1, row, column]


@pytest.mark.parametrize("bits", [4, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "few", "restored"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], backend: Backend, dtype: torch.dtype, bits: Bits) -> None:
    rows, width, out = shape
    _, codes, side = made(out, width, bits)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    if (reason := package.why_not(backend, x, codes, bits)) is not None:
        pytest.fail(reason)
    kept = torch.float32 if backend == "few" else dtype  # what the weight is rounded to before it meets x
    whole = reference.restore(codes, side, bits, out, width, kept).double()
    want = x.double() @ whole.mT + bias.double()
    got = linear(x, codes, side, bias, bits, out, backend=backend)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < (3e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "few"])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 520, 200)])
def test_rounded_x_against_float64(
    shape: tuple[int, int, int], backend: Backend, dtype: torch.dtype, bits: Bits
) -> None:
    rows, width, out = shape
    _, codes, side = made(out, width, bits)
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(rows, width, generator=generator) * torch.logspace(-3, 3, width)).to(dtype)
    x[0, :32] = 0
    bias = torch.randn(out, generator=generator).to(dtype)
    if (reason := package.why_not(backend, x, codes, bits, True)) is not None:
        pytest.fail(reason)
    kept = reference.rounded(x.float())
    step = x.float().abs().max() / 127
    assert 0 < (kept - x.float()).abs().max() <= 0.5001 * step
    want = kept.double() @ reference.restore(codes, side, bits, out, width, torch.float32).double().mT + bias.double()
    got = linear(x, codes, side, bias, bits, out, round_x=True, backend=backend)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < (3e-6 if dtype == torch.float32 else 5e-3)
    plain = linear(x.float(), codes, side, bias.float(), bits, out)
    assert 1e-4 < (want - plain).abs().max() / want.abs().max() < 0.02  # x was rounded, and by no more than that


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_rounded_x_does_not_depend_on_its_neighbours_to_the_bit(dtype: torch.dtype, bits: Bits) -> None:
    _, codes, side = made(77, 320, bits)
    x = torch.randn(201, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = torch.cat([linear(row[None], codes, side, None, bits, 77, round_x=True, backend="few") for row in x])
    for rows in (*range(1, 18), 201):
        assert torch.equal(linear(x[:rows], codes, side, None, bits, 77, round_x=True), alone[:rows])


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_no_number_stays_none_where_x_is_rounded(bits: Bits) -> None:
    _, codes, side = made(20, 96, bits)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(3, 96)
        x[1, 40] = bad
        y = linear(x, codes, side, None, bits, 20, round_x=True, backend="few")
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_gradients_pass_where_x_is_rounded() -> None:
    _, codes, side = made(8, 64, 4)
    x = torch.randn(2, 64, requires_grad=True)
    y = linear(x, codes, side, None, 4, 8, round_x=True)
    y.sum().backward()
    whole = reference.restore(codes, side, 4, 8, 64, torch.float32)
    torch.testing.assert_close(x.grad, whole.sum(0).expand(2, -1))
    with torch.no_grad():
        torch.testing.assert_close(y, linear(x, codes, side, None, 4, 8, round_x=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(dtype: torch.dtype, bits: Bits) -> None:
    _, codes, side = made(77, 320, bits)
    x = torch.randn(16, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = torch.cat([linear(row[None], codes, side, None, bits, 77, backend="few") for row in x])
    for rows in range(1, 17):
        assert torch.equal(linear(x[:rows], codes, side, None, bits, 77, backend="few"), alone[:rows])


@pytest.mark.parametrize(("bits", "round_x"), [(4, False), (4, True), (8, False), (8, True), (11, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_several_maps_in_one_call(rows: int, round_x: bool, dtype: torch.dtype, bits: Bits) -> None:
    x, bias = torch.randn(2, rows, 200).to(dtype), torch.randn(40).to(dtype)
    maps = [Map(*made(out, 200, bits)[1:], bias if out == 40 else None, out) for out in (300, 40, 5)]
    with torch.no_grad():
        got = linears(x, maps, bits, round_x)
        want = [linear(x, m.codes, m.side, m.bias, bits, m.rows, round_x=round_x) for m in maps]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_row_of_eleven_bits_does_not_depend_on_any_number_of_neighbours() -> None:
    _, codes, side = made(77, 640, 11)
    generator = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((530, 640), (77,)))
    alone = torch.cat([linear(row[None], codes, side, bias, 11, 77, backend="few") for row in x])
    most = package.most_rows(11, torch.bfloat16, False)
    for rows in (17, 95, 96, 97, 515, 516, 517, 530):
        if rows <= most:
            assert torch.equal(linear(x[:rows], codes, side, bias, 11, 77, backend="few"), alone[:rows])
    want = x.double() @ reference.restore(codes, side, 11, 77, 640, torch.float64).mT + bias.double()
    assert (alone.double() - want).abs().max() < 5e-3 * want.abs().max()


def test_a_gradient_flows_to_x() -> None:
    _, codes, side = made(8, 64, 4)
    x = torch.randn(2, 64, requires_grad=True)
    linear(x, codes, side, None, 4, 8).sum().backward()
    assert x.grad is not None
    whole = reference.restore(codes, side, 4, 8, 64, torch.float32)
    torch.testing.assert_close(x.grad, whole.sum(0).expand(2, -1))


def test_backends_refuse() -> None:
    _, codes, side = made(8, 64, 4)
    with pytest.raises(ValueError, match="1 to 96 rows, not 97"):
        linear(torch.zeros(97, 64), codes, side, None, 4, 8, backend="few")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        linear(torch.zeros(1, 64).double(), codes, side, None, 4, 8, backend="restored")


@pytest.mark.parametrize("bits", [4, 8, 11])
def test_gradients_of_many_pieces(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "PIECE", 1)
    _, codes, side = made(150, 40, bits)
    whole = reference.restore(codes, side, bits, 150, 40, torch.float32)
    x, bias = torch.randn(3, 40, 40, requires_grad=True), torch.randn(150, requires_grad=True)
    same = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    y = linear(x, codes, side, bias, bits, 150)
    want = torch.nn.functional.linear(same[0], whole, same[1])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, [x, bias], grad), torch.autograd.grad(want, same, grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

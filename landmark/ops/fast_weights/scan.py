"""The chunks of a memory one after the other, and the gradient of that: matrix products, and pieces between them.

For every layer of the memory, with weights W = `now` and momentum S before a chunk, keys' inputs x, queries' inputs h:

    z = x W           x_(l+1) = gelu(z)        g_L = loss gradient at z_L,  g_l = gelu'(z_l) * (g_(l+1) W_(l+1)^T)
    o = keep h W + push h S - (reach * h x^T) g              h_(l+1) = gelu(o)
    W' = end_keep W + end_push S - (take * x)^T g            S' = carry S - (store * x)^T g

What crosses from one chunk to another, backwards as forwards, is W and S; the loop of the backward pass adds up their
gradients in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .pieces import Act, Slope, gelu_slopes, loss_gradient, loss_gradient_backward


class Plan(NamedTuple):
    """What the scan knows besides tensors: rows (sequences * heads) of each step, and of those that end with it, which
    [rows, 1, 1] end with a complete chunk."""

    counts: tuple[int, ...]
    complete: tuple[Tensor | None, ...]
    depth: int
    act: Act
    bias: bool
    eps: float
    lasting: bool  # momentum goes on from chunk to chunk
    begun: bool  # the initial momentum is not zero, and `base` may not be `now`
    trained: bool = False


class Kept(NamedTuple):
    """Of a step, what its gradient needs, by layer."""

    base: list[Tensor]
    now: list[Tensor]
    momentum: list[Tensor]
    inputs: list[Tensor]  # x
    slopes: list[Tensor]  # gelu'(z), gelu''(z) below the last layer
    bends: list[Tensor | None]
    backs: list[Tensor]  # g_(l+1) W_(l+1)^T
    grads: list[Tensor]  # g
    loss: Slope
    asked: list[Tensor]  # h
    answers: list[Tensor]  # gelu'(o) below the last layer
    from_now: list[Tensor]  # h W, h S
    from_momentum: list[Tensor]


def scan(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
    """o [N, size, d], and base, now and momentum [rows, in, out] in the end.

    `tensors`: x, h, goal, gain, and the nine of `Steps`; then base, now and momentum of every layer.
    """
    plan = plan._replace(trained=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
    out = Scan.apply(plan, *tensors) if plan.trained else forward(plan, *tensors)[0]
    d = plan.depth
    return out[0], (out[1 : 1 + d], out[1 + d : 1 + 2 * d], out[1 + 2 * d :])


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        out, ctx.kept = forward(plan, *tensors)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx.plan, ctx.kept, ctx.saved_tensors, grads))


def with_ones(x: Tensor, bias: bool) -> Tensor:
    """x with a constant input, whose weights are the biases."""
    return F.pad(x, (0, 1), value=1.0) if bias else x


def forward(plan: Plan, *tensors: Any) -> tuple[tuple[Tensor, ...], list[Kept]]:
    """As `scan`, flat; and what the gradient needs."""
    x, h, goal, gain, reach, keep, push, end_keep, end_push, take, carry, store = tensors[:12]
    depth, size = plan.depth, x.shape[1]
    base, now, momentum = (list(tensors[12 + i * depth : 12 + (i + 1) * depth]) for i in range(3))
    first = reach * torch.bmm(h, x.mT)
    both = torch.cat([x, h], 1)
    if not plan.begun:
        base, momentum = now, []
    kept: list[Kept] = []
    outs: list[Tensor] = []
    ends: list[list[Tensor]] = []
    start = 0
    for number, count in enumerate(plan.counts):
        rows, going = slice(start, start + count), plan.counts[number + 1] if number + 1 < len(plan.counts) else 0
        start += count
        one = number == 0 and plan.begun  # the gradient may be taken elsewhere than where queries are answered
        base, now, momentum = (
            [w[:count] for w in part] if part and len(part[0]) > count else part for part in (base, now, momentum)
        )
        if one:
            z, o = torch.bmm(x[rows], base[0]), torch.bmm(h[rows], now[0])
        else:
            z, o = torch.bmm(both[rows], now[0]).split(size, 1)
        inputs, slopes, bends = [x[rows]], [], []
        for layer in range(1, depth):
            y, slope, bend = gelu_slopes(z, plan.act, plan.trained)
            inputs.append(with_ones(y, plan.bias))
            slopes.append(slope)
            bends.append(bend)
            z = torch.bmm(inputs[-1], base[layer])
        loss = loss_gradient(z, goal[rows], gain[:count] if gain is not None else None, plan.eps)
        grads = [loss.g]
        backs: list[Tensor] = []
        for layer in range(depth - 1, 0, -1):
            backs.insert(0, torch.bmm(grads[0], base[layer].mT)[..., : slopes[layer - 1].shape[2]])
            grads.insert(0, backs[0] * slopes[layer - 1])
        asked, answers, from_now, from_momentum = [h[rows]], [], [], []
        for layer in range(depth):
            if layer:
                y, slope, _ = gelu_slopes(o, plan.act, False)
                asked.append(with_ones(y, plan.bias))
                answers.append(slope)
                o = torch.bmm(asked[-1], now[layer])
            from_now.append(o)
            if keep is not None:
                o = o * keep[rows]
            if momentum:
                from_momentum.append(torch.bmm(asked[layer], momentum[layer]))
                o = torch.addcmul(o, from_momentum[-1], push[rows])
            meets = reach[rows] * torch.bmm(asked[layer], inputs[layer].mT) if layer else first[rows]
            o = torch.baddbmm(o, meets, grads[layer], alpha=-1)
        outs.append(o)
        after = []
        for layer, w in enumerate(now):
            w = w if end_keep is None else w * end_keep[rows]
            if momentum:
                w = torch.addcmul(w, momentum[layer], end_push[rows])
            after.append(torch.baddbmm(w, (inputs[layer] * take[rows]).mT, grads[layer], alpha=-1))
        carried = []
        if plan.lasting or going < count:
            for layer in range(depth):
                moved = (inputs[layer] * store[rows]).mT
                if momentum:
                    s = momentum[layer] * carry[rows]
                    carried.append(torch.baddbmm(s, moved, grads[layer], alpha=-1))
                else:
                    carried.append(-torch.bmm(moved, grads[layer]))
        if plan.trained:
            kept.append(Kept(
                base, now, momentum, inputs, slopes, bends, backs, grads, loss, asked, answers, from_now, from_momentum
            ))  # fmt: skip
        if going < count:
            complete = plan.complete[number]
            left = [a[going:] if complete is None else torch.where(complete, a[going:], b[going:])
                    for a, b in zip(after, base, strict=True)]  # fmt: skip
            ends.insert(0, [*left, *(w[going:] for w in after), *(w[going:] for w in carried)])
        base = now = after
        momentum = carried if plan.lasting else []
    return (torch.cat(outs), *(torch.cat(parts) for parts in zip(*ends, strict=True))), kept


def backward(
    plan: Plan, kept: list[Kept], tensors: tuple[Any, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of `tensors` from those of what `scan` returns."""
    x, h, goal, gain, reach, keep, push, end_keep, end_push, take, carry, store = tensors[:12]
    depth = plan.depth
    d_out = grads[0] if grads[0] is not None else torch.zeros_like(goal)
    finals = [list(grads[1 + i * depth : 1 + (i + 1) * depth]) for i in range(3)]
    dx, dh, d_goal = torch.empty_like(x), torch.empty_like(h), torch.empty_like(goal)
    d_gain = torch.zeros_like(gain) if gain is not None else None
    d_meets, d_reach = torch.empty_like(reach), torch.zeros_like(reach)
    d_keep, d_push, d_end_keep, d_end_push, d_take, d_carry, d_store = (
        torch.zeros_like(t) if t is not None else None for t in (keep, push, end_keep, end_push, take, carry, store)
    )
    d_now: list[Tensor | None] = [None] * depth
    d_momentum: list[Tensor | None] = [None] * depth
    d_base: list[Tensor | None] = [None] * depth
    first = reach * torch.bmm(h, x.mT)
    both = torch.cat([h, x], 1)
    start = sum(plan.counts)
    for number in range(len(plan.counts) - 1, -1, -1):
        count, k = plan.counts[number], kept[number]
        going = plan.counts[number + 1] if number + 1 < len(plan.counts) else 0
        rows, start = slice(start - count, start), start - count
        one = number == 0 and plan.begun
        # what comes back from later steps, and from the end of those that end here
        d_after: list[Tensor | None] = []
        d_carried: list[Tensor | None] = []
        d_left: list[Tensor | None] = []
        for layer in range(depth):
            base_end, now_end, momentum_end = (_some(f[layer], going, count) for f in finals)
            left = None
            if base_end is not None and going < count:
                complete = plan.complete[number]
                done = base_end if complete is None else base_end * complete
                now_end = done if now_end is None else now_end + done
                if complete is not None:
                    left = torch.cat([base_end.new_zeros(going, *base_end.shape[1:]), base_end * ~complete])
            d_left.append(left)
            d_after.append(_joined(d_now[layer], now_end, going, count))
            d_carried.append(_joined(d_momentum[layer] if plan.lasting else None, momentum_end, going, count))
        d_inputs: list[Any] = [None] * depth
        d_grads: list[Any] = [None] * depth
        here: list[Tensor] = []
        here_momentum: list[Tensor | None] = []
        for layer in range(depth):
            xs, g, back = k.inputs[layer], k.grads[layer], d_after[layer]
            if back is not None:
                moved = torch.bmm(g, back.mT)
                d_inputs[layer] = moved * -take[rows]
                d_take[rows] -= (moved * xs).sum(-1, keepdim=True)  # type: ignore[index]
                d_grads[layer] = torch.bmm(xs * -take[rows], back)
            later = d_carried[layer]
            if later is not None:
                moved = torch.bmm(g, later.mT)
                d_inputs[layer] = _plus(d_inputs[layer], moved * -store[rows])
                d_store[rows] -= (moved * xs).sum(-1, keepdim=True)  # type: ignore[index]
                d_grads[layer] = _plus(d_grads[layer], torch.bmm(xs * -store[rows], later))
            s: Tensor | None = None
            if k.momentum:
                if later is not None:
                    d_carry[rows] += _dot(later, k.momentum[layer])  # type: ignore[index]
                    s = later * carry[rows]
                if back is not None:
                    d_end_push[rows] += _dot(back, k.momentum[layer])  # type: ignore[index]
                    s = back * end_push[rows] if s is None else s.addcmul_(back, end_push[rows])
                s = torch.zeros_like(k.momentum[layer]) if s is None else s
            here_momentum.append(s)
            if back is None:
                here.append(torch.zeros_like(k.now[layer]))
            elif end_keep is not None:
                d_end_keep[rows] += _dot(back, k.now[layer])  # type: ignore[index]
                here.append(back * end_keep[rows])
            else:
                here.append(back)
        # answers
        do = d_out[rows]
        d_first = do
        for layer in range(depth - 1, -1, -1):
            hs, xs, g = k.asked[layer], k.inputs[layer], k.grads[layer]
            kept_do = do if keep is None else do * keep[rows]
            if keep is not None:
                d_keep[rows] += (do * k.from_now[layer]).sum(-1, keepdim=True)  # type: ignore[index]
            if layer:
                dot = torch.bmm(hs, xs.mT)
                meets = reach[rows] * dot
            else:
                meets = first[rows]
            d_grads[layer] = (
                -torch.bmm(meets.mT, do) if d_grads[layer] is None else d_grads[layer].baddbmm_(meets.mT, do, alpha=-1)
            )
            d_hs = torch.bmm(kept_do, k.now[layer].mT)
            if layer or one:
                here[layer].baddbmm_(hs.mT, kept_do)
            if k.momentum:
                pushed = do * push[rows]
                d_push[rows] += (do * k.from_momentum[layer]).sum(-1, keepdim=True)  # type: ignore[index]
                d_hs.baddbmm_(pushed, k.momentum[layer].mT)
                s = here_momentum[layer]
                assert s is not None
                s.baddbmm_(hs.mT, pushed)
            if layer:
                d_dot = torch.bmm(do, g.mT).neg_()
                d_reach[rows] += d_dot * dot
                d_dot *= reach[rows]
                d_hs.baddbmm_(d_dot, xs)
                extra = torch.bmm(d_dot.mT, hs)
                d_inputs[layer] = _plus(d_inputs[layer], extra)
                do = d_hs[..., : k.answers[layer - 1].shape[2]] * k.answers[layer - 1]
            else:
                dh[rows] = d_hs
                d_first, first_do = kept_do, do
        torch.bmm(first_do, k.grads[0].mT, out=d_meets[rows])
        # what was learned: the gradient of a gradient
        if one:
            at = [torch.zeros_like(w) if left is None else left for w, left in zip(k.base, d_left, strict=True)]
        else:
            at = [w if left is None else w.add_(left) for w, left in zip(here, d_left, strict=True)]
        d_slopes: list[Tensor] = []
        for layer in range(depth - 1):
            d_slopes.append(d_grads[layer] * k.backs[layer])
            d_back = with_zeros(d_grads[layer] * k.slopes[layer], plan.bias)
            d_grads[layer + 1] = d_grads[layer + 1].baddbmm_(d_back, k.base[layer + 1])
            at[layer + 1].baddbmm_(d_back.mT, k.grads[layer + 1])
        dz, d_goal[rows], gains = loss_gradient_backward(
            d_grads[-1], k.loss, goal[rows], gain[:count] if gain is not None else None
        )
        if d_gain is not None and gains is not None:
            d_gain[:count] += gains
        for layer in range(depth - 1, 0, -1):
            at[layer].baddbmm_(k.inputs[layer].mT, dz)
            d_in = d_inputs[layer] if d_inputs[layer] is not None else torch.zeros_like(k.inputs[layer])
            d_in.baddbmm_(dz, k.base[layer].mT)
            d_in, bend = d_in[..., : k.slopes[layer - 1].shape[2]], k.bends[layer - 1]
            assert bend is not None
            dz = torch.addcmul(d_in * k.slopes[layer - 1], d_slopes[layer - 1], bend)
        if d_inputs[0] is None:
            dx[rows] = torch.bmm(dz, k.base[0].mT)
        else:
            dx[rows] = d_inputs[0].baddbmm_(dz, k.base[0].mT)
        if one:
            at[0].baddbmm_(k.inputs[0].mT, dz)
        else:
            at[0].baddbmm_(both[rows].mT, torch.cat([d_first, dz], 1))
        d_now, d_momentum = list(here), list(here_momentum)
        d_base = list(at) if one else [None] * depth
    d_meets.neg_()
    d_reach += d_meets * torch.bmm(h, x.mT)
    d_meets *= reach
    dh.baddbmm_(d_meets, x)
    dx.baddbmm_(d_meets.mT, h)
    return [
        dx, dh, d_goal, d_gain, d_reach, d_keep, d_push, d_end_keep, d_end_push, d_take, d_carry, d_store,
        *d_base, *d_now, *d_momentum,
    ]  # fmt: skip


def with_zeros(x: Tensor, bias: bool) -> Tensor:
    """The gradient of weights' outputs that a constant input has no part in."""
    return F.pad(x, (0, 1)) if bias else x


def _some(x: Tensor | None, start: int, end: int) -> Tensor | None:
    return x[start:end] if x is not None else None


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.add_(b)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products over the last two axes, [N, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)


def _joined(later: Tensor | None, end: Tensor | None, going: int, count: int) -> Tensor | None:
    """Gradients of the first `going` rows from later steps, and of the others from the end; None: all are zero."""
    if going == count:
        return later
    if going == 0:
        return end.clone() if end is not None else None
    if later is None and end is None:
        return None
    like = later if later is not None else end
    assert like is not None
    zeros = like.new_zeros(count, *like.shape[1:])
    if later is not None:
        zeros[:going] = later
    if end is not None:
        zeros[going:] = end
    return zeros

"""Mixed traffic for a while: nothing leaks, nothing is answered wrongly. LANDMARK_SOAK=600 makes it ten minutes."""

from __future__ import annotations

import gc
import os
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from landmark.infer.engine import Engine, Handle, Request, Sampling
from landmark.infer.engine.radix import Node

from .test_engine import alone, empty, model, tight

SECONDS = float(os.environ.get("LANDMARK_SOAK", "1.5"))


def check_books(engine: Engine) -> None:
    """What sequences do not hold is free or found by the tree; what the tree finds is its own."""
    pools = [group.pool for group in engine._store.groups]
    pools += [engine._store.slot_pool] if engine._store.slot_pool is not None else []
    found: dict[Any, set[int]] = {pool: set() for pool in pools}
    roots = list(engine._store.tree.roots.values())
    stack = list(roots)
    while stack:
        node = stack.pop()
        assert node.held or node.children or node in roots, "a node that stands for nothing"
        for pool, number in node.held.items():
            assert pool.owners[number] is node and number not in found[pool]
            found[pool].add(number)
        stack += node.children.values()
    for pool in pools:
        assert pool.available == pool.count
        assert {n for n, owner in enumerate(pool.owners) if owner is not None} == found[pool]


@pytest.mark.parametrize("name", ["llama", "gemma", "mamba-2 and attention", "recurrence"])
def test_soak(name: str) -> None:
    of, draw = model(name), random.Random(0)
    vocab = of.cfg.embed.vocab
    options = {"max_batch": 6, "chunk": 24, "block": 8, "interval": 16}
    engine = Engine(of, memory=3800, **options) if name == "recurrence" else tight(of, 190, **options)
    texts = [[draw.randrange(vocab) for _ in range(120)] for _ in range(5)]
    known: dict[tuple[Any, ...], list[int]] = {}
    live: list[tuple[Handle, bool]] = []
    objects, checked, until = 0, 0, time.monotonic() + SECONDS
    began = False
    while time.monotonic() < until or live:
        if time.monotonic() < until and len(live) < 12 and draw.random() < 0.7:
            text, cut = draw.choice(texts), draw.randrange(1, 120)
            own = [draw.randrange(vocab)] if draw.random() < 0.5 else []
            sampling = Sampling(temperature=0, max_tokens=draw.randrange(1, 30), stop_ids=())
            if draw.random() < 0.3:
                sampling = replace(sampling, temperature=1.0, seed=draw.randrange(3))
            request = Request(prompt=[*text[:cut], *own], sampling=sampling, priority=draw.randrange(2))
            live.append((engine.submit(request), draw.random() < 0.2))
        if draw.random() < 0.02:
            with pytest.raises(ValueError, match="empty"):
                engine.submit(Request(prompt=[]))
        engine.step()
        for handle, leaves in list(live):
            if leaves and draw.random() < 0.1:
                handle.cancel()
            if handle.done:
                live.remove((handle, leaves))
                tokens = handle.result()[0].tokens
                if not handle.cancelled and (draw.random() < 0.1 or len(known) < 3):
                    request = handle.request
                    key = (tuple(request.prompt), request.sampling.max_tokens, request.sampling.seed)
                    known.setdefault(key, alone(of, request))
                    assert tokens == known[key]
                    checked += 1
        if not began and engine.stats().finished > 40:
            gc.collect()
            began, objects = True, sum(isinstance(each, Handle) for each in gc.get_objects())
    assert empty(engine) and checked > 3
    check_books(engine)
    if began:
        del handle
        gc.collect()
        assert sum(isinstance(each, Handle) for each in gc.get_objects()) <= objects
        nodes = sum(isinstance(each, Node) for each in gc.get_objects())
        assert nodes < 10 * sum(group.pool.count for group in engine._store.groups) + 5000

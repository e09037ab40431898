"""The engine as a service: who goes first, threads and event loops, bad requests, crashes."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from landmark.infer.engine import Engine, EngineError, Request, Sampling
from landmark.infer.engine.pool import Pool
from landmark.models.decoder import Decoder

from .models import LLAMA, build
from .test_engine import alone, empty, model, requests

GREEDY = Sampling(temperature=0, max_tokens=8, stop_ids=())


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(model("llama"), memory=1 << 24, max_batch=4, chunk=32, block=8) as engine:
        yield engine


def order(engine: Engine, asked: list[Request]) -> list[int]:
    """The numbers of requests in the order in which they finish."""
    handles = [engine.submit(request) for request in asked]
    finished: list[int] = []
    while len(finished) < len(asked):
        engine.step()
        finished += [n for n, handle in enumerate(handles) if handle.done and n not in finished]
    return finished


def test_first_come_first_served_but_for_priorities() -> None:
    engine = Engine(model("llama"), memory=1 << 24, max_batch=1)
    asked = [Request(prompt=[n + 1], sampling=GREEDY, priority=p) for n, p in enumerate((0, 0, 1, 2, 1))]
    assert order(engine, asked) == [3, 2, 4, 0, 1]


def test_a_long_prompt_does_not_wait_for_ever() -> None:
    """Short requests that keep coming do not overtake a long one that has yet to find room."""
    of = model("llama")
    engine = Engine(of, memory=3 * 2 * 2 * 16 * 4 * 8 * 24, max_batch=8, chunk=32, block=8)
    shorts = [engine.submit(Request(prompt=[n], sampling=Sampling(max_tokens=30, stop_ids=()))) for n in range(4)]
    engine.step()
    long = engine.submit(Request(prompt=[1] * 150, sampling=GREEDY))
    steps = 0
    while not long.done:
        shorts.append(engine.submit(Request(prompt=[steps % 90], sampling=Sampling(max_tokens=30, stop_ids=()))))
        engine.step()
        steps += 1
        assert steps < 100
    assert long.result()[0].tokens == alone(of, long.request)


def test_no_priority_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("landmark.infer.engine.engine.AGE", 0.05)
    engine = Engine(model("llama"), memory=1 << 24, max_batch=1)
    low, until = engine.submit(Request(prompt=[1], sampling=GREEDY)), time.monotonic() + 10
    while not low.done:
        engine.submit(Request(prompt=[2], sampling=GREEDY, priority=1))
        engine.step()
        assert time.monotonic() < until


def test_prompts_are_read_between_tokens_of_others() -> None:
    engine = Engine(model("llama"), memory=1 << 24, max_batch=2, chunk=16, block=8)
    writing = engine.submit(Request(prompt=[1], sampling=Sampling(max_tokens=100, stop_ids=())))
    engine.step()
    reading = engine.submit(Request(prompt=[2] * 160, sampling=GREEDY))
    before = engine.stats().new_tokens
    for _ in range(10):
        engine.step()
    assert engine.stats().new_tokens == before + 11 and reading.request.prompt  # ten of one, the first of the other
    writing.cancel()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request(prompt=[]), "empty"),
        (lambda: Request(prompt=[1] * 257), "longer than the model's context of 256"),
        (lambda: Request(prompt=[97]), "id 97"),
        (lambda: Request(prompt=[1], sampling=Sampling(stop=("x",))), "needs a tokenizer"),
        (lambda: Request(prompt=[1], sampling=Sampling(logit_bias={97: 1.0})), "token id 97"),
        (lambda: Request(prompt=[1], n=0), "n is 0"),
        (lambda: Request(prompt=[1], n=3, best_of=2), "best_of is 2"),
        (lambda: Request(prompt=[1], top=2), "needs logprobs"),
        (lambda: Request(prompt=[1], n=5000), "at most"),
    ],
)
def test_bad_requests(request_: Any, message: str) -> None:
    engine = Engine(model("llama"), memory=1 << 24)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_())
    assert empty(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 1000}, "1,000 bytes is too small"),
        ({"memory": 1 << 20, "chunk": 0}, "chunk is 0"),
        ({"memory": 1 << 20, "block": -1}, "block is -1"),
    ],
)
def test_bad_engines(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model("llama"), **options)


def test_training_mode_is_refused() -> None:
    of: Decoder = build(LLAMA).train()
    with pytest.raises(ValueError, match="training mode"):
        Engine(of, memory=1 << 24)


def test_threads(engine: Engine) -> None:
    """Many threads ask, some change their minds; every answer is right."""
    asked = requests(97, 24)
    expected = [alone(model("llama"), request) for request in asked]
    wrong: list[int] = []

    def ask(n: int) -> None:
        handle = engine.submit(asked[n])
        if n % 4 == 3:
            time.sleep(random.Random(n).random() / 50)
            handle.cancel()
            list(handle)
        elif handle.result()[0].tokens != expected[n]:
            wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert empty(engine)


def test_an_event_loop(engine: Engine) -> None:
    asked = requests(97, 12)

    async def ask(request: Request) -> list[int]:
        return [event.token async for event in engine.submit(request)]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(ask, asked))

    assert asyncio.run(asyncio.wait_for(all_of_them(), 30)) == [alone(model("llama"), request) for request in asked]


def test_a_crash_fails_who_ran_and_nobody_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    of, asked = model("llama"), requests(97, 12)
    whole, calls = of.hidden, []

    def breaks(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(threading.current_thread().name)
        if calls.count("engine") == 9 and calls[-1] == "engine":
            raise RuntimeError("out of luck")
        return whole(*args, **options)

    monkeypatch.setattr(of, "hidden", breaks)
    outcomes: list[bool | None] = []
    for request, handle in [(request, engine.submit(request)) for request in asked]:
        try:
            outcomes.append(handle.result()[0].tokens == alone(of, request))
        except EngineError as error:
            assert "out of luck" in str(error)
            outcomes.append(None)
    assert False not in outcomes and 1 <= outcomes.count(None) <= 4
    assert engine.stats().crashes == 1 and empty(engine)
    assert engine.submit(asked[0]).result()[0].tokens == alone(of, asked[0])


def test_what_waits_at_a_crash_is_answered_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three answers is finished, the others wait behind a more urgent request that crashes."""
    of = model("llama")
    engine, whole = Engine(of, memory=1 << 24, max_batch=1, block=8), of.hidden
    three = engine.submit(Request(prompt=[1, 2, 3], sampling=Sampling(max_tokens=4, stop_ids=(), seed=5), n=3))
    engine.step()
    urgent = engine.submit(Request(prompt=[4], sampling=GREEDY, priority=3))
    while engine.stats().new_tokens < 6:
        engine.step()
    assert engine.stats().waiting == 2 and engine.stats().running == 1

    def breaks(*args: Any, **options: Any) -> torch.Tensor:
        monkeypatch.setattr(of, "hidden", whole)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(of, "hidden", breaks)
    with pytest.raises(EngineError, match="out of luck"):
        urgent.result()
    seeds = [Request(prompt=[1, 2, 3], sampling=Sampling(max_tokens=4, stop_ids=(), seed=5 + n)) for n in range(3)]
    assert [answer.tokens for answer in three.result()] == [alone(of, request) for request in seeds]
    assert empty(engine)


def test_an_engine_that_cannot_go_on_leaves_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room at all")

    monkeypatch.setattr(engine, "_begin", breaks)
    monkeypatch.setattr(engine._scheduler, "plan", breaks)
    handles = [engine.submit(Request(prompt=[n], sampling=GREEDY)) for n in range(3)]
    for handle in handles[:1]:
        with pytest.raises(EngineError, match="the engine has ended: MemoryError: no room at all"):
            handle.result()
    assert not engine.running


def test_broken_weights_fail_the_request() -> None:
    of: Decoder = build(LLAMA)
    with torch.no_grad():
        of.embed.tokens.weight[5] = float("nan")
    engine = Engine(of, memory=1 << 24, block=8)
    bad, good = engine.submit(Request(prompt=[5], sampling=GREEDY)), engine.submit(Request(prompt=[6], sampling=GREEDY))
    assert len(good.result()[0].tokens) == 8
    with pytest.raises(EngineError, match="NaN"):
        bad.result()
    assert empty(engine)


def test_stopping_fails_what_is_left() -> None:
    engine = Engine(model("llama"), memory=1 << 24).start()
    handle = engine.submit(Request(prompt=[1], sampling=Sampling(max_tokens=250, stop_ids=())))
    next(iter(handle))
    engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        handle.result()
    assert engine.submit(Request(prompt=[1], sampling=GREEDY)).result()[0].tokens  # by its own steps


def test_pools_count() -> None:
    """A pool under random use: what it says is available is what can be taken, and nothing has two holders."""

    class Keeper:
        def __init__(self) -> None:
            self.found: set[int] = set()

        def forget(self, pool: Pool, number: int) -> None:
            self.found.remove(number)
            pool.disown(number)

    pool, keeper, draw = Pool(10), Keeper(), random.Random(0)
    held: list[int] = []
    for _ in range(2000):
        action = draw.random()
        if action < 0.4 and pool.available:
            number = pool.take()
            assert number not in held and number not in keeper.found
            held.append(number)
        elif action < 0.7 and held:
            number = held.pop(draw.randrange(len(held)))
            if number not in keeper.found and number not in held and draw.random() < 0.7:
                keeper.found.add(number)
                pool.own(number, keeper)
            pool.release(number)
        elif keeper.found:
            number = draw.choice(sorted(keeper.found))
            pool.hold(number)
            held.append(number)
        assert pool.available == 10 - len(set(held))


class Fails:
    """A guide that allows anything, until it raises: by its tokens, or at once where it says what may come."""

    def __init__(self, taken: int | None) -> None:
        self.left = taken

    def allowed(self) -> torch.Tensor | None:
        if self.left is None:
            raise ValueError("too large\nand what somebody has sent")
        return None

    def accept(self, token: int) -> None:
        assert self.left is not None
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the form is broken\nand what somebody has sent")

    @property
    def finished(self) -> bool:
        return False

    def rollback(self, tokens: int) -> None:
        raise AssertionError


@pytest.mark.parametrize("taken", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_guide_that_fails_fails_its_request_alone(taken: int | None, n: int) -> None:
    of = model("llama")
    engine = Engine(of, memory=1 << 24, max_batch=8, block=8)
    asked = requests(97, 3)
    handles = [engine.submit(request) for request in asked]
    broken = engine.submit(Request(prompt=[5, 6], sampling=GREEDY, n=n, guide=lambda: Fails(taken)))
    with pytest.raises(EngineError, match=r"its guide failed: .*(too large|is broken)$"):
        broken.result()
    assert [handle.result()[0].tokens for handle in handles] == [alone(of, request) for request in asked]
    assert engine.stats().crashes == 0 and engine.stats().failed == 1 and empty(engine)


def test_who_is_finished_has_its_answer_though_the_step_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three answers ends in a step in which the engine crashes later; the others begin anew."""
    of = model("llama")
    engine = Engine(of, memory=1 << 24, max_batch=2, block=8)
    sampling = Sampling(max_tokens=1, stop_ids=(), seed=5)
    three = engine.submit(Request(prompt=[1, 2, 3], sampling=sampling, n=3))
    other = engine.submit(Request(prompt=[4, 5], sampling=GREEDY))
    whole = type(other._ticket.runs[0].writer).event

    def breaks(writer: Any, *args: Any) -> Any:
        if writer is other._ticket.runs[0].writer:
            raise RuntimeError("out of luck")
        return whole(writer, *args)

    monkeypatch.setattr(type(other._ticket.runs[0].writer), "event", breaks)
    with pytest.raises(EngineError, match="the engine failed: RuntimeError: out of luck"):
        other.result()
    seeds = [Request(prompt=[1, 2, 3], sampling=Sampling(max_tokens=1, stop_ids=(), seed=5 + n)) for n in range(3)]
    assert [answer.tokens for answer in three.result()] == [alone(of, request) for request in seeds]
    assert empty(engine)


def test_an_engine_that_was_stopped_forgets_what_came_in_last(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model("llama")
    engine, entered, go = Engine(of, memory=1 << 24), threading.Event(), threading.Event()
    work = engine._work

    def slow(works: Any) -> None:
        entered.set()
        assert go.wait(10)
        work(works)

    monkeypatch.setattr(engine, "_work", slow)
    engine.start()
    handles = [engine.submit(Request(prompt=[1, 2, 3], sampling=Sampling(max_tokens=50, stop_ids=())))]
    assert entered.wait(10)
    handles.append(engine.submit(Request(prompt=[1, 2], sampling=GREEDY)))  # during the step
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    while not engine._stopping:
        time.sleep(0.01)
    go.set()
    stopper.join()
    for handle in handles:
        with pytest.raises(EngineError, match="the engine was stopped"):
            handle.result()
    request = Request(prompt=[7, 8], sampling=GREEDY)
    assert engine.generate([request])[0][0].tokens == alone(of, request) and engine.stats().crashes == 0


@pytest.mark.parametrize("name", ["recurrence", "mamba"])
def test_a_text_of_which_nothing_is_kept_is_not_remembered(name: str) -> None:
    """Without room for copies of states the tree does not grow, however many texts go by."""
    of = model(name)
    options = {"max_batch": 2, "chunk": 64, "block": 4, "interval": 4}
    memory = next(m for m in range(0, 1 << 20, 16) if fits(of, m, options))
    engine, sampling = Engine(of, memory=memory, **options), Sampling(temperature=0, max_tokens=3, stop_ids=())
    draw = random.Random(0)
    for _ in range(5):
        engine.generate([Request(prompt=[draw.randrange(97) for _ in range(40)], sampling=sampling)])
        assert not engine._store.tree.root(-1).children


def fits(of: Decoder, memory: int, options: Any) -> bool:
    try:
        Engine(of, memory=memory, **options)
    except ValueError:
        return False
    return True

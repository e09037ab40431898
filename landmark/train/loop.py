"""The training loop.

    fit(model, CausalLM(), batches, Settings(steps=1000), out="runs/first", held_out=batches_of_other_text)

Everything that happens during a run happens here, in the order in which it is written down.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .. import malloc
from ..config import to_dict
from ..models.base import Model
from ..models.inspect import training_flops
from ..objectives.base import Loss, Objective
from ..parallel import data as parallel
from ..parallel.world import World, world
from ..weights.checkpoint import as_dtype
from . import checkpoint
from .blocks import check_compiler, transformed
from .config import Settings
from .interrupt import Interrupted, catch_interrupts
from .metrics import Log, matmul_rate, peak_memory
from .optim import Updater
from .step import Step, Totals, evaluate, extent


class Batches(Protocol):
    """An iterator of (micro-)batches that can say where it is, as JSON-ready data, and go back there.

    A batch is a dataclass with `to(device)` and `tokens`, or `source` and `target_in`, [..., T]; the rest is between it
    and the objective.
    """

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Adjusts(Protocol):
    """A module that changes something of its own after every update, from what it counted in training."""

    def adjust(self, total: Callable[[Sequence[float]], list[float]]) -> None:
        """`total` adds up over all processes, which all call with as many numbers."""


class Callback:
    """Told what happens, in the first process only. Override what is of interest."""

    def begin(self, run: Run) -> None:
        """Before the first update; `run.step` is where it starts."""

    def update(self, run: Run, record: dict[str, Any]) -> None:
        """After every update, with its metrics."""

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """After every evaluation, with `held_out` metrics and, if there are any, `samples`."""

    def saved(self, run: Run, directory: Path) -> None:
        """After every checkpoint."""

    def end(self, run: Run) -> None:
        """When the run is over, for whatever reason."""


class Diverged(ArithmeticError):
    """The loss or its gradient is not a finite number. `str` says where, and which checkpoint is good."""


def fit(
    model: Model,
    objective: Objective,
    batches: Batches,
    settings: Settings,
    *,
    out: str | Path,
    held_out: Iterable[Any] = (),
    sample: Callable[[Model], list[str]] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
) -> Run:
    """Train `model` in place, and leave it in eval mode, saved as a model directory in `out`.

    `batches` are this process's own; `held_out` are the same in all processes. `sample` gives texts to show at every
    evaluation (of a model that is not sharded). `out` also gets metrics.jsonl and checkpoints/. With `resume`, the run
    goes on from its latest checkpoint to the same bits as if it had never stopped (from the start if it has none yet).

    Raises ValueError for settings or data that cannot work, OSError if a checkpoint cannot be written, Diverged if the
    loss or the gradient is not finite, and Interrupted (a KeyboardInterrupt), once all is saved, on Ctrl-C.
    """
    with ExitStack() as stack:
        here = stack.enter_context(world(settings.device))
        held = list(islice(held_out, settings.evaluation.batches))
        run = Run(model, objective, batches, settings, Path(out), held, sample, here)
        if settings.compile:
            check_compiler(here.device)
        stack.enter_context(transformed(model, recompute=settings.recompute, compile=settings.compile))
        latest = run.open(resume)
        log = stack.enter_context(Log(run.out / "metrics.jsonl", run.step)) if here.first else None
        told = callbacks if here.first else ()
        for callback in told:
            stack.callback(callback.end, run)
            callback.begin(run)

        def report_evaluation() -> None:
            record = run.evaluate()
            if log is not None:
                log.write(record)
            for callback in told:
                callback.evaluated(run, record)

        interrupted = stack.enter_context(catch_interrupts())
        if held and run.evaluated is None:
            report_evaluation()
        stop = False
        first = run.step + 1
        while run.step < settings.steps and not stop:
            record = run.update()
            if run.step == first and here.device.type == "cpu" and malloc.plenty(peak_memory(here.device), here.size):
                stack.enter_context(malloc.kept())
            if log is not None:
                log.write(record)
            for callback in told:
                callback.update(run, record)
            stop = here.any(interrupted.is_set())
            last = run.step == settings.steps
            if held and (last or _due(run.step, settings.evaluation.every)):
                report_evaluation()
            if last or stop or _due(run.step, settings.checkpoints.every):
                latest = run.save()
                for callback in told:
                    callback.saved(run, latest)
        if run.step < settings.steps:
            raise Interrupted(f"stopped after {run.step} of {settings.steps} updates, all saved in {latest}")
        run.export()
        return run


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class Run:
    """A model in training: all that an update reads and changes, and how it is written down and taken up again."""

    def __init__(
        self, model: Model, objective: Objective, batches: Batches, settings: Settings, out: Path, held_out: list[Any],
        sample: Callable[[Model], list[str]] | None, here: World,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.batches, self.settings = model, objective, batches, settings
        self.out, self.held_out, self.sample, self.world = out, held_out, sample, here
        self.dtype = as_dtype(settings.dtype)
        self.store = checkpoint.Store(out / "checkpoints", keep=settings.checkpoints.keep, world=here)
        self.step = 0  # updates done
        self.tokens = 0  # read so far, by all processes
        self.evaluated: tuple[int, dict[str, float]] | None = None  # when last, and the held-out metrics then
        self.best: tuple[str, float] | None = None  # the checkpoint of the lowest held-out loss
        self.flops = cache(lambda length: training_flops(model, length))

    def open(self, resume: bool) -> Path | None:
        """Make ready for the first update, or for the one after the latest checkpoint, which is returned."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; a run needs a directory of its own")
        latest, settings, here = self.store.latest(), self.settings, self.world
        if latest is not None and not resume:
            raise ValueError(f"{self.out} holds a run already; go on with it (--resume) or choose another directory")
        state = checkpoint.read_state(latest) if latest is not None else None
        if state is not None:
            settings.check_same(state["settings"], state["step"])
        if here.first:
            self.out.mkdir(parents=True, exist_ok=True)
        self.draw_anew()
        model = self.model.to(here.device, parallel.parameter_dtype(self.dtype, settings.parallel, here)).train()
        for p in model.parameters():
            p.data = p.data.clone()  # mapped from a file, it would lie in other places the next time
        self.forward = parallel.wrap(Step(model, self.objective), settings.parallel, self.dtype, here)
        self.updater = Updater(model, settings.optimizer)
        if latest is not None and state is not None:
            self.restore(latest, state)
        return latest

    def update(self) -> dict[str, Any]:
        """One update of the weights from `accumulate` micro-batches in every process. Its record for the log."""
        settings, here, began = self.settings, self.world, time.perf_counter()
        micro = [self.next_batch() for _ in range(settings.accumulate)]
        count, tokens = here.sum([sum(map(self.objective.count, micro)), sum(extent(b)[0] for b in micro)])
        totals, losses = Totals(), []
        for i, batch in enumerate(micro):
            with parallel.synchronised(self.forward, i == len(micro) - 1 or bool(self.updater.masters)):
                loss = Loss(*self.forward(batch.to(here.device)))
                (loss.sum * (here.size / max(count, 1))).backward()
            self.updater.collect()
            totals.add(loss)
            losses.append(loss.sum.detach())
        means = totals.means(here)
        norm = self.updater.clip(settings.clip).item()
        if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
            self.diverged(means["loss"], norm, losses)
        factor = settings.schedule.factor(self.step, settings.steps)
        self.updater.step(factor)
        for module in self.model.modules():
            if isinstance(module, Adjusts):
                module.adjust(here.sum)
        self.step += 1
        self.tokens += int(tokens)
        speed = tokens / (time.perf_counter() - began)
        peak = here.size * (settings.peak_flops or matmul_rate(self.dtype, here.device))
        return {
            "step": self.step,
            "tokens": self.tokens,
            **means,
            "lr": settings.optimizer.lr * factor,
            "grad_norm": norm,
            "tokens_per_s": speed,
            "mfu": speed * self.flops(extent(micro[0])[1]) / peak,
            "memory": peak_memory(here.device),
        }

    def next_batch(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration:
            raise ValueError(
                f"the data ended in update {self.step + 1} of {self.settings.steps}; train for fewer, or repeat it"
            ) from None

    def diverged(self, loss: float, norm: float, losses: list[Tensor]) -> NoReturn:
        """Stop before the update: weights and checkpoints stay as they were."""
        number = next((i for i, value in enumerate(losses, 1) if not math.isfinite(value)), None)
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        where = f"update {self.step + 1}" + (f", micro-batch {number} of {len(losses)}" if number else "")
        last = self.store.latest()
        good = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise Diverged(f"{what} in {where}; {good}; try a lower learning rate or a longer warm-up")

    def evaluate(self) -> dict[str, Any]:
        """Held-out metrics and samples, without a trace in the random numbers of the run. The record for the log."""
        before = checkpoint.random_state(self.world.device)
        means = evaluate(self.forward, self.held_out, self.world)
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "held_out": means}
        if self.sample is not None and self.world.first and not parallel.is_sharded(self.model):
            self.model.eval()
            record["samples"] = self.sample(self.model)
            self.model.train()
        checkpoint.set_random_state(before, self.world.device)
        self.evaluated = self.step, means
        return record

    def save(self) -> Path:
        """A checkpoint of this moment."""
        if self.evaluated is not None and self.evaluated[0] == self.step:
            loss = self.evaluated[1]["loss"]
            if self.best is None or loss < self.best[1]:
                self.best = self.store.name(self.step), loss
        ranks = self.world.gather(
            {"data": self.batches.state_dict(), "random": checkpoint.random_state(self.world.device)}
        )
        state = {
            "step": self.step, "tokens": self.tokens, "evaluated": self.evaluated, "best": self.best,
            "settings": to_dict(self.settings), "model": checkpoint.describe(self.model), "ranks": ranks,
        }  # fmt: skip
        spared = self.best[0] if self.best is not None and self.settings.checkpoints.best else None
        return self.store.save(
            self.step, lambda where: checkpoint.write(where, self.model, self.updater, state, self.world), spared
        )

    def restore(self, directory: Path, state: dict[str, Any]) -> None:
        """Back to the moment of a checkpoint."""
        checkpoint.read(directory, self.model, self.updater)
        self.step, self.tokens = state["step"], state["tokens"]
        self.evaluated, self.best = (tuple(x) if (x := state[key]) else None for key in ("evaluated", "best"))
        ranks = state["ranks"]
        self.batches.load_state_dict(ranks[self.world.rank % len(ranks)]["data"])
        if len(ranks) == self.world.size:
            checkpoint.set_random_state(ranks[self.world.rank]["random"], self.world.device)
        else:
            self.draw_anew()

    def draw_anew(self) -> None:
        """Random numbers that only depend on the seed, the process and the step."""
        seed = (self.settings.seed * 1_000_003 + self.world.rank + 1) * 1_000_003 + self.step
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def export(self) -> None:
        """The model as it is now, as a model directory in `out`."""
        self.model.eval()
        checkpoint.export_model(self.model, self.out, self.world)

"""Two processes with gloo that stay for many jobs, each in the environment that torchrun would make."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.multiprocessing as mp

SECONDS = 120.0  # for one job


class Workers:
    """`size` processes; `run` calls a function of a module in all of them at once."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self.results: Queue[str | None] = context.Queue()
        self.jobs: list[Queue[Any]] = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(target=_work, args=(rank, size, jobs, self.results), daemon=True)
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for jobs in self.jobs:
            jobs.put((port, function, args))
        for _ in self.processes:
            failure = self.results.get(timeout=SECONDS)
            assert failure is None, failure

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, size: int, jobs: Queue[Any], results: Queue[str | None]) -> None:
    torch.set_num_threads(1)
    while True:
        port, function, args = jobs.get()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **where}
        try:
            function(*args)
            results.put(None)
        except BaseException:
            results.put(f"process {rank}: {traceback.format_exc()}")
            raise

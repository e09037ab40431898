"""Operators of our own: a compiler sees each as one, and gradients flow through them.

torch.library's `custom_op` does the same, but spends ten microseconds of every call, and at the first one a second and
60 MB on a compiler that nobody has asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("landmark", "FRAGMENT")
Fake = Callable[..., Any]


class Operator:
    """landmark::`name`, which computes what `run` does and changes none of its arguments; of `run` the annotations are
    the operator's schema."""

    def __init__(self, name: str, run: Callable[..., Any], fake: Fake | None = None) -> None:
        LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        self.name, self.__doc__ = f"landmark::{name}", run.__doc__
        self.op = getattr(torch.ops.landmark, name).default
        if fake is not None:
            self.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def register_fake(self, fake: Fake) -> Fake:
        """`fake` says the shapes and types of what comes out."""
        torch.library.register_fake(self.name, fake, lib=LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As torch.library.register_autograd."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator that makes an Operator."""
    return lambda run: Operator(name, run)

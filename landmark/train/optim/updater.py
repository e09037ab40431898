"""From gradients to new weights: master copies, accumulation, clipping, optimisers, and their state by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...config import nearest
from ...parallel.data import is_shard
from .base import Named, OptimizerConfig, roles


class Updater:
    """Updates a model in place.

    Parameters in bfloat16 have a float32 master, on which the optimiser works: an update smaller than the parameter's
    own resolution is kept until it shows. Their gradients are summed in float32 over micro-batches, too.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.named: list[Named] = []
        self.low: list[Tensor] = []  # parameters in bfloat16, and
        self.masters: dict[str, Tensor] = {}  # their masters, in the same order
        role = roles(model)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if p.dtype == torch.float16:
                raise ValueError(f"{name} is float16, which training does not support; choose bfloat16 or float32")
            tensor: Tensor = p
            if p.dtype == torch.bfloat16:
                tensor = p.detach().float()
                self.low.append(p)
                self.masters[name] = tensor
            self.named.append(Named(name, tensor, role[name]))
        if not self.named:
            raise ValueError("the model has no parameter that requires a gradient")
        self.tensors = [n.tensor for n in self.named]
        self.optimizers = config.build(self.named)

    @torch.no_grad()
    def collect(self) -> None:
        """After every backward: bfloat16 gradients join the masters' sums."""
        fresh_m, fresh_g, sums, grads = [], [], [], []
        for p, master in zip(self.low, self.masters.values(), strict=True):
            if p.grad is None:
                continue
            if master.grad is None:
                fresh_m.append(master)
                fresh_g.append(p.grad)
            else:
                sums.append(master.grad)
                grads.append(p.grad)
            p.grad = None
        for master, grad in zip(fresh_m, fresh_g, strict=True):
            master.grad = grad.float()
        if sums:
            torch._foreach_add_(sums, grads)

    @torch.no_grad()
    def clip(self, largest: float | None) -> Tensor:
        """The global norm of the gradients, which are scaled down to `largest` if they exceed it."""
        grads = [t.grad for t in self.tensors if t.grad is not None]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        norm = norm.full_tensor() if is_shard(norm) else norm
        if largest is not None and (norm.is_cuda or bool(norm > largest)):
            torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates; the gradients are spent."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        if self.low:
            torch._foreach_copy_(self.low, list(self.masters.values()))
        self.zero_grad()

    def zero_grad(self) -> None:
        for tensor in (*self.tensors, *self.low):
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that an exact continuation needs besides the weights: `{parameter}.{state}`, and `{parameter}.master`."""
        out = {f"{name}.master": master for name, master in self.masters.items()}
        for optimizer in self.optimizers:
            for named in self.named:
                out |= {f"{named.name}.{key}": value for key, value in optimizer.state.get(named.tensor, {}).items()}
        return out

    @torch.no_grad()
    def load(self, model: nn.Module, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint into model, masters and optimisers, sharded or whole as each of them is.

        A master that the checkpoint lacks (it was trained in float32) starts from the weight; where there are only
        masters to be had (it was trained in bfloat16, and this is float32), they become the weights.
        Raises ValueError for the state of another optimiser or model.
        """
        parameters = model.state_dict()
        for name, tensor in parameters.items():
            _copy(tensor, state.get(f"{name}.master", weights[name]), name)
        for name, master in self.masters.items():
            _copy(master, state.get(f"{name}.master", weights[name]), name)
        wanted = {name: tensor for name, tensor in self.state().items() if not name.endswith(".master")}
        given = {name for name in state if not name.endswith(".master")}
        if missing := [name for name in wanted if name not in given]:
            raise ValueError(f"the checkpoint's optimiser state lacks {missing[0]!r}{nearest(missing[0], given)}")
        if surplus := sorted(given - wanted.keys()):
            raise ValueError(f"the checkpoint has the optimiser state {surplus[0]!r}, for which there is no place here")
        for name, tensor in wanted.items():
            _copy(tensor, state[name], name)


def _copy(target: Tensor, source: Tensor, name: str) -> None:
    """A whole source into a whole or sharded target."""
    if target.shape != source.shape:
        raise ValueError(f"the checkpoint's {name!r} has the shape {tuple(source.shape)}, not {tuple(target.shape)}")
    if is_shard(target) and not is_shard(source):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)

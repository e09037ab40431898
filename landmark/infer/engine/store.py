"""What the engine remembers of all sequences, within one budget of memory.

The model's own decoding state says what it is made of. What can live in blocks does: layers that see everything form
one group, those with a window of one length another, whose blocks are given back as they fall out of it. What else has
a fixed size a sequence has a slot. So attention, recurrences and any mixture of them are one case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ctx import State
from ...models.decoder import Decoder
from ...nn.cache import SlotState
from ...nn.paged import Blocks, Pageable, Sees, lazy_zeros
from ...ops.attention.pages import Pages
from .lengths import Lengths
from .pool import Pool
from .radix import PrefixTree
from .request import Held

UNLIMITED = 1 << 40  # a capacity for models without an end to their context
SNAPSHOTS = 16  # slots for copies of states, at most so many for each one that runs


@dataclass
class Group:
    """Layers that see alike: their blocks, who has them, and the tables of all running sequences."""

    sees: Sees
    blocks: Blocks
    pool: Pool
    tables: np.ndarray = field(repr=False)  # [max_batch, most blocks]


class Slots:
    """Tensors of a fixed size a sequence: [slots, ...] for all of them, and the present call's in `state`."""

    def __init__(self, state: SlotState, count: int) -> None:
        self.state = state
        self._fresh = dict(state.tensors)
        self.all = {name: lazy_zeros((count, *x.shape[1:]), x.dtype, x.device) for name, x in state.tensors.items()}

    def gather(self, slots: Tensor | slice) -> None:
        """Some slots, in this order; as views, where they lie in order."""
        self.state.tensors = {name: x[slots] for name, x in self.all.items()}

    def left(self, slots: Tensor | slice, lent: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """What the mixer left that is not written in its place yet. It may be what another name was given (`lent`, by
        where it is stored), which is then copied before anything is written."""
        found = {}
        for name, new in self.state.tensors.items():
            lender = lent.get(new.untyped_storage().data_ptr())
            if lender is None:
                found[name] = new
            elif lender is not self.all[name] or new.data_ptr() != lender[slots].data_ptr():
                found[name] = new.clone()
        return found

    def write(self, slots: Tensor | slice, left: Mapping[str, Tensor]) -> None:
        for name, new in left.items():
            self.all[name][slots] = new

    def copy(self, source: int, target: int) -> None:
        for x in self.all.values():
            x[target] = x[source]

    def clear(self, slot: int) -> None:
        for name, x in self.all.items():
            x[slot] = self._fresh[name][0]


class Store:
    """State for up to `max_batch` sequences at once within `memory` bytes, and what is kept of earlier ones.

    Raises ValueError for a budget that not even one sequence fits, and for layers whose state it cannot keep.
    """

    def __init__(
        self, model: Decoder, *, memory: int, max_batch: int, block: int, chunk: int, prefixes: bool, interval: int,
        lengths: Lengths,
    ) -> None:  # fmt: skip
        self.block, self.max_batch, self.prefixes, self.interval = block, max_batch, prefixes, interval
        self.lengths = lengths
        context = model.cfg.context
        self._state = model.new_state(1, UNLIMITED if context is None else context)
        pageable: dict[Sees, list[Pageable]] = {}
        slotted: list[SlotState] = []
        for leaf in self._state.leaves():
            if isinstance(leaf, Pageable):
                pageable.setdefault(leaf.sees, []).append(leaf)
            elif isinstance(leaf, SlotState):
                slotted.append(leaf)
            else:
                raise ValueError(f"the engine cannot keep a {type(leaf).__name__}; use landmark.infer.generate for it")
        plan = Plan.of(pageable, slotted, memory, max_batch, block, chunk)
        self.groups: list[Group] = []
        pages: dict[int, Any] = {}
        for sees, count in plan.blocks.items():
            blocks = Blocks(count, block, model.device)
            longest = context if sees.most is None else sees.most + chunk
            most = count if longest is None else min(count, -(-longest // block) + 1)
            self.groups.append(Group(sees, blocks, Pool(count), np.zeros((max_batch, most), np.int64)))
            pages |= {id(leaf): leaf.paged(blocks) for leaf in pageable[sees]}
        self._state.layers = [_replaced(layer, pages) for layer in self._state.layers]
        self.slots = [Slots(leaf, plan.slots) for leaf in slotted]
        self._lent = {x.untyped_storage().data_ptr(): x for slots in self.slots for x in slots.all.values()}
        self.slot_pool = Pool(plan.slots) if slotted else None
        self._passing = [(g, group) for g, group in enumerate(self.groups) if not group.sees.everything]
        self._lines = list(range(max_batch))[::-1]
        self.device = model.device
        self.capacity = min([g.pool.count * block for g in self.groups if g.sees.everything], default=UNLIMITED)
        self.tree = PrefixTree(block, {group.pool: group.sees for group in self.groups}, self.slot_pool)

    # -- what sequences hold ---------------------------------------------------------------------------------------

    def admit(self, run: Held) -> bool:
        """Give a sequence what it needs to begin, after the longest beginning that is remembered; False: no room."""
        if not self._lines or (self.slot_pool is not None and not self.slot_pool.available):
            return False
        use = self.prefixes and not run.ticket.scoring and not self.lengths.depends(run)
        path = self.tree.path(run.tokens[:-1], run.ticket.adapter) if use else []
        depth = self.tree.usable(path)
        run.computed = depth * self.block
        for group in self.groups:
            first = group.sees.first(run.computed) // self.block
            numbers = [path[i].held[group.pool] for i in range(first, depth)]
            for number in numbers:
                group.pool.hold(number)
            run.tables.append(numbers)
            run.gone.append(first)
        if any(self._lacking(run, g, len(run.tokens)) > group.pool.available for g, group in enumerate(self.groups)):
            self._let_go(run)
            return False
        run.line = self._lines.pop()
        for g, group in enumerate(self.groups):
            group.tables[run.line, : len(run.tables[g])] = run.tables[g]
        run.node, run.depth = path[depth - 1] if depth else self.tree.root(run.ticket.adapter), depth
        run.branch = len(path) * self.block if self.slot_pool is not None else 0
        if self.slot_pool is not None:
            source = path[depth - 1].held[self.slot_pool] if depth else -1
            if depth:
                self.slot_pool.hold(source)
            run.slot = self.slot_pool.take()
            for slots in self.slots:
                slots.copy(source, run.slot) if depth else slots.clear(run.slot)
            if depth:
                self.slot_pool.release(source)
        return True

    def reserve(self, run: Held, length: int) -> bool:
        """Blocks for the first `length` tokens of a sequence; False, and nothing is taken, if there are too few."""
        if length <= run.covered:
            return True
        lacking = [self._lacking(run, g, length) for g in range(len(self.groups))]
        if any(n > group.pool.available for n, group in zip(lacking, self.groups, strict=True)):
            return False
        for g, (n, group) in enumerate(zip(lacking, self.groups, strict=True)):
            table = run.tables[g]
            for _ in range(n):
                number = group.pool.take()
                group.tables[run.line, len(table)] = number
                table.append(number)
        run.covered = -(-length // self.block) * self.block
        return True

    def _lacking(self, run: Held, g: int, length: int) -> int:
        """Blocks that a group has yet to give for `length` tokens; through a window, not all of them at once."""
        group = self.groups[g]
        wanted = -(-length // self.block) - run.gone[g]
        if not group.sees.everything:
            wanted = min(wanted, group.tables.shape[1])
        return max(0, wanted - len(run.tables[g]))

    def release(self, run: Held) -> None:
        """Take back all that a sequence holds; it may begin again."""
        self._let_go(run)
        if self.slot_pool is not None:
            self.slot_pool.release(run.slot)
        self._lines.append(run.line)
        run.line = run.slot = -1
        run.node, run.depth = None, 0

    def _let_go(self, run: Held) -> None:
        for table, group in zip(run.tables, self.groups, strict=True):
            for number in reversed(table):  # texts are forgotten from their ends
                group.pool.release(number)
        run.tables, run.gone, run.computed, run.covered = [], [], 0, 0

    # -- one call of the model -------------------------------------------------------------------------------------

    def bind(self, runs: Sequence[Held], counts: Sequence[int]) -> State:
        """The state in which sequence i is runs[i], which `counts[i]` tokens will extend."""
        lengths = [run.computed for run in runs]
        lines, new = np.array([run.line for run in runs]), np.array(counts)
        past = np.array(lengths)
        ends = np.cumsum(new)
        index = np.repeat(np.arange(len(runs)), new)
        within = np.arange(ends[-1]) - (ends - new)[index]
        for g, group in enumerate(self.groups):
            held = past - np.array([run.gone[g] for run in runs]) * self.block
            at = held[index] + within
            totals = held + new
            tables = group.tables[lines, : -(-int(totals.max()) // self.block)]
            group.blocks.block = torch.from_numpy(tables[index, at // self.block]).to(self.device)
            group.blocks.offset = torch.from_numpy(at % self.block).to(self.device)
            group.blocks.pages = Pages.of(torch.from_numpy(tables), totals.tolist(), self.block, g)
        if self.slots:
            numbers = [run.slot for run in runs]
            in_order = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            self._bound = slice(numbers[0], numbers[-1] + 1) if in_order else torch.tensor(numbers, device=self.device)
            for slots in self.slots:
                slots.gather(self._bound)
        self._state.lengths = lengths
        return self._state

    def commit(self) -> None:
        """The call of `bind` was made: put the states that it left in their places."""
        left = [(slots, slots.left(self._bound, self._lent)) for slots in self.slots]
        for slots, tensors in left:
            slots.write(self._bound, tensors)

    def advance(self, run: Held, n: int) -> None:
        """`n` tokens of what was computed stay: remember them, give back what has fallen out of windows."""
        run.computed += n
        if self.prefixes and (run.computed // self.block != run.depth or self.slots) and not self.lengths.depends(run):
            self._remember(run)
        for g, group in self._passing:
            self._pass_by(run, g, group)

    def copies(self, runs: Sequence[Held]) -> list[dict[str, Tensor]]:
        """What is in the slots of some sequences, before a call that may have to be taken back."""
        numbers = torch.tensor([run.slot for run in runs], device=self.device)
        return [{name: x[numbers] for name, x in slots.all.items()} for slots in self.slots]

    def put_back(self, run: Held, copies: Sequence[Mapping[str, Tensor]], n: int) -> None:
        """A sequence's slot as it was: number `n` of `copies`."""
        for slots, tensors in zip(self.slots, copies, strict=True):
            for name, x in tensors.items():
                slots.all[name][run.slot] = x[n]

    def _pass_by(self, run: Held, g: int, group: Group) -> None:
        past = group.sees.first(run.computed) // self.block - run.gone[g]
        if past > 0:
            for number in reversed(run.tables[g][:past]):
                group.pool.release(number)
            del run.tables[g][:past]
            run.gone[g] += past
            group.tables[run.line, : len(run.tables[g])] = run.tables[g]

    def _remember(self, run: Held) -> None:
        """Put whole blocks into the tree, and a copy of the state where one is worth it."""
        depth, left = divmod(run.computed, self.block)
        spare = self.slot_pool is not None and self.slot_pool.count > self.max_batch
        keep = spare and not left and self._worth(run)
        if (depth == run.depth and not keep) or not (self.groups or keep):
            return
        if run.node is None or not run.node.attached:
            run.node, run.depth = self.tree.root(run.ticket.adapter), 0
        node = run.node
        for i in range(run.depth, depth):
            node = self.tree.child(node, tuple(run.tokens[i * self.block : (i + 1) * self.block]))
            for g, group in enumerate(self.groups):
                if i >= run.gone[g]:
                    node.keep(group.pool, run.tables[g][i - run.gone[g]])
        run.node, run.depth = node, depth
        if keep and self.slot_pool is not None:
            self._copy_state(run, self.slot_pool)

    def _copy_state(self, run: Held, pool: Pool) -> None:
        node = run.node
        assert node is not None
        if pool in node.held:
            pool.touch(node.held[pool])
        elif pool.available:
            number = pool.take()
            if node.attached:  # what was forgotten for it was not this text's only longer one
                for slots in self.slots:
                    slots.copy(run.slot, number)
                node.keep(pool, number)
            pool.release(number)
        node.prune()  # nobody would ever forget one that owns nothing

    def _worth(self, run: Held) -> bool:
        return run.computed % self.interval == 0 or run.computed in (run.branch, self._last(run))

    def _last(self, run: Held) -> int:
        """The end of the last whole block that all prompts with this one's beginning can start after."""
        return (len(run.ticket.request.prompt) - 1) // self.block * self.block

    def stop_before(self, run: Held, n: int) -> int:
        """How many of `n` tokens to read at once, so that states can be kept where they are worth it; 0: not these."""
        if (whole := self.lengths.whole(run)) is not None:
            return whole if whole <= n else 0
        if self.slot_pool is None or not self.prefixes:
            return n
        marks = (run.branch, self._last(run), (run.computed // self.interval + 1) * self.interval)
        return min([n, *(mark - run.computed for mark in marks if mark > run.computed)])


@dataclass(frozen=True)
class Plan:
    """How the budget is divided: blocks of each group, by window, and slots."""

    blocks: dict[Sees, int]
    slots: int

    @classmethod
    def of(
        cls, pageable: dict[Sees, list[Pageable]], slotted: list[SlotState], memory: int, max_batch: int, block: int,
        chunk: int,
    ) -> Plan:  # fmt: skip
        device = torch.device("meta")
        sizes = {
            sees: sum(t.nbytes for leaf in leaves for t in leaf.paged(Blocks(1, block, device)).tensors())
            for sees, leaves in pageable.items()
        }
        slot = sum(t.nbytes for leaf in slotted for t in leaf.tensors.values())
        left = memory - max_batch * slot
        extra = 0
        if slot:
            share = left // 4 if sizes else left
            extra = max(0, min(share // slot, SNAPSHOTS * max_batch))
        left -= extra * slot
        # What sees so many tokens at most needs these, and a chunk of the prompt, of every running sequence.
        one = {sees: 2 if sees.most is None else -(-(sees.most + chunk) // block) + 1 for sees in sizes}
        blocks: dict[Sees, int] = {}
        for sees in sorted(sizes, key=lambda each: one[each] if each.most else math.inf):
            even = left // sum(size for each, size in sizes.items() if each not in blocks)
            blocks[sees] = even if sees.most is None else min(max_batch * one[sees], even)
            left -= blocks[sees] * sizes[sees]
        if left < 0 or any(count < one[sees] for sees, count in blocks.items()):
            least = slot + sum(size * one[sees] for sees, size in sizes.items())
            raise ValueError(
                f"a memory of {memory:,} bytes is too small for {max_batch} sequences side by side, the state of one "
                f"of which takes {least:,} or more; give more memory, or a smaller max_batch"
            )
        return cls(blocks, max_batch + extra)


def _replaced(part: Any, pages: dict[int, Any]) -> Any:
    if isinstance(part, dict):
        return {name: _replaced(item, pages) for name, item in part.items()}
    return pages.get(id(part), part)

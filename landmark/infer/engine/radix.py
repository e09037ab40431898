"""What was read before, found by its tokens: a radix tree whose edges are blocks of tokens (SGLang, Zheng et al. 2024).

A node stands for a text that ends with its block, as one adapter reads it: every adapter has a root of its own. It may
own that block's keys and values in each group of layers (one group for all layers that see everything, one for each
length of window) and, for layers with a state a sequence, the slot that holds a copy of that state after its text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...nn.paged import Sees
from .pool import Pool


class Node:
    """`held` maps a pool to what the node owns of it."""

    __slots__ = ("children", "edge", "held", "parent", "tree")

    def __init__(self, tree: PrefixTree, parent: Node | None, edge: tuple[int, ...]) -> None:
        self.tree, self.parent, self.edge = tree, parent, edge
        self.children: dict[tuple[int, ...], Node] = {}
        self.held: dict[Pool, int] = {}

    def keep(self, pool: Pool, number: int) -> None:
        """Own something, unless the node has its like."""
        if pool not in self.held:
            self.held[pool] = number
            pool.own(number, self)

    def forget(self, pool: Pool, number: int) -> None:
        """Without a block that every longer text needs, those cannot be found either."""
        if pool in self.tree.needed:
            self._drop()
        else:
            del self.held[pool]
            pool.disown(number)
        self.prune()

    def _drop(self) -> None:
        for child in self.children.values():
            child._drop()
            child.parent = None
        self.children.clear()
        for pool, number in self.held.items():
            pool.disown(number)
        self.held.clear()

    def prune(self) -> None:
        """Leave the tree if nothing is owned and nothing follows, and so on towards the root."""
        node: Node = self
        while (parent := node.parent) is not None and not node.held and not node.children:
            parent.children.pop(node.edge, None)
            node.parent = None
            node = parent

    @property
    def attached(self) -> bool:
        """Whether the tree still finds it."""
        return self.parent is not None or not self.edge


class PrefixTree:
    """`groups`: the pools of blocks, and what their layers see; `slots`: the pool of states, if there are any."""

    def __init__(self, size: int, groups: Mapping[Pool, Sees], slots: Pool | None) -> None:
        self.size, self.slots = size, slots
        self.needed = [pool for pool, sees in groups.items() if sees.everything]
        self._partial = {pool: sees for pool, sees in groups.items() if not sees.everything}
        self.roots: dict[int, Node] = {}

    def root(self, adapter: int) -> Node:
        """Where texts begin that this adapter reads (-1: the model itself)."""
        return self.roots.setdefault(adapter, Node(self, None, ()))

    def path(self, tokens: Sequence[int], adapter: int) -> list[Node]:
        """The nodes of all whole blocks of the beginning of `tokens` that the tree knows."""
        node, found = self.root(adapter), []
        for start in range(0, len(tokens) - self.size + 1, self.size):
            child = node.children.get(tuple(tokens[start : start + self.size]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def usable(self, path: Sequence[Node]) -> int:
        """How many nodes of a path a sequence can start after: what its layers look at from there on is all there."""
        for depth in range(len(path), 0, -1):
            if self.slots is not None and self.slots not in path[depth - 1].held:
                continue
            if all(
                pool in path[i].held
                for pool, sees in self._partial.items()
                for i in range(sees.first(depth * self.size) // self.size, depth)
            ):
                return depth
        return 0

    def child(self, node: Node, edge: tuple[int, ...]) -> Node:
        """The node one block further, made if need be. One that owns nothing is to be given something at once."""
        found = node.children.get(edge)
        if found is None:
            found = node.children[edge] = Node(self, node, edge)
        return found

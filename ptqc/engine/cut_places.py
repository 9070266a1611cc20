"""Where to cut a functional graph: the gaps between its products, and what is live there.

A value is live between two nodes if it is made before and read later. What derives from parameters and constants alone
is no value: a piece that needs it makes it again. What the graph merely returns is a result of its piece, not live.

Between two consecutive products with weights there is a gap; its place is the earliest one within which the live bytes
are (nearly) the least of the gap. The gap is cut if

1. no other value that any parameter went into is live there (masks, cosines and the like are background), or
2. its live bytes are a local minimum among the gaps (the states of an encoder are live all through the decoder), or
3. the product behind it depends on every product since the last cut: those are quantized by then, so what it reads is
   computed once, by quantized weights, where otherwise it would be computed by float ones to observe it first;

and if no span that must stay whole lies across it.

A residual stream is cut after every block that adds to it, since within the block its input is live as well; a block
of attention between q, k, v and o, one of a gated MLP between gate, up and down.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx

from ptqc.program import Program, behind, value_of
from ptqc.weights import weight_uses

__all__ = ["Line", "Span"]

Span = tuple[int, int]
"""Two positions in the order of a graph's operations, placeholders not counted: no cut between them."""

_NEARLY = 1.02
"""Live bytes within this factor count as equal."""


def _operations(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]


def _sources(program: Program) -> list[fx.Node]:
    """Nodes whose values any piece can have: parameters, constants, and attributes of the module."""
    attributes = program.graph.find_nodes(op="get_attr")
    return [*program.parameters, *program.constants, *attributes]


class Line:
    """The operations of a program in their order, and what is live behind each."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = _operations(program)
        self.order = {node: position for position, node in enumerate(self.nodes)}
        self.copied = behind(program.graph, _sources(program))

    @cached_property
    def last_read(self) -> dict[fx.Node, int]:
        """Position of the last operation that reads a value, for every value that is not copied."""
        found = {}
        for node in self.nodes:
            readers = [self.order[user] for user in node.users if user in self.order]
            if node not in self.copied and readers:
                found[node] = max(readers)
        return found

    @cached_property
    def _last_read_of_memory(self) -> dict[fx.Node, int]:
        """The same for what owns memory: a view is read where its base is."""
        base: dict[fx.Node, fx.Node] = {}
        found: dict[fx.Node, int] = {}
        for node in self.nodes:
            source = node.args[0] if _is_view(node) else node
            base[node] = base.get(source, node) if isinstance(source, fx.Node) else node
            if node in self.last_read:
                found[base[node]] = max(found.get(base[node], 0), self.last_read[node])
        return found

    def _live(self, last_read: Mapping[fx.Node, int], amount: Callable[[fx.Node], int]) -> list[int]:
        """For every position the sum of the amounts of the values live behind it."""
        change = [0] * (len(self.nodes) + 1)
        for node, last in last_read.items():
            change[self.order[node]] += amount(node)
            change[last] -= amount(node)
        return list(accumulate(change))[: len(self.nodes)]

    @cached_property
    def _learned(self) -> set[fx.Node]:
        """Values that some parameter went into."""
        found = set(self.program.parameters)
        for node in self.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def products(self) -> list[int]:
        """Positions of the products with weights."""
        uses = weight_uses(self.program.graph, self.program.parameters)
        return sorted({self.order[node] for use in uses for node in use.contractions})

    def cuts(self, spans: Sequence[Span]) -> list[int]:
        """Positions behind which to cut, in order."""
        live = self._live(self._last_read_of_memory, _bytes_of)
        alone = self._live(self._last_read_of_memory, lambda node: node in self._learned)
        closed = self._live(self.last_read, lambda node: not isinstance(value_of(node), Tensor))
        is_open = [count == 0 for count in closed]
        for first, last in spans:
            is_open[first:last] = [False] * (last - first)
        places = [_least(gap, live, is_open) for gap in pairwise(self.products)]
        before = live[max(self.products[0] - 1, 0)] if self.products else 0
        minima = iter(_local_minima([before, *(live[place] for place in places if place is not None)])[1:])
        chosen, since = list[int](), 0
        for index, place in enumerate(places):
            since |= 1 << index
            if place is None:
                continue
            depends = not since & ~self._upstream[index + 1]
            if next(minima) or alone[place] <= 1 or depends:
                chosen.append(place)
                since = 0
        return chosen

    @cached_property
    def _upstream(self) -> list[int]:
        """For each product the products that its value depends on, as bits."""
        bits = {self.nodes[position]: 1 << index for index, position in enumerate(self.products)}
        behind_of: dict[fx.Node, int] = {}
        for node in self.nodes:
            gathered = 0
            for source in node.all_input_nodes:
                gathered |= behind_of.get(source, 0) | bits.get(source, 0)
            behind_of[node] = gathered
        return [behind_of[self.nodes[position]] for position in self.products]


def _is_view(node: fx.Node) -> bool:
    """Whether the result of an operation shares the memory of its first argument."""
    return bool(getattr(node.target, "is_view", False)) or node.target is torch.ops.aten._unsafe_view.default


def _bytes_of(node: fx.Node) -> int:
    value = value_of(node)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _least(gap: tuple[int, int], live: Sequence[int], is_open: Sequence[bool]) -> int | None:
    """The earliest open position of a gap where nearly the least is live."""
    places = [place for place in range(*gap) if is_open[place]]
    least = min((live[place] for place in places), default=0)
    return next((place for place in places if live[place] <= _NEARLY * least), None)


def _local_minima(amounts: Sequence[int]) -> list[bool]:
    """Which amounts are not above what follows and precedes them, equal ones passed over."""
    return [
        _rises(amounts[place], amounts[place + 1 :]) and _rises(amounts[place], reversed(amounts[:place]))
        for place in range(len(amounts))
    ]


def _rises(amount: int, others: Iterable[int]) -> bool:
    different = (other for other in others if not amount / _NEARLY <= other <= amount * _NEARLY)
    return next(different, amount) >= amount

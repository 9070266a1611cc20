"""Pieces: a functional graph cut where little is live, so that it can be run, calibrated and quantized bit by bit.

A value is live between two nodes if it is made before and read later. What derives from parameters and constants alone
is no value: a piece that needs it makes it again. What the graph merely returns is a result of its piece, not live.

Where to cut. Between two consecutive products with weights there is a gap; its place is the earliest one within which
the live bytes are (nearly) the least of the gap. The gap is cut if

1. no other value that any parameter went into is live there (masks, cosines and the like are background), or
2. its live bytes are a local minimum among the gaps (the states of an encoder are live all through the decoder), or
3. the product behind it depends on every product since the last cut: those are quantized by then, so what it reads is
   computed once, by quantized weights, where otherwise it would be computed by float ones to observe it first;

and if no span that must stay whole lies across it. A span longer than a third of the graph that a cut would fall into
is given up instead: it would leave pieces as large as the model.

A residual stream is cut after every block that adds to it, since within the block its input is live as well; a block
of attention between q, k, v and o, one of a gated MLP between gate, up and down.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ptqc.groups import ScaleGroup
from ptqc.program import Program, behind, value_of
from ptqc.weights import weight_uses

__all__ = ["Division", "Piece", "Span", "cut", "span_of"]

Span = tuple[int, int]
"""Two positions in the order of a graph's operations, placeholders not counted: no cut between them."""

_NEARLY = 1.02
"""Live bytes within this factor count as equal."""
_LONGEST = 1 / 3


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a program, runnable by itself.

    program: its graph; what earlier pieces give are its `unknown` placeholders, in the order of `takes`. takes, gives:
    names of values. results: what the whole program returns that is made here, by the position there.
    """

    index: int
    program: Program
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    results: tuple[int, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Qualified names of the parameters it reads."""
        return tuple(dict.fromkeys(self.program.names.values()))

    def arguments(
        self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> list[Any]:
        """What to call the module with. values: by the names of `takes`; parameters: by qualified name."""
        taken = dict(zip(self.program.unknown, self.takes, strict=True))
        found: list[Any] = []
        for node in self.program.graph.find_nodes(op="placeholder"):
            if node in taken:
                found.append(values[taken[node]])
            elif node in self.program.names:
                found.append(parameters[self.program.names[node]])
            else:
                inputs, constants = self.program.inputs, self.program.constants
                found.append(batch[inputs[node]] if node in inputs else constants[node])
        return found

    def run(
        self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Compute what the piece gives, by name. Values within it are freed after their last use."""
        made = self.program.module(*self.arguments(values, parameters, batch))
        return dict(zip(self.gives, made, strict=False))

    def run_with_results(
        self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[int, Any]]:
        """The same, and what of the program's own results is made here, by the position there."""
        made = self.program.module(*self.arguments(values, parameters, batch))
        rest = made[len(self.gives) :]
        return dict(zip(self.gives, made, strict=False)), dict(zip(self.results, rest, strict=True))


@dataclass(frozen=True, eq=False)
class Division:
    """A program in pieces. given_up: spans that a cut falls into. shared: parameters that several pieces read, with
    the indices of these."""

    pieces: tuple[Piece, ...]
    given_up: tuple[Span, ...] = ()
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def span_of(program: Program, group: ScaleGroup) -> Span | None:
    """From the first use of a producer's parameter to the last use of a consumer's. None if the graph has neither."""
    producers = {entry.name for entry in group.producer}
    consumers = {entry.name for entry in group.consumers}
    order = {node: position for position, node in enumerate(_operations(program))}
    copied = behind(program.graph, _sources(program))
    uses: dict[str, list[int]] = {}
    for node, name in program.names.items():
        if name in producers | consumers:
            uses.setdefault(name, []).extend(_read_at(node, order, copied))
    first = [min(uses[name]) for name in (producers or consumers) if uses.get(name)]
    last = [max(uses[name]) for name in consumers if uses.get(name)]
    return (min(first), max(last)) if first and last else None


def _read_at(node: fx.Node, order: Mapping[fx.Node, int], copied: Mapping[fx.Node, Any]) -> list[int]:
    """Where values go into which a parameter has gone, views and casts of it passed through."""
    found: list[int] = []
    for user in node.users:
        if user in copied:
            found += _read_at(user, order, copied)
        elif user in order:
            found.append(order[user])
    return found


def cut(program: Program, forbidden: Iterable[Span] = ()) -> Division:
    """Cut a program into pieces.

    forbidden: spans within which no cut may fall. Every operation is in one piece, in the order of the program; pieces
    run one after another compute what the program does, bit for bit.
    """
    line = _Line(program)
    spans = list(forbidden)
    longest = _LONGEST * len(line.nodes)
    cuts = line.cuts([span for span in spans if span[1] - span[0] <= longest])
    given_up = tuple(span for span in spans if any(span[0] <= place < span[1] for place in cuts))
    pieces = tuple(_pieces(program, line, cuts))
    readers: dict[str, list[int]] = {}
    for piece in pieces:
        for name in piece.parameters:
            readers.setdefault(name, []).append(piece.index)
    shared = {name: tuple(indices) for name, indices in readers.items() if len(indices) > 1}
    return Division(pieces, given_up, shared)


# -------------------------------------------------------------------- liveness


def _operations(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]


def _sources(program: Program) -> list[fx.Node]:
    """Nodes whose values any piece can have: parameters, constants, and attributes of the module."""
    attributes = program.graph.find_nodes(op="get_attr")
    return [*program.parameters, *program.constants, *attributes]


class _Line:
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


# -------------------------------------------------------------------- pieces


def _pieces(program: Program, line: _Line, cuts: Sequence[int]) -> Iterable[Piece]:
    ends = [*(place + 1 for place in cuts), len(line.nodes)]
    begins = [0, *ends[:-1]]
    returned = _returned(program)
    homes = {node: index for index, end in enumerate(ends) for node in line.nodes[begins[index] : end]}
    for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        own = [node for node in line.nodes[begin:end] if node not in line.copied]
        gives = [node for node in own if line.last_read.get(node, -1) >= end]
        # What is no operation of any piece (an input returned as it is, a copied value) is a result of the last one.
        results = [place for place, node in enumerate(returned) if homes.get(node, len(ends) - 1) == index]
        yield _piece(program, line, index, own, gives, {place: returned[place] for place in results})


def _returned(program: Program) -> list[Any]:
    (output,) = program.graph.find_nodes(op="output")
    found = output.args[0]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _piece(
    program: Program,
    line: _Line,
    index: int,
    own: Sequence[fx.Node],
    gives: Sequence[fx.Node],
    results: Mapping[int, Any],
) -> Piece:
    wanted = [*own, *(value for value in results.values() if isinstance(value, fx.Node))]
    needed = _needed(wanted, set(own), line)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(own) | {node for node in needed if node in line.copied}
    for node in needed:
        if node.op == "placeholder" or node not in inside:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
    for node in line.nodes:
        if node in inside and node in needed and node.op != "placeholder":
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    made = [*gives, *results.values()]
    graph.output(tuple(copies[value] if isinstance(value, fx.Node) else value for value in made))
    module = fx.GraphModule(program.module, graph)
    taken = [node for node in needed if node.op != "placeholder" and node not in inside]
    own_program = Program(
        module,
        {copies[node]: value for node, value in program.parameters.items() if node in copies},
        {copies[node]: name for node, name in program.names.items() if node in copies},
        {copies[node]: name for node, name in program.inputs.items() if node in copies},
        {copies[node]: value for node, value in program.constants.items() if node in copies},
        tuple(copies[node] for node in taken),
    )
    return Piece(
        index, own_program, tuple(node.name for node in taken), tuple(node.name for node in gives), tuple(results)
    )


def _needed(wanted: Iterable[fx.Node], own: set[fx.Node], line: _Line) -> dict[fx.Node, None]:
    """`wanted`, what it reads from outside, and what has to be made again; in the order of the program."""
    found: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node in own or node in line.copied:
            waiting.extend(node.all_input_nodes)
    return {node: None for node in line.program.graph.nodes if node in found}

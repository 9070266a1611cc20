"""Pieces: a functional graph cut where little is live, so that it can be run, calibrated and quantized bit by bit.

Where that is, `cut_places` knows. A span that must stay whole and is longer than a third of the graph is given up
instead of a cut that falls into it: it would leave pieces as large as the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ptqc.engine.cut_places import Line, Span
from ptqc.groups import ScaleGroup
from ptqc.program import Program

__all__ = ["Division", "Piece", "Span", "cut", "span_of"]

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
    line = Line(program)
    uses: dict[str, list[int]] = {}
    for node, name in program.names.items():
        if name in producers | consumers:
            uses.setdefault(name, []).extend(_read_at(node, line))
    first = [min(uses[name]) for name in (producers or consumers) if uses.get(name)]
    last = [max(uses[name]) for name in consumers if uses.get(name)]
    return (min(first), max(last)) if first and last else None


def _read_at(node: fx.Node, line: Line) -> list[int]:
    """Where values go into which a parameter has gone, views and casts of it passed through."""
    found: list[int] = []
    for user in node.users:
        if user in line.copied:
            found += _read_at(user, line)
        elif user in line.order:
            found.append(line.order[user])
    return found


def cut(program: Program, forbidden: Iterable[Span] = ()) -> Division:
    """Cut a program into pieces.

    forbidden: spans within which no cut may fall. Every operation is in one piece, in the order of the program; pieces
    run one after another compute what the program does, bit for bit.
    """
    line = Line(program)
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


def _pieces(program: Program, line: Line, cuts: Sequence[int]) -> Iterable[Piece]:
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
    line: Line,
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


def _needed(wanted: Iterable[fx.Node], own: set[fx.Node], line: Line) -> dict[fx.Node, None]:
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

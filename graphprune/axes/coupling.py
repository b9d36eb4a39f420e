"""The coupling graph: which axis of which tensor is tied to which other, by which op.

It is read off the finished analysis: two axes of one op's operands are tied where the op carries labels between them
and both bear labels of one group. Pruning does not use it; it answers the question *why*.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import networkx

from graphprune.axes.ties import ties_of
from graphprune.errors import OptionError
from graphprune.graph import TWIN_DOMAIN, Op, Tensor
from graphprune.rules.registry import tensor_at

if TYPE_CHECKING:
    from graphprune.axes.groups import Group
    from graphprune.axes.members import Inventory
    from graphprune.network import Network

#: A tensor's name and one of its axes.
Node: TypeAlias = "tuple[str, int]"


def coupling_graph(network: Network) -> networkx.Graph[Node]:
    """Which axes are tied to which, by which op.

    Args:
        network: What :func:`graphprune.analyze` returns.

    Returns:
        An undirected graph. A node is ``(tensor name, axis)``, with the attributes ``size`` (of the axis), ``weight``
        (bool) and ``groups`` (names of the groups that cut it there). An edge has ``op`` (the node's name), ``kind``
        (its op type), ``via`` (the factor of the signature, or the move) and ``groups`` (whose labels it carries).
        Where an op ties many axes, all are tied to one of them, an output's if there is one: there are about as many
        edges as the ops have operands.
    """
    graph: networkx.Graph[Node] = networkx.Graph()
    if not network.groups:
        return graph
    names = [group.name for group in network.groups]
    inventory = _inventory(network)
    for tensor, axes in inventory.on.items():
        for axis, groups in axes.items():
            graph.add_node(
                (tensor.name, axis),
                size=(tensor.shape or ())[axis],
                weight=tensor.constant,
                groups=tuple(names[g] for g in groups),
            )
    for op in inventory.analysis.graph.ops:
        _add_op(graph, inventory, op, names)
    return graph


def _inventory(network: Network) -> Inventory:
    inventory = network.groups[0].inventory
    assert inventory is not None
    return inventory


def _add_op(graph: networkx.Graph[Node], inventory: Inventory, op: Op, names: list[str]) -> None:
    for tie in ties_of(op, inventory.flows(op)):
        middle: dict[int, Node] = {}
        edges: dict[tuple[Node, Node], list[str]] = {}
        for operand, axis in tie.places:
            tensor = tensor_at(op, operand)
            if tensor is None:
                continue
            node = (tensor.name, axis)
            for group in inventory.on.get(tensor, {}).get(axis, ()):
                if middle.setdefault(group, node)[0] != tensor.name:
                    edges.setdefault((middle[group], node), []).append(names[group])
        for (a, b), groups in edges.items():
            if graph.has_edge(a, b):
                known = graph.edges[a, b]
                known["groups"] = (
                    *known["groups"],
                    *(name for name in groups if name not in known["groups"]),
                )
            else:
                graph.add_edge(a, b, op=op.name, kind=_kind(op), via=tie.via, groups=tuple(groups))


def _kind(op: Op) -> str:
    """The op type; for the twin's pseudo-ops that of the node they belong to."""
    if op.domain == TWIN_DOMAIN and op.node is not None:
        return op.node.op_type
    return op.kind


# -- why --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain.

    Attributes:
        tensor, axis: Where it leads.
        op, kind, via: What led there; None at the start.
    """

    tensor: str
    axis: int
    op: str | None = None
    kind: str | None = None
    via: str | None = None


@dataclass(frozen=True, slots=True)
class Why:
    """Why two tensors go together, or that they do not.

    Attributes:
        first, second: As asked for.
        group: The group in which they are tied; None if they are not.
        chain: From the one to the other; empty if they are not tied.
        first_groups, second_groups: For each axis in question the groups that cut it.
    """

    first: str
    second: str
    group: Group | None
    chain: tuple[Link, ...]
    first_groups: tuple[tuple[Node, Group], ...]
    second_groups: tuple[tuple[Node, Group], ...]

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "first": self.first,
            "second": self.second,
            "tied": self.group is not None,
            "group": None if self.group is None else self.group.name,
            "chain": [
                {"tensor": link.tensor, "axis": link.axis, "op": link.op, "kind": link.kind, "via": link.via}
                for link in self.chain
            ],
            "first_groups": [{"axis": node[1], "group": group.name} for node, group in self.first_groups],
            "second_groups": [{"axis": node[1], "group": group.name} for node, group in self.second_groups],
        }

    def __str__(self) -> str:
        if self.group is None:
            lines = [f"{self.first} and {self.second} are not tied"]
            for asked, groups in ((self.first, self.first_groups), (self.second, self.second_groups)):
                lines += [f"  {name}[{axis}] is in group {_title(group)}" for (name, axis), group in groups]
                if not groups:
                    lines.append(f"  {asked} is in no group: no label reaches it, it keeps all it has")
            return "\n".join(lines)
        lines = [f"{self.first} and {self.second} go together, in group {_title(self.group)}"]
        for link in self.chain:
            if link.op is not None:
                lines.append(f"      {link.kind} {link.op!r}, {link.via}")
            lines.append(f"  {link.tensor}[{link.axis}]")
        return "\n".join(lines)


def _title(group: Group) -> str:
    if group.frozen:
        state = f"frozen: {group.frozen}"
    else:
        state = f"statistical: {group.statistical}" if group.statistical else "free"
    return f"{group.name} of {group.size} ({state})"


def why(network: Network, first: str, second: str) -> Why:
    """The shortest chain of ops that ties two tensors.

    Args:
        network: What :func:`graphprune.analyze` returns.
        first, second: Names of values or initializers, ``NAME`` or ``NAME[axis]``.

    Raises:
        OptionError: The model has no tensor of that name, or the tensor no such axis.
    """
    graph = coupling_graph(network)
    by_name = {group.name: group for group in network.groups}
    tensors = network.analysis.graph.tensors
    sources, targets = (_nodes(graph, tensors, asked) for asked in (first, second))
    both = ({name for node in nodes for name in graph.nodes[node]["groups"]} for nodes in (sources, targets))
    best: tuple[list[Node], str] | None = None
    for name in sorted(set.intersection(*both)):
        path = _shortest(graph, name, sources, targets)
        if path and (best is None or len(path) < len(best[0])):
            best = path, name
    belongs = [
        tuple((node, by_name[name]) for node in nodes for name in graph.nodes[node]["groups"])
        for nodes in (sources, targets)
    ]
    if best is None:
        return Why(first, second, None, (), belongs[0], belongs[1])
    path, name = best
    chain = [Link(*path[0])]
    for a, b in pairwise(path):
        edge = graph.edges[a, b]
        chain.append(Link(*b, edge["op"], edge["kind"], edge["via"]))
    return Why(first, second, by_name[name], tuple(chain), belongs[0], belongs[1])


def _shortest(
    graph: networkx.Graph[Node], group: str, sources: Iterable[Node], targets: Iterable[Node]
) -> list[Node] | None:
    """The shortest path along which labels of one group flow."""

    def carries(a: Node, b: Node) -> bool:
        return group in graph.edges[a, b]["groups"]

    starts = {node for node in sources if group in graph.nodes[node]["groups"]}
    ends = [node for node in targets if group in graph.nodes[node]["groups"]]
    flow = networkx.subgraph_view(graph, filter_edge=carries)
    paths: dict[Node, list[Node]] = networkx.multi_source_dijkstra_path(flow, starts)
    return min((paths[node] for node in ends if node in paths), key=len, default=None)


def _nodes(graph: networkx.Graph[Node], tensors: Iterable[Tensor], asked: str) -> list[Node]:
    """The axes that a name stands for: all that are labelled, or the one in brackets."""
    named: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        # The uses of a shared constant are tensors of their own: its name means all of them.
        known = {
            tensor.name,
            tensor.value.name if tensor.value is not None and tensor.value.name else tensor.name,
        }
        for name in known:
            named.setdefault(name, []).append(tensor)
    if asked in named:
        return [(t.name, axis) for t in named[asked] for axis in _axes(t) if (t.name, axis) in graph]
    match = re.fullmatch(r"(.*)\[(-?\d+)\]", asked, re.DOTALL)
    if match is None or match[1] not in named:
        close = difflib.get_close_matches(match[1] if match else asked, named, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else "see graphprune inspect MODEL -v for names"
        )
        raise OptionError(f"the model has no tensor named {match[1] if match else asked!r}; {hint}")
    found = []
    for tensor in named[match[1]]:
        rank = len(_axes(tensor))
        if not -rank <= int(match[2]) < rank:
            raise OptionError(f"tensor {match[1]!r} has {rank} axes, and no axis {match[2]}")
        node = (tensor.name, int(match[2]) % rank)
        if node in graph:
            found.append(node)
    return found


def _axes(tensor: Tensor) -> range:
    return range(len(tensor.shape or ()))

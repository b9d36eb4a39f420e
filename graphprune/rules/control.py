"""The pseudo-ops at the borders of subgraphs, which the twin puts where If, Loop and Scan were."""

from __future__ import annotations

from graphprune.graph import Op
from graphprune.rules.registry import Description, register, shape_of


def join(op: Op) -> Description:
    """All operands are one tensor at different times (or on different branches)."""
    operand = "S*"
    return f"{', '.join([operand] * len(op.inputs))} -> {', '.join([operand] * len(op.outputs))}"


def stack(op: Op) -> Description:
    """A tensor of each iteration becomes a slice of the output."""
    rank = len(shape_of(op, 0))
    factors = [f"x{i}" for i in range(rank)]
    axis = int(op.attributes.get("axis", 0)) % (rank + 1)
    return f"{' '.join(factors)} -> {' '.join([*factors[:axis], 't!', *factors[axis:]])}"


def unstack(op: Op) -> Description:
    """Each iteration reads one slice of the input."""
    rank = len(shape_of(op, 0))
    axis = int(op.attributes.get("axis", 0)) % rank
    factors = [f"x{i}" for i in range(rank)]
    whole = " ".join("t!" if i == axis else factor for i, factor in enumerate(factors))
    return f"{whole} -> {' '.join(factor for i, factor in enumerate(factors) if i != axis)}"


# Layout, because labels must pass where a subgraph reads a constant.
register("graphprune::Join", join, layout=True)
register("graphprune::Stack", stack, layout=True)
register("graphprune::Unstack", unstack, layout=True)

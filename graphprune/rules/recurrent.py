"""Recurrent ops: the hidden size h is one factor of the input weight, the recurrent weight, the bias and the state."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.graph import Op
from graphprune.rules.registry import register


def recurrent(cell_state: bool, peepholes: bool) -> Callable[[Op], str]:
    """Terms of an RNN family op.

    D directions are computed separately; q gates of h units are stacked in each weight. The recurrent weight reads
    the hidden state along its last axis, which is the same factor again, summed over.
    """

    def describe(op: Op) -> str:
        batch_first = bool(op.attributes.get("layout", 0))
        x = "b S! i" if batch_first else "S! b i"
        state = "b D= h" if batch_first else "D= b h"
        y = "b S! D= h" if batch_first else "S! D= b h"
        recurrent_weight = "D= (q= h) _ | D= _ h^"
        inputs = [x, "D= (q= h) i", recurrent_weight, "D= (p= q= h)", "b", state]
        inputs += [state] if cell_state else []
        inputs += ["D= (u= h)"] if peepholes else []
        outputs = [y, state] + ([state] if cell_state else [])
        return f"{', '.join(inputs)} -> {', '.join(outputs)}"

    return describe


_HIDDEN = {"hidden_size": "h"}

_MACS = "S b D q h i + S b D q h h"

register("LSTM", recurrent(True, True), attributes=_HIDDEN, sizes={"q": 4, "p": 2, "u": 3}, macs=_MACS)
register("GRU", recurrent(False, False), attributes=_HIDDEN, sizes={"q": 3, "p": 2}, macs=_MACS)
register("RNN", recurrent(False, False), attributes=_HIDDEN, sizes={"q": 1, "p": 2}, macs=_MACS)

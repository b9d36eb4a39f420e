"""One forward pass over the twin that tells the moments of every tensor."""

from __future__ import annotations

from graphprune.axes.analysis import Analysis
from graphprune.errors import GraphPruneError
from graphprune.graph import Op, Tensor
from graphprune.repair.moments.registry import Contents, Found, Site, find_rule
from graphprune.repair.moments.signals import Signal


class Moments:
    """What is known of every tensor of a network, worked out op by op from the front; see the module's docstring."""

    def __init__(self, analysis: Analysis, contents: Contents) -> None:
        """Start before the first op.

        Args:
            analysis: The analysed network, as it was before pruning.
            contents: Reads its constants.
        """
        self._contents = contents
        self._known: dict[Tensor, Signal | None] = {}
        self._last = {tensor: op for op in analysis.graph.ops for tensor in op.inputs if tensor is not None}

    def of(self, tensor: Tensor) -> Signal | None:
        """What is known of a tensor, once the op that makes it has been passed."""
        return self._known.get(tensor)

    def advance(self, op: Op) -> None:
        """Pass an op; inputs that nothing reads later are forgotten."""
        if any(output is not None and not output.constant for output in op.outputs):
            found = self._run(op)
            signals = found if isinstance(found, list) else [found]
            for output, signal in zip(op.outputs, signals, strict=False):
                if output is not None and signal is not None and _fits(signal, output):
                    self._known[output] = signal
        for tensor in op.inputs:
            if tensor is not None and self._last.get(tensor) is op:
                self._known.pop(tensor, None)

    def _run(self, op: Op) -> Found:
        transfer = find_rule(op)
        if transfer is None:
            return None
        signals = [None if tensor is None else self._known.get(tensor) for tensor in op.inputs]
        try:
            return transfer(Site(op, signals, self._contents))
        except GraphPruneError:  # a constant that cannot be read
            return None


def _fits(signal: Signal, tensor: Tensor) -> bool:
    shape = tensor.shape
    return shape is not None and signal.axis < len(shape) and shape[signal.axis] == len(signal.channel)

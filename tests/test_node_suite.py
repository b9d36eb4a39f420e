"""Somebody else's suite: the conformance models that onnx generates for every op.

On every one the analysis ends without an exception. With an open boundary every one that has free axes is pruned, runs
in ONNX Runtime and equals its masked original.

Set GRAPHPRUNE_SHOW=1 and run pytest with ``-rP`` to see what became of every model.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

from graphprune.model import as_ir
from graphprune.pipeline import analyze_ir
from tests.laws.node_suite import node_suite
from tests.laws.single import Outcome, Single, literals, prune_open, tally, weights

CHUNKS = 12
every_chunk = pytest.mark.parametrize("chunk", range(CHUNKS))

#: Where rules may speak: literals only, all further inputs as weights, everything computed at run time.
VARIANTS: dict[str, Callable[[Single], Single]] = {
    "literals": literals,
    "weights": weights,
    "inputs": lambda single: single,
}

#: Fewest models that must be pruned exactly in one chunk of about 157, so that the test cannot come to do nothing.
LEAST_EXACT = {"literals": 70, "weights": 65, "inputs": 60}


def chunk_of(number: int) -> list[Single]:
    return list(node_suite()[number::CHUNKS])


def show(outcomes: dict[str, Outcome]) -> None:
    """What became of the models; those that ONNX Runtime cannot run are listed with its reason."""
    print(f"{len(outcomes)} models: {tally(outcomes.values())}")
    for name, outcome in outcomes.items():
        if outcome.kind == "not run" or os.environ.get("GRAPHPRUNE_SHOW"):
            print(f"  {name}: {outcome.kind} {outcome.detail}")


@every_chunk
def test_analysis_ends_without_an_exception(chunk: int) -> None:
    analysed = 0
    for single in chunk_of(chunk):
        network = analyze_ir(as_ir(single.model)[0])
        assert all(group.frozen for group in network.groups if group.size == 0)
        analysed += 1
    assert analysed > 100


@every_chunk
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_free_axis_is_pruned_exactly(chunk: int, variant: str) -> None:
    outcomes = {}
    for single in chunk_of(chunk):
        changed = VARIANTS[variant](single)
        outcomes[single.name] = prune_open(changed, residual=variant != "inputs", seed=chunk)
    show(outcomes)
    wrong = {name: outcome.detail for name, outcome in outcomes.items() if outcome.kind == "wrong"}
    assert not wrong
    assert Counter(o.kind for o in outcomes.values())["exact"] >= LEAST_EXACT[variant]

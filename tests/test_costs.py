"""What a cut saves is what it saves: widths and costs against plans carried out."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes.flow import SignatureFlow
from graphprune.cost import macs, parameters
from graphprune.costs import (
    BytesCost,
    CostModel,
    EnergyCost,
    Extent,
    MacsCost,
    ParametersCost,
    Widths,
    parse_size,
)
from graphprune.costs.energy import DRAM_ENERGY, MAC_ENERGY, SRAM_ENERGY
from graphprune.errors import OptionError
from graphprune.graph import Op
from graphprune.model import as_ir, copy, file_size
from graphprune.network import Network
from graphprune.pipeline import analyze_ir
from graphprune.plan import Masks, make_plan
from graphprune.rewrite import OpChange, Rewriter, collect, functions_to_inline
from tests.laws.graphs import graphs
from tests.patterns import PATTERNS, Pattern
from tests.twins import parse

#: Patterns whose parameter count after a cut is not the sum of what is left of each weight, and why.
REWRITTEN = {
    "tied_embedding": "two uses of one small value are cut differently and become two",
    "one_bias_of_several_layers": "likewise",
    "one_statistic_of_two_norms": "likewise",
    "constants_in_nodes": "a fill becomes a stored vector",
    "rotary_embedding": "a scale computed from a shape becomes a stored number",
    "grouped_query_attention": "likewise",
    "gather_elements": "an index is a literal that shrinks with what it is taken from",
    "weight_norm": "a weight computed from two is stored instead of them",
}

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


@functools.cache
def model_of(pattern: Pattern) -> ir.Model:
    return as_ir(pattern.build().model)[0]


def fresh(pattern: Pattern) -> Network:
    return analyze_ir(copy(model_of(pattern)), pattern.input_shapes)


@functools.cache
def analysed(pattern: Pattern) -> Network:
    """For tests that change nothing."""
    return fresh(pattern)


def draw(network: Network, rng: np.random.Generator) -> tuple[list[int], npt.NDArray[np.int32]]:
    """Random numbers of units that each free group keeps, and random labels to remove accordingly."""
    kept, removed = [], [np.zeros(0, dtype=np.int32)]
    for group in network.groups:
        keep = group.unit if group.frozen else int(rng.integers(max(1, group.unit // 4), group.unit + 1))
        kept.append(keep)
        for block in group.blocks:
            count = len(block) - keep * len(block) // group.unit
            removed.append(rng.choice(block, count, replace=False).astype(np.int32))
    return kept, np.concatenate(removed)


def valid_cuts(network: Network, wanted: int = 3) -> list[tuple[list[int], Masks]]:
    """Random cuts that leave boxes; groups that cut one axis in two ways need not."""
    found: list[tuple[list[int], Masks]] = []
    for seed in range(20 * wanted):
        kept, removed = draw(network, np.random.default_rng(seed))
        masks = make_plan(network.analysis, network.groups, removed)[1]
        if not masks.faults():
            found.append((kept, masks))
        if len(found) == wanted:
            break
    return found


def check_widths(network: Network, kept: list[int], masks: Masks) -> None:
    widths = Widths(network)
    for tensor in network.analysis.graph.tensors:
        if tensor.shape is not None:
            assert widths.shape(tensor, kept) == masks.shape(tensor), tensor
    for op in network.analysis.graph.ops:
        change = OpChange(op, network.analysis, masks)
        for factor in borne(network, op):
            assert widths.size_of(op, factor, kept) == change.new_size(factor), (op, factor)
    table = widths.table()
    assert table.at(kept).tolist() == [extent.at(kept, widths.units) for extent in widths.extents]
    after = macs(network.analysis, lambda op: OpChange(op, network.analysis, masks).new_size)
    cost = MacsCost(network, widths)
    assert cost.total(kept) == after
    assert cost.total(widths.full) == macs(network.analysis)


def borne(network: Network, op: Op) -> set[str]:
    """The factors that some operand of an op has."""
    flows = network.analysis.flows[op.index]
    flows = flows if isinstance(flows, list) else []
    return {
        name
        for f in flows
        if isinstance(f, SignatureFlow)
        for view in f.signature.views
        for name in view.factors
    }


@every_pattern
def test_widths_are_those_of_plans(pattern: Pattern) -> None:
    network = analysed(pattern)
    cuts = valid_cuts(network)
    assert cuts
    for kept, masks in cuts:
        check_widths(network, kept, masks)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(graphs(), st.integers(0, 3))
def test_widths_are_those_of_plans_on_generated_graphs(model: onnx.ModelProto, seed: int) -> None:
    network = analyze_ir(as_ir(model)[0])
    kept, removed = draw(network, np.random.default_rng(seed))
    masks = make_plan(network.analysis, network.groups, removed)[1]
    if not masks.faults():
        check_widths(network, kept, masks)


@every_pattern
def test_parameters_and_bytes_are_those_of_the_rewritten_model(pattern: Pattern) -> None:
    network = fresh(pattern)
    costs = ParametersCost(network), BytesCost(network)
    before = parameters(network.model), file_size(network.model)
    assert tuple(cost.total(cost.widths.full) for cost in costs) == before
    kept, masks = valid_cuts(network, 1)[0]
    edits = collect(network.analysis, masks)
    if functions_to_inline(network.analysis, masks, edits):
        # What is inlined first is another network, with a weight for each call.
        functions_to_copy = {op.path[0].op_type for op in network.analysis.graph.ops if op.path}
        assert functions_to_copy
        return
    expected = [cost.total(kept) for cost in costs]
    nodes = len(list(network.model.graph.all_nodes()))
    Rewriter(network.analysis, masks).run(edits)
    network.fills.join()
    if pattern.name in REWRITTEN:
        assert abs(parameters(network.model) - expected[0]) <= 0.15 * before[0]
        return
    assert parameters(network.model) == expected[0]
    # Nodes that correct shapes are added; names and shapes of stored values become shorter or longer.
    added = len(list(network.model.graph.all_nodes())) - nodes
    tensors = len(network.model.graph.initializers) + len(network.analysis.graph.tensors)
    assert abs(file_size(network.model) - expected[1]) <= 12 * tensors + 400 * max(added, 0)


@every_pattern
def test_a_saving_is_the_difference_of_two_totals(pattern: Pattern) -> None:
    network = analysed(pattern)
    rng = np.random.default_rng(1)
    widths = Widths(network)
    for cost in (
        MacsCost(network, widths),
        ParametersCost(network, widths),
        BytesCost(network, widths),
        EnergyCost(network),
    ):
        assert isinstance(cost, CostModel)
        check_savings(cost, network, rng)


def check_savings(cost: CostModel, network: Network, rng: np.random.Generator) -> None:
    """For every group, from a random state, at all its levels."""
    kept = [int(rng.integers(1, group.unit + 1)) for group in network.groups]
    for group in network.groups:
        levels = list(range(1, group.unit + 1))[:12]
        expected = [
            cost.total(kept) - cost.total([*kept[: group.index], level, *kept[group.index + 1 :]])
            for level in levels
        ]
        np.testing.assert_allclose(
            cost.saving(group.index, levels, kept), expected, rtol=1e-9, atol=1e-9 * cost.total(kept)
        )


@every_pattern
def test_cutting_more_never_costs_more(pattern: Pattern) -> None:
    network = analysed(pattern)
    rng = np.random.default_rng(2)
    for cost in (MacsCost(network), ParametersCost(network), BytesCost(network), EnergyCost(network)):
        kept = [int(rng.integers(1, group.unit + 1)) for group in network.groups]
        less = [int(rng.integers(1, k + 1)) for k in kept]
        assert cost.total(less) <= cost.total(kept) <= cost.total([group.unit for group in network.groups])


def test_groups_that_cut_one_axis_in_two_ways_multiply() -> None:
    extent = Extent(12, ((12, (0, 1)),))
    assert extent.at([2, 1], [3, 2]) == 4  # 12 of 3 heads times 4: two heads of half their size
    assert extent.groups == (0, 1)
    assert Extent(10, ((4, (0,)), (2, (1,)))).at([1, 1], [2, 2]) == 10 - 2 - 1


LINEAR = """
agraph (float[6,10] x) => (float[6,4] y) {
  h = MatMul (x, w1)
  a = Relu (h)
  y = MatMul (a, w2)
}
"""


def linear(dtype: type[np.generic] = np.float32) -> Network:
    name = {np.float32: "float", np.float16: "float16", np.float64: "double"}[dtype]
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal(shape).astype(dtype) for shape in ((10, 8), (8, 4)))
    return analyze_ir(parse(LINEAR.replace("float[", f"{name}["), w1=w1, w2=w2))


def hidden(network: Network, keep: int) -> list[int]:
    """Keep so many of the 8 hidden units, and all else."""
    return [keep if not group.frozen and group.unit == 8 else group.unit for group in network.groups]


@pytest.mark.parametrize(("dtype", "bits"), [(np.float16, 16), (np.float32, 32), (np.float64, 64)])
def test_costs_by_hand(dtype: type[np.generic], bits: int) -> None:
    network = linear(dtype)
    for keep in (8, 3):
        kept = hidden(network, keep)
        products = 6 * 10 * keep + 6 * keep * 4
        weights = 10 * keep + keep * 4
        # x, h, what Relu makes of h, y: each once for the product that reads or makes it
        moved = 6 * 10 + 6 * keep + 6 * keep + 6 * 4
        assert MacsCost(network).total(kept) == products
        assert ParametersCost(network).total(kept) == weights
        joules = MAC_ENERGY[{16: "FLOAT16", 32: "FLOAT", 64: "DOUBLE"}[bits]]
        expected = products * joules + bits / 8 * (weights * DRAM_ENERGY + moved * SRAM_ENERGY)
        assert EnergyCost(network).total(kept) == pytest.approx(expected)
        large = products * joules + bits / 8 * (weights + moved) * DRAM_ENERGY
        assert EnergyCost(network, sram_bytes=8).total(kept) == pytest.approx(large)
    size = BytesCost(network)
    assert size.total(hidden(network, 8)) - size.total(hidden(network, 3)) == 5 * 14 * bits / 8


def test_a_value_that_is_used_in_different_ways_is_not_counted_as_saved() -> None:
    """One bias of two layers of equal size that are not coupled: each needs its own after."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"w1": (8, 8), "w2": (8, 8), "w3": (8, 4), "b": (8,)}.items()
    }
    text = """
    agraph (float[6,8] x) => (float[6,4] y) {
      m1 = MatMul (x, w1)
      a1 = Add (m1, b)
      r1 = Relu (a1)
      m2 = MatMul (r1, w2)
      a2 = Add (m2, b)
      r2 = Relu (a2)
      y = MatMul (r2, w3)
    }
    """
    network = analyze_ir(parse(text, **arrays))
    cost = ParametersCost(network)
    free = [group.index for group in network.groups if not group.frozen]
    assert len(free) == 2
    kept = [4 if group.index in free else group.unit for group in network.groups]
    assert cost.total(kept) == 8 * 4 + 4 * 4 + 4 * 4 + 8


def test_kept_must_fit_the_groups() -> None:
    network = linear()
    cost = MacsCost(network)
    full = cost.widths.full.tolist()
    for wrong, said in (
        (full[:-1], "one number for each"),
        ([-1, *full[1:]], "keeps -1"),
        ([full[0] + 1, *full[1:]], f"it can keep 0 to {full[0]}"),
    ):
        with pytest.raises(OptionError, match=said):
            cost.total(wrong)
        with pytest.raises(OptionError, match=said):
            cost.saving(0, [1], wrong)


def test_every_model_says_what_it_counts() -> None:
    network = linear()
    for cost, unit in (
        (MacsCost(network), "MACs"),
        (ParametersCost(network), "parameters"),
        (BytesCost(network), "bytes"),
        (EnergyCost(network), "J"),
    ):
        assert cost.unit == unit
        assert cost.describe()
        assert "\n" not in cost.describe()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5MB", 5_000_000),
        ("5 mb", None),
        ("5MiB", 5 * 2**20),
        ("1.5k", 1500),
        ("1.5KB", 1500),
        ("2GiB", 2**31),
        (".5M", 500_000),
        ("1e3", 1000),
        ("123", 123),
        (" 7 kB ", 7000),
        (99, 99),
        (1e6, 1_000_000),
    ],
)
def test_sizes(text: str | float, size: int | None) -> None:
    if size is None:
        with pytest.raises(OptionError, match="no size"):
            parse_size(text)
    else:
        assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "five",
        "5XB",
        "-5MB",
        "5iB",
        "0",
        "0.2",
        "1,5MB",
        "inf",
        "nan",
        float("nan"),
        -1,
        0,
        True,
        None,
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="no size"):
        parse_size(text)

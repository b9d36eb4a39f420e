"""Every derivative rule against central differences of the op itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphprune.errors import OptionError
from graphprune.gradients.vjp import differentiable
from graphprune.gradients.vjp.program import Place, Program
from graphprune.graph.twin import build_twin
from graphprune.model import as_ir

from .derivatives import Array, in_double, in_runtime, slope

MS = "com.microsoft"


@dataclass(frozen=True)
class Case:
    """One op: operands given by shape are random and differentiated; arrays are constants.

    ``low`` and ``high`` bound the random operands, ``runtime`` marks ops that ONNX's reference implementation does not
    have or has wrong: they run in ONNX Runtime, in float32.
    """

    kind: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    low: float = -2.0
    high: float = 2.0
    runtime: bool = False

    def __str__(self) -> str:
        shown = ",".join(f"{n}={v}" for n, v in self.attributes.items())
        return f"{self.kind}-{self.opset}({shown})".replace(" ", "")


def case(kind: str, *operands: Any, **options: Any) -> Case:
    settings = {n: options.pop(n) for n in ("opset", "outputs", "low", "high", "runtime") if n in options}
    return Case(kind, operands, options, **settings)


def ints(*values: int) -> Array:
    return np.asarray(values, dtype=np.int64)


def floats(*values: float) -> Array:
    return np.asarray(values, dtype=np.float32)


X = (2, 3, 4)
IMAGE = (2, 4, 7, 6)
BOTH_WAYS = ((5, 2, 3), (2, 16, 3), (2, 16, 4), (2, 32))
ANGLES = tuple(f(np.arange(12)).reshape(2, 3, 2).astype(np.float32) for f in (np.cos, np.sin))
RECURRENT = ((5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32))

#: Smooth or piecewise smooth everywhere, of one operand, with defaults for all attributes.
PLAIN = """
    Relu Sigmoid Tanh Exp Neg Abs Erf Sin Cos Sinh Cosh Softplus Softsign LeakyRelu Elu Celu Selu ThresholdedRelu
    HardSigmoid HardSwish Mish Identity Dropout Transpose ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare
    ReduceLogSumExp ReduceSum ReduceMean Softmax LogSoftmax GlobalAveragePool Flatten
"""

CASES = [
    *(case(kind, X) for kind in PLAIN.split()),
    *(case(kind, X, low=0.5) for kind in ("Log", "Sqrt", "Reciprocal", "ReduceProd", "ReduceLogSum")),
    *(case(kind, X, low=-0.9, high=0.9) for kind in ("Tan", "Asin", "Acos", "Atan")),
    case("Gelu", X, opset=20),
    case("Gelu", X, opset=20, approximate="tanh"),
    case("Swish", X, opset=24, alpha=1.5, runtime=True),
    case("LeakyRelu", X, alpha=0.3),
    case("Elu", X, alpha=0.5),
    case("Celu", X, alpha=2.0),
    case("HardSigmoid", X, alpha=0.3, beta=0.4),
    case(f"{MS}::Gelu", X, runtime=True),
    case(f"{MS}::QuickGelu", X, runtime=True),
    case(f"{MS}::QuickGelu", X, alpha=0.7, runtime=True),
    case(f"{MS}::BiasGelu", X, (4,), runtime=True),
    case(f"{MS}::FastGelu", X, (4,), runtime=True),
    case("Cast", X, to=TensorProto.DOUBLE),
    case("CastLike", X, floats(1)),
    case("Add", X, (3, 1)),
    case("Sub", (4,), X),
    case("Mul", X, (2, 1, 4)),
    case("Div", X, (3, 1), low=0.5),
    case("Pow", X, floats(2)),
    case("Pow", X, floats(1.5), low=0.5),
    case("Sum", X, (4,), (3, 1)),
    case("Mean", X, X),
    case("Max", X, (3, 1), (4,)),
    case("Min", X, (3, 1)),
    case("Where", np.arange(12).reshape(3, 4) % 3 == 0, X, (4,)),
    case("Clip", X, np.float32(-1), np.float32(0.5)),
    case("Clip", X, min=-1.0, max=0.5, opset=10, runtime=True),
    case("PRelu", X, (3, 1)),
    # movement
    case("Reshape", X, ints(0, -1)),
    case("Squeeze", (2, 1, 3), ints(1)),
    case("Unsqueeze", X, ints(0, 3)),
    case("Transpose", X, perm=[2, 0, 1]),
    case("Expand", (3, 1), ints(2, 3, 4)),
    case("Concat", X, (2, 1, 4), axis=-2),
    case("Split", X, ints(1, 2), axis=1, outputs=2),
    case("Slice", X, ints(1, -1), ints(9, -9), ints(1, 2), ints(1, -2)),
    case("Slice", X, ints(1), ints(3), ints(2)),
    case("Slice", X, starts=[1, 0], ends=[3, 2], axes=[1, 2], opset=9, runtime=True),
    case("Gather", X, ints(2, 0), axis=1),
    case("Gather", X, np.asarray(-1), axis=2),
    case("Gather", X, np.asarray([[1, 1], [3, 0]]), axis=2),
    case("Gather", X, ints(*[1, 0] * 6), axis=0),
    case("GatherElements", X, np.asarray([[[1, 1, 0, 2]]] * 2), axis=1),
    case("GatherND", X, np.asarray([[0, 1], [0, 1], [1, 2]])),
    case("ScatterElements", X, np.asarray([[[1, 2, 0, 2]]] * 2), (2, 1, 4), axis=1),
    case("ScatterND", X, np.asarray([[0, 1], [1, 2]]), (2, 4)),
    case("Pad", X, ints(0, 1, 2, 0, 0, 1)),
    case("Pad", X, ints(0, -1, 0, 0, 2, -1), runtime=True),
    case("Pad", X, ints(0, 1, 2, 0, 2, 1), mode="reflect"),
    case("Pad", X, ints(0, 1, 2, 0, 3, 1), mode="edge"),
    case("Pad", X, ints(1, 2), None, ints(-1), opset=19, mode="wrap"),
    case("Tile", X, ints(1, 2, 3)),
    case("DepthToSpace", (2, 8, 3, 2), blocksize=2),
    case("DepthToSpace", (2, 8, 3, 2), blocksize=2, mode="CRD"),
    case("SpaceToDepth", (2, 3, 4, 6), blocksize=2),
    case("CumSum", X, np.asarray(1)),
    case("CumSum", X, np.asarray(2), exclusive=1, reverse=1),
    case("Trilu", X, upper=0),
    case("Trilu", X, np.asarray(1)),
    case("TopK", X, ints(2), axis=1, outputs=2),
    # reductions
    case("GlobalMaxPool", IMAGE),
    case("ReduceMean", X, ints(1), keepdims=0),
    case("ReduceMean", X, axes=[0, 2], opset=13),
    case("ReduceSum", X, ints(-1)),
    case("ReduceSum", X, noop_with_empty_axes=1, runtime=True),
    case("ReduceMax", X, axes=[1], opset=13),
    case("Softmax", X, axis=1),
    case("Softmax", X, axis=1, opset=11, runtime=True),
    case("LogSoftmax", X, axis=0),
    case("LayerNormalization", X, (3, 4), (3, 4), axis=1),
    case("RMSNormalization", X, (4,), opset=23),
    case("SimplifiedLayerNormalization", X, (4,), runtime=True),
    case(f"{MS}::SkipLayerNormalization", X, X, (4,), (4,), (4,), epsilon=1e-5, runtime=True),
    case(f"{MS}::SkipSimplifiedLayerNormalization", X, X, (4,), epsilon=1e-5, runtime=True),
    case("GroupNormalization", IMAGE, (4,), (4,), num_groups=2, opset=21, runtime=True),
    case("InstanceNormalization", IMAGE, (4,), (4,)),
    case("BatchNormalization", IMAGE, (4,), (4,), (4,), floats(0.5, 1, 2, 3)),
    case("LpNormalization", X, axis=1),
    case("LpNormalization", X, axis=1, p=1, low=0.5),
    case("MeanVarianceNormalization", IMAGE, runtime=True),
    case("LRN", IMAGE, size=3, alpha=0.5, beta=0.6, bias=1.5, runtime=True),
    # contractions
    case("MatMul", (2, 1, 3, 4), (5, 4, 2)),
    case("MatMul", (2, 3, 4), (4, 5)),
    case("MatMul", (4,), (2, 4, 3)),
    case("MatMul", (2, 3, 4), (4,)),
    case(f"{MS}::FusedMatMul", (2, 4, 3), (2, 5, 4), transA=1, transB=1, alpha=0.5, runtime=True),
    case("Gemm", (3, 4), (4, 5), (5,)),
    case("Gemm", (4, 3), (5, 4), (3, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Einsum", (2, 3, 4), (2, 5, 4), equation="bik,bjk->bij"),
    case("Einsum", (2, 3), (3, 4), equation="ij,jk"),
    case("Einsum", (2, 3, 4), equation="ijk->i"),
    case("Conv", IMAGE, (6, 4, 3, 3), (6,), pads=[1, 1, 1, 1]),
    case("Conv", IMAGE, (6, 4, 3, 2), (6,), pads=[1, 0, 2, 1], strides=[2, 3]),
    case("Conv", IMAGE, (6, 2, 3, 3), group=2, strides=[2, 2], pads=[1, 1, 0, 1]),
    case("Conv", IMAGE, (8, 1, 3, 3), group=4, dilations=[2, 1], pads=[0, 1, 1, 2]),
    case("Conv", IMAGE, (4, 4, 1, 1), pads=[1, 1, 1, 1]),
    case("Conv", IMAGE, (3, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", IMAGE, (3, 4, 2, 3), auto_pad="SAME_LOWER"),
    case("Conv", (2, 3, 9), (4, 3, 3), dilations=[2], strides=[2]),
    case("Conv", (1, 2, 4, 5, 3), (3, 2, 2, 2, 2)),
    case("ConvTranspose", IMAGE, (4, 3, 3, 3), (3,), strides=[2, 2], pads=[1, 0, 1, 1], output_padding=[1, 0]),
    case("ConvTranspose", IMAGE, (4, 3, 2, 2), dilations=[2, 1], runtime=True),
    case("ConvTranspose", IMAGE, (4, 3, 2, 2), group=2, strides=[2, 2], runtime=True),
    case("Attention", (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3), opset=23),
    case("Attention", (2, 3, 8), (2, 5, 4), (2, 5, 6), opset=23, q_num_heads=4, kv_num_heads=2, scale=0.3),
    case("Attention", (1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), opset=23, is_causal=1),
    case("Attention", *[(1, 2, 3, 4)] * 3, np.eye(3) + np.eye(3, k=1) > 0, opset=23),
    case("Attention", *[(1, 2, 3, 4)] * 3, np.float32(3 * np.eye(3)), opset=23),
    case("RotaryEmbedding", (2, 2, 3, 4), *ANGLES, opset=23, interleaved=1),
    case("RotaryEmbedding", (2, 3, 8), *ANGLES, opset=23, num_heads=2),
    case(f"{MS}::RotaryEmbedding", (2, 3, 8), ints(0), ANGLES[0][0], ANGLES[1][0], num_heads=2, runtime=True),
    # space
    case("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], opset=12, runtime=True),
    case("MaxPool", IMAGE, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], opset=11, runtime=True),
    case("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, runtime=True),
    case("AveragePool", IMAGE, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], runtime=True),
    case(
        "AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1, runtime=True
    ),
    case("AveragePool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], runtime=True),
    case("AveragePool", IMAGE, kernel_shape=[3, 4], strides=[2, 3], ceil_mode=1, runtime=True),
    case("Resize", IMAGE, None, floats(1, 1, 2, 2), mode="nearest", runtime=True),
    case("Resize", IMAGE, None, None, ints(2, 4, 10, 4), mode="linear", runtime=True),
    case("Resize", IMAGE, None, floats(1, 1, 1.5, 2), mode="cubic", runtime=True),
    case(
        "Resize",
        IMAGE,
        None,
        None,
        ints(2, 4, 9, 11),
        mode="linear",
        coordinate_transformation_mode="align_corners",
        runtime=True,
    ),
    case("Resize", IMAGE, floats(1, 1, 2, 2), opset=10, runtime=True),
    case("Upsample", IMAGE, floats(1, 1, 2, 3), opset=9, runtime=True),
    # recurrence
    case("LSTM", *RECURRENT, None, (1, 2, 4), (1, 2, 4), hidden_size=4, outputs=3),
    case("LSTM", *BOTH_WAYS, hidden_size=4, direction="bidirectional", runtime=True),
    case("GRU", (5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24), None, (1, 2, 4), hidden_size=4, outputs=2),
    case("GRU", (5, 2, 3), (1, 12, 3), (1, 12, 4), hidden_size=4, linear_before_reset=1),
    case("GRU", (5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24), hidden_size=4, direction="reverse", runtime=True),
    case("RNN", (5, 2, 3), (1, 4, 3), (1, 4, 4), (1, 8), None, (1, 2, 4), hidden_size=4, outputs=2),
]  # fmt: skip

#: Kinds whose derivative is zero, or that the tests below are about.
OTHERS = """
    Shape Size Sign Floor Ceil Round Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not IsNaN IsInf ArgMax
    ArgMin NonZero OneHot Hardmax EyeLike ConstantOfShape RandomNormalLike RandomUniformLike Mod BitwiseAnd BitwiseOr
    BitwiseXor BitwiseNot Range QuantizeLinear DequantizeLinear com.microsoft::FusedGemm
"""


def test_every_rule_has_a_case() -> None:
    assert set(differentiable()) - {c.kind for c in CASES} == set(OTHERS.split())


def model_of(item: Case) -> tuple[onnx.ModelProto, dict[str, Array], list[int]]:
    """A model of one op, its inputs, and the slots that are differentiated."""
    domain, _, op_type = item.kind.rpartition("::")
    rng = np.random.default_rng(len(str(item)))
    names, inputs, constants, feeds, slots = [], [], [], {}, []
    for slot, operand in enumerate(item.operands):
        name = f"x{slot}"
        if operand is None:
            names.append("")
            continue
        names.append(name)
        if isinstance(operand, tuple):
            feeds[name] = rng.uniform(item.low, item.high, operand)
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, operand))
            slots.append(slot)
        else:
            constants.append(numpy_helper.from_array(np.asarray(operand), name))
    made = [f"y{k}" for k in range(item.outputs)]
    node = helper.make_node(op_type, names, made, "op", domain=domain, **item.attributes)
    opsets = [helper.make_opsetid("", item.opset), *([helper.make_opsetid(domain, 1)] if domain else [])]

    def build(outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph([node], "one_op", inputs, outputs, constants)
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    untyped = build([helper.make_empty_tensor_value_info(name) for name in made])
    results = in_runtime(untyped)({name: array.astype(np.float32) for name, array in feeds.items()})
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(made, results, strict=True)
    ]
    return build(outputs), feeds, slots


@pytest.mark.parametrize("item", CASES, ids=str)
def test_rule_equals_central_differences(item: Case) -> None:
    """The adjoint along a random direction; 1e-6 in double precision, 1e-2 where the op runs in single."""
    model, feeds, slots = model_of(item)
    twin = build_twin(as_ir(model)[0])
    (op,) = twin.ops
    real = [t for t in op.outputs if t is not None and t.dtype is not None and t.dtype.is_floating_point()]
    rng = np.random.default_rng(1)
    weights = {t: rng.standard_normal(t.shape or ()) for t in real}
    dtype = np.float32 if item.runtime else np.float64
    run = in_runtime if item.runtime else in_double
    forward = Program(twin, dtype)
    forward.write_forward()
    for tensor in real:
        forward.output(forward.value(tensor))
    program = Program(twin, dtype)
    program.write_forward()
    places = [Place(op, slot) for slot in slots]
    found, _ = program.adjoints({t: program.e.lift(w) for t, w in weights.items()}, places)
    for place in places:
        program.output(found[place])
    primal, adjoint = run(forward.finish()), run(program.finish())
    gradients = adjoint({name: array.astype(dtype) for name, array in feeds.items()})
    for slot, gradient in zip(slots, gradients, strict=True):
        name = f"x{slot}"
        assert gradient.shape == feeds[name].shape

        def loss(x: Array, name: str = name) -> float:
            results = primal({n: a.astype(dtype) for n, a in {**feeds, name: x}.items()})
            return float(
                sum((w * y.astype(np.float64)).sum() for w, y in zip(weights.values(), results, strict=True))
            )

        for _ in range(3):
            along = rng.standard_normal(feeds[name].shape)
            numeric = slope(loss, feeds[name], along, 2e-3 if item.runtime else 1e-6)
            exact = float((gradient.astype(np.float64) * along).sum())
            scale = float(np.linalg.norm(gradient.astype(np.float64)) * np.linalg.norm(along) + 1e-3)
            assert abs(numeric - exact) <= (1e-2 if item.runtime else 1e-6) * scale


def chain(
    nodes: list[onnx.NodeProto], shape: tuple[int, ...], constants: dict[str, Array]
) -> onnx.ModelProto:
    """A model from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def adjoint_of(model: onnx.ModelProto, x: Array) -> Array:
    """The adjoint of what the first op reads, for an adjoint of ones at the output."""
    twin = build_twin(as_ir(model)[0])
    program = Program(twin)
    program.write_forward()
    (y,) = twin.outputs
    place = Place(twin.ops[0], 0)
    found, _ = program.adjoints({y: program.e.lift(np.ones(y.shape or ()))}, [place])
    program.output(found[place])
    return in_runtime(program.finish())({"x": x})[0]


def test_rounding_counts_as_the_identity() -> None:
    """Through a pair of QuantizeLinear and DequantizeLinear, as fine as its scale says."""
    constants: dict[str, Array] = {
        "s": np.asarray(0.25, np.float32),
        "z": np.asarray(0, np.int8),
        "w": np.asarray(3, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Mul", ["d", "w"], ["y"]),
    ]
    model = chain(nodes, (2, 3), constants)
    np.testing.assert_allclose(adjoint_of(model, np.ones((2, 3), np.float32)), 3.0)


def test_ops_that_step_stop_gradients() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"]),
        helper.make_node("Floor", ["m"], ["f"]),
        helper.make_node("Add", ["f", "m"], ["y"]),
    ]
    model = chain(nodes, (2, 3), {"w": np.full((1, 1), 2.0, np.float32)})
    np.testing.assert_allclose(adjoint_of(model, np.ones((2, 3), np.float32)), 2.0)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([helper.make_node("Det", ["x"], ["y"], "det")], "no derivative rule for Det"),
        (
            [helper.make_node("Einsum", ["x"], ["y"], "trace", equation="ii->i")],
            "Einsum its equation takes a diagonal",
        ),
    ],
    ids=["no rule", "a form without a rule"],
)
def test_a_refusal_names_the_op_and_the_way_out(nodes: list[onnx.NodeProto], reason: str) -> None:
    with pytest.raises(OptionError, match=rf"'{nodes[0].name}'.*{reason}.*need no gradients"):
        adjoint_of(chain(nodes, (3, 3), {}), np.ones((3, 3), np.float32))

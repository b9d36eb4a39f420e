"""What an engine computes, against ONNX Runtime on the CPU: inputs, reference, bounds by type."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import EngineError
from graphprune.tensorrt.engines import largest_difference
from graphprune.tensorrt.plan import BuildPlan, Precision

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

    from graphprune.graph import Graph, Op, Tensor

    Arrays = Mapping[str, npt.NDArray[Any]]

#: Largest relative error of one rounding where an engine computes, by what is in the file. float32 is multiplied as
#: TF32, with float16's fraction of 10 bits, by default ("Accuracy Considerations", TensorRT developer guide).
ROUNDOFF = {"FLOAT": 2.0**-11, "FLOAT16": 2.0**-11, "BFLOAT16": 2.0**-8, "DOUBLE": 2.0**-11}
#: One of 127 levels, since which way a half goes differs.
INT8_ROUNDOFF = 2.0**-7
_INT8 = "int8"
_NAMES = {"FLOAT": "float32 (TF32)", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}
#: Quantization jumps by one level, which its bound allows for.
_LEVELS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})


@dataclass(frozen=True, slots=True)
class Source:
    """Where inputs come from.

    Attributes:
        calibration: An .npz, .npy or folder as :func:`graphprune.load_calibration` takes; None for random inputs.
        preprocess: What makes inputs of images.
        shapes: Sizes of dynamic inputs that no profile names.
        seed: Of random inputs.
    """

    calibration: Path | None = None
    preprocess: str | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        """For reports."""
        return "random inputs" if self.calibration is None else str(self.calibration)


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """One output against the reference.

    Attributes:
        name: Of the output.
        difference: The largest one, as a fraction of the output's largest value.
        bound: What it may be; None where it cannot be bounded, since what leads to it jumps (ArgMax, Round).
    """

    name: str
    difference: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """Within its bound."""
        return self.bound is None or self.difference <= self.bound


@dataclass(frozen=True, slots=True)
class Numbers:
    """What an engine computes against ONNX Runtime on the CPU.

    Attributes:
        inputs: What it was run on.
        kind: The coarsest type that it computes in.
        outputs: All of them.
    """

    inputs: str
    kind: str
    outputs: tuple[OutputDifference, ...]

    @property
    def worst(self) -> OutputDifference | None:
        """The bounded output that comes nearest to its bound; None where none is bounded."""
        bounded = [output for output in self.outputs if output.bound is not None]
        return max(bounded, key=lambda output: output.difference / (output.bound or 1.0), default=None)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold; a difference that is infinite or NaN is null."""
        return {
            "inputs": self.inputs,
            "kind": self.kind,
            "outputs": [
                {
                    "name": output.name,
                    "difference": output.difference if output.difference < float("inf") else None,
                    "bound": output.bound,
                    "holds": output.holds,
                }
                for output in self.outputs
            ],
        }

    def check(self, what: str) -> None:
        """Nothing is out of bounds.

        Raises:
            EngineError: Something is; the outputs are named.
        """
        wrong = [output for output in self.outputs if not output.holds]
        if wrong:
            first = wrong[0]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise EngineError(
                f"{what}: on {self.inputs}, output {first.name!r}{more} differs from ONNX Runtime's on the CPU by"
                f" {first.difference:.2g} of its scale, where {first.bound:.2g} is allowed in {self.kind}; do not use"
                " it, and try another precision or version"
            )


class Reference:
    """Inputs for a network and what ONNX Runtime makes of them on the CPU."""

    def __init__(self, model: ir.Model, plan: BuildPlan, source: Source) -> None:
        """Make inputs and run them.

        Parameters
        ----------
        model : onnx_ir.Model
            The network; it is not changed.
        plan : BuildPlan
            Its file, its types, and the shapes that inputs have.
        source : Source
            Where inputs come from.

        Raises
        ------
        OptionError
            If the inputs cannot be had or do not fit.
        VerificationError
            If ONNX Runtime cannot run the network, or random inputs cannot be made.
        """
        from graphprune.graph.twin import build_twin

        shapes = {**source.shapes, **{profile.name: profile.usual for profile in plan.profiles}}
        self.twin = build_twin(model, shapes)
        self.source = source
        self.precision = plan.precision
        self.feeds = _feeds(self.twin, source)
        self.outputs = _run(model, self.twin, plan, self.feeds)

    def compare(self, outputs: Arrays) -> Numbers:
        """How far outputs are off.

        Raises
        ------
        EngineError
            If one is missing or has another shape.
        """
        roundoff, kind = coarsest(self.precision)
        allowed = bounds(self.twin, roundoff)
        found = []
        for name, expected in self.outputs.items():
            error = largest_difference(outputs, {name: expected})
            found.append(OutputDifference(name, error, allowed.get(name)))
        return Numbers(self.source.name, kind, tuple(found))


def coarsest(precision: Precision) -> tuple[float, str]:
    """The largest roundoff of a network's types, and the type's name.

    >>> coarsest(Precision(("FLOAT16", "FLOAT")))
    (0.00048828125, 'float16')
    >>> coarsest(Precision(("FLOAT",), quantized=True))
    (0.0078125, 'int8')
    """
    if precision.quantized:
        return INT8_ROUNDOFF, _INT8
    names = [name for name in precision.floats if name in ROUNDOFF] or ["FLOAT"]
    worst = max(names, key=lambda name: (ROUNDOFF[name], name != "FLOAT"))
    return ROUNDOFF[worst], _NAMES[worst]


def bounds(twin: Graph, roundoff: float) -> dict[str, float | None]:
    """What each output may differ by, relative to its scale.

    Roundings one after another add up like a random walk: ``factor * roundoff * sqrt(depth)`` behind ``depth`` of them
    (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4); the factor is that of
    :mod:`graphprune.precision.formats`. None behind a jump, where two right answers may be far apart.
    """
    from graphprune.precision.formats import BOUND_FACTOR, MOVEMENT

    depth: dict[Tensor, int] = {}
    jumped: set[Tensor] = set()
    for op in twin.ops:
        reads = [tensor for tensor in op.inputs if tensor is not None]
        behind = max((depth.get(tensor, 0) for tensor in reads), default=0)
        behind += op.kind not in MOVEMENT and not all(tensor.constant for tensor in reads)
        jump = _jumps(op) or any(tensor in jumped for tensor in reads)
        for tensor in op.outputs:
            if tensor is not None:
                depth[tensor] = behind
                if jump:
                    jumped.add(tensor)
    found: dict[str, float | None] = {}
    for tensor in twin.outputs:
        name = (tensor.value.name if tensor.value is not None else None) or tensor.name
        bound = BOUND_FACTOR * roundoff * sqrt(depth.get(tensor, 0) + 1)
        found[name] = None if tensor in jumped else bound
    return found


def _jumps(op: Op) -> bool:
    """A small change of a real that the op reads may change its result a lot."""
    from graphprune.verification.faults import DISCONTINUOUS

    if op.op_type not in DISCONTINUOUS or op.op_type in _LEVELS or op.op_type == "Where":
        return False
    output = op.outputs[0]
    if (
        op.op_type == "Cast"
        and output is not None
        and output.dtype is not None
        and output.dtype.is_floating_point()
    ):
        return False
    return any(
        tensor is not None
        and not tensor.constant
        and (tensor.dtype is None or tensor.dtype.is_floating_point())
        for tensor in op.inputs
    )


def _feeds(twin: Graph, source: Source) -> dict[str, npt.NDArray[Any]]:
    from graphprune.verification.feeds import random_feeds

    if source.calibration is None:
        return random_feeds(twin, source.seed)
    from graphprune.calibration import load_calibration
    from graphprune.calibration.preprocess import Preprocess

    preprocess = Preprocess.parse(source.preprocess) if source.preprocess is not None else None
    calibration = load_calibration(source.calibration, twin, preprocess=preprocess, seed=source.seed)
    shapes = {tensor.name: tensor.shape or (1,) for tensor in twin.inputs}
    sizes = [
        shapes[name][calibration.axes.get(name, 0)] for name in calibration.inputs if name in shapes
    ]  # as many samples as the engine is tuned for
    return next(iter(calibration.batches(min(sizes, default=1))))


def _run(
    model: ir.Model, twin: Graph, plan: BuildPlan, feeds: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """ONNX Runtime's outputs; of bfloat16, which it has next to no kernels for, those of an emulation."""
    from graphprune.verification.runs import open_session, run_session

    if "BFLOAT16" not in plan.precision.floats:
        with open_session(Path(plan.model), "the network") as session:
            return run_session(session, feeds, "the network")
    import numpy as np
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    from graphprune.model import copy, save
    from graphprune.precision.emulation import emulate
    from graphprune.precision.typing import types_of

    emulated = copy(model)
    if emulated.functions:
        InlinePass()(emulated)
    else:
        types = types_of(model, twin)  # files need not say the types of what is between
        for old, new in zip(_values(model), _values(emulated), strict=True):
            if new.type is None and old in types:
                new.type = ir.TensorType(types[old])
    emulate(emulated, ir.DataType.BFLOAT16)
    widened = {
        name: array.astype(np.float32) if array.dtype == ir.DataType.BFLOAT16.numpy() else array
        for name, array in feeds.items()
    }
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        path = Path(folder) / "emulated.onnx"
        save(emulated, path)
        with open_session(path, "the network") as session:
            return run_session(session, widened, "the network")


def _values(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for node in graph for value in node.outputs]

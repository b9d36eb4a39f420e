"""Ops over space: pools, resizing, sampling, and the exchange of space and depth."""

from __future__ import annotations

from graphprune.axes.flow import Operand
from graphprune.graph import Op
from graphprune.rules.movement import resize_to
from graphprune.rules.registry import Change, Description, Refusal, has_input, known_data, register, shape_of


def global_pool(op: Op) -> str:
    return f"n c S!* -> n c {'1 ' * (len(shape_of(op, 0)) - 2)}"


def max_pool(op: Op) -> Description:
    if len(op.outputs) > 1 and op.outputs[1] is not None:
        return Refusal("its indices count through all channels")
    return "n c S!* -> n c T!*"


def resize(op: Op) -> Description:
    """An axis that keeps its size passes; one that is resized is blocked."""
    source = shape_of(op, 0)
    target = shape_of(op, 0) if not op.outputs or op.outputs[0] is None else shape_of(op, 0, output=True)
    inputs, outputs = [], []
    # Where the aspect ratio is kept, the sizes of all axes that are named decide on the scale of each.
    tied = str(op.attributes.get("keep_aspect_ratio_policy", "stretch")) != "stretch" and has_input(op, 3)
    named = {int(a) % len(source) for a in op.attributes.get("axes", range(len(source)))} if tied else set()
    for i, (old, new) in enumerate(zip(source, target, strict=True)):
        passes = old == new and not _scaled(op, i) and i not in named
        inputs.append(f"x{i}" if passes else f"x{i}!")
        outputs.append(f"x{i}" if passes else f"y{i}!")
    return f"{' '.join(inputs)}, ?, ?, ? -> {' '.join(outputs)}"


def _scaled(op: Op, axis: int) -> bool:
    """True if a scale other than 1 applies to the axis, even where rounding keeps its size."""
    slot = 2 if op.op_type == "Resize" and op.version >= 11 else 1
    scales = known_data(op, slot) if has_input(op, slot) else None
    if scales is None or scales.size == 0:
        return False
    axes = [int(a) % len(shape_of(op, 0)) for a in op.attributes.get("axes", range(len(shape_of(op, 0))))]
    return axis in axes and float(scales.ravel()[axes.index(axis)]) != 1.0


def rewrite_resize(change: Change) -> None:
    """Sizes given as literals follow; scales need not."""
    if not has_input(change.op, 3) or "axes" not in change.op.attributes:
        if has_input(change.op, 3):
            resize_to(change, 3, Operand(True, 0))
        return
    rank = len(change.old(Operand(True, 0)))
    axes = [int(a) % rank for a in change.op.attributes["axes"]]
    old, new = change.old(Operand(True, 0)), change.new(Operand(True, 0))
    if old != new:
        resize_to(change, 3, Operand(True, 0), axes)


def depth_to_space(op: Op) -> str:
    if str(op.attributes.get("mode", "DCR")) == "CRD":
        return "n (c r! s!) h! w! -> n c (h! r!) (w! s!)"
    return "n (r! s! c) h! w! -> n c (h! r!) (w! s!)"


def space_to_depth(op: Op) -> str:
    if str(op.attributes.get("mode", "DCR")) == "CRD":
        return "n c (h! r!) (w! s!) -> n (c r! s!) h! w!"
    return "n c (h! r!) (w! s!) -> n (r! s! c) h! w!"


def col2im(op: Op) -> str:
    """Columns of patches: channel c has all its k kernel positions side by side."""
    return "n (c k!) l!, ?, ? -> n c S!*"


register("AveragePool LpPool", "n c S!* -> n c T!*")
register("MaxPool", max_pool)
register("GlobalAveragePool GlobalMaxPool GlobalLpPool", global_pool)
register("Resize Upsample", resize, rewrite=rewrite_resize)
# blocksize is both r and s; the height and width on the other side give the second.
register("DepthToSpace", depth_to_space, attributes={"blocksize": "r"})
register("SpaceToDepth", space_to_depth, attributes={"blocksize": "r"})
register("Col2Im", col2im)
register("GridSample", "n c S!*, n T!* _ -> n c T!*")
register("RoiAlign", "b! c h! w!, ?, ? -> m! c p! q!")
register("MaxRoiPool", "b! c h! w!, ? -> m! c p! q!")

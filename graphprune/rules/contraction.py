"""Ops that sum over a factor: convolutions, matrix products, Einsum, and embedding look-ups' kin."""

from __future__ import annotations

from graphprune.errors import RuleError
from graphprune.graph import Op
from graphprune.rules.elementwise import term
from graphprune.rules.registry import Description, Refusal, has_input, register, shape_of


def matmul_terms(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[str, str, str]:
    """Terms of ``a @ b`` and of the product, by NumPy's rules for any ranks."""
    rows = ["m"] if len(a) > 1 else []
    columns = ["n"] if len(b) > 1 else []
    batch_a, batch_b = a[:-2], b[:-2]
    rank = max(len(batch_a), len(batch_b))
    padded = [(1,) * (rank - len(batch)) + batch for batch in (batch_a, batch_b)]
    whole = tuple(max(x, y) if 0 not in (x, y) else 0 for x, y in zip(*padded, strict=True))
    left = [term(batch_a, whole, "b"), *rows, "k"]
    right = [term(batch_b, whole, "b"), "k", *columns]
    return " ".join(left), " ".join(right), " ".join([term(whole, whole, "b"), *rows, *columns])


def matmul(op: Op) -> str:
    left, right, product = matmul_terms(shape_of(op, 0), shape_of(op, 1))
    return f"{left}, {right} -> {product}"


def matmul_integer(op: Op) -> str:
    left, right, product = matmul_terms(shape_of(op, 0), shape_of(op, 1))
    zero_points = []
    for slot, factor in ((2, "m"), (3, "n")):
        vector = has_input(op, slot) and len(shape_of(op, slot)) == 1 and shape_of(op, slot)[0] > 1
        zero_points.append(factor if vector else "?")
    return f"{left}, {right}, {', '.join(zero_points)} -> {product}"


def _swapped(shape: tuple[int, ...], swap: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if swap and len(shape) > 1 else shape


def _swapped_term(text: str, swap: bool) -> str:
    factors = text.split()
    return " ".join([*factors[:-2], factors[-1], factors[-2]]) if swap and len(factors) > 1 else text


def fused_matmul(op: Op) -> Description:
    """MatMul with either operand's last two axes swapped (and no swap of batch axes)."""
    if op.attributes.get("transBatchA", 0) or op.attributes.get("transBatchB", 0):
        return Refusal("it swaps batch axes")
    swap = [bool(op.attributes.get(name, 0)) for name in ("transA", "transB")]
    left, right, product = matmul_terms(
        _swapped(shape_of(op, 0), swap[0]), _swapped(shape_of(op, 1), swap[1])
    )
    return f"{_swapped_term(left, swap[0])}, {_swapped_term(right, swap[1])} -> {product}"


def gemm(op: Op) -> str:
    left = "k m" if op.attributes.get("transA", 0) else "m k"
    right = "n k" if op.attributes.get("transB", 0) else "k n"
    rows, columns = shape_of(op, 0)[0 if left == "m k" else 1], shape_of(op, 1)[1 if right == "k n" else 0]
    bias = "?"
    if has_input(op, 2):
        shape = shape_of(op, 2)
        whole = (rows, columns)
        names = ["m", "n"][2 - len(shape) :] if shape else []
        bias = " ".join(
            "1" if size == 1 and whole[2 - len(shape) + i] != 1 else names[i] for i, size in enumerate(shape)
        )
    return f"{left}, {right}, {bias} -> m n"


def einsum(op: Op) -> Description:
    """The equation itself; a factor that stands twice in one term (a diagonal) is not spoken of."""
    equation = str(op.attributes["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    inputs = left.split(",")
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        right = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    ellipsis = 0
    for slot, text in enumerate(inputs):
        if "..." in text:
            ellipsis = max(ellipsis, len(shape_of(op, slot)) - len(text) + 3)
    repeated = {c for text in inputs for c in text if c.isalpha() and text.count(c) > 1}

    def spell(text: str, rank: int | None) -> str:
        words: list[str] = []
        head, dots, tail = text.partition("...")
        for part, count in ((head, 0), ("", rank if dots else 0), (tail, 0)):
            if count:
                words += [f"e{ellipsis - count + i}" for i in range(count)]
            words += ["_" if c in repeated else f"{c}x" for c in part]
        return " ".join(words)

    terms = []
    for slot, text in enumerate(inputs):
        rank = len(shape_of(op, slot)) - len(text) + 3 if "..." in text else None
        terms.append(spell(text, rank))
    return f"{', '.join(terms)} -> {spell(right, ellipsis)}"


def conv(op: Op) -> str:
    """Group g reads its own input channels c and makes its own output channels k."""
    return "n (g c) S!*, (g k) c R!*, (g k) -> n (g k) T!*"


def deform_conv(op: Op) -> Description:
    if int(op.attributes.get("offset_group", 1)) != 1:
        return Refusal("its channels are tied to offset groups")
    return "n (g c) S!*, (g k) c R!*, n o! T!*, (g k), n m! T!* -> n (g k) T!*"


def _per_channel(op: Op, slot: int, factors: str) -> str:
    return (
        factors if has_input(op, slot) and len(shape_of(op, slot)) == 1 and shape_of(op, slot)[0] > 1 else "?"
    )


def qlinear_conv(op: Op) -> str:
    scale, zero = _per_channel(op, 4, "(g k)"), _per_channel(op, 5, "(g k)")
    return f"n (g c) S!*, ?, ?, (g k) c R!*, {scale}, {zero}, ?, ?, (g k) -> n (g k) T!*"


def qlinear_matmul(op: Op) -> str:
    left, right, product = matmul_terms(shape_of(op, 0), shape_of(op, 3))
    row = [_per_channel(op, slot, "m") for slot in (1, 2)]
    column = [_per_channel(op, slot, "n") for slot in (4, 5)]
    return f"{left}, {', '.join(row)}, {right}, {', '.join(column)}, ?, ? -> {product}"


def conv_integer(op: Op) -> str:
    return f"n (g c) S!*, (g k) c R!*, ?, {_per_channel(op, 3, '(g k)')} -> n (g k) T!*"


def fused_conv(op: Op) -> Description:
    if str(op.attributes.get("activation", "")) in ("Softmax",):
        raise RuleError("an activation that normalises")
    residual = "n (g k) T!*" if has_input(op, 3) else "?"
    return f"n (g c) S!*, (g k) c R!*, (g k), {residual} -> n (g k) T!*"


_GROUP = {"group": "g"}
_ONE = {"group": 1}
_CONV = "n g c k R* T*"

register("Conv", conv, attributes=_GROUP, defaults=_ONE, macs=_CONV)
register(
    "ConvTranspose",
    "n (g c) S!*, (g c) k R!*, (g k) -> n (g k) T!*",
    attributes=_GROUP,
    defaults=_ONE,
    macs="n g c k R* S*",
)
register("DeformConv", deform_conv, attributes=_GROUP, defaults=_ONE, macs=_CONV)
register("ConvInteger", conv_integer, attributes=_GROUP, defaults=_ONE, macs=_CONV)
register("QLinearConv", qlinear_conv, attributes=_GROUP, defaults=_ONE, macs=_CONV)
register("com.microsoft::FusedConv", fused_conv, attributes=_GROUP, defaults=_ONE, macs=_CONV)
register("MatMul", matmul, macs="all")
register("MatMulInteger", matmul_integer, macs="all")
register("QLinearMatMul", qlinear_matmul, macs="all")
register("com.microsoft::FusedMatMul", fused_matmul, macs="all")
register("Gemm com.microsoft::FusedGemm", gemm, macs="all")
register("Einsum", einsum, macs="all")

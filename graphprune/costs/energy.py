"""Energy by a model of arithmetic and memory traffic.

No meter is read: on most machines there is none to read. What is counted:

- each multiply-accumulate of a contraction, by the type of its operands;
- each weight of a contraction, read once from DRAM;
- each activation that a contraction reads or writes, once; from on-chip SRAM where the tensor (before pruning) is no
  larger than the SRAM, else from DRAM. Elementwise ops, normalisations and pooling are taken to be fused into the
  contractions around them, as compilers do.

The prices are those of a 45 nm process at 0.9 V: M. Horowitz, "Computing's Energy Problem (and what we can do about
it)", ISSCC 2014, figure 1.1.9. Absolute numbers are out of date for any machine of today; the ratios between a
multiplication, an SRAM and a DRAM access, which decide what a cut saves, have changed far less.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from graphprune.cost import counted_ops, mac_terms
from graphprune.costs.models import PolynomialCost, Term, bytes_each
from graphprune.costs.widths import Widths
from graphprune.graph import Op, Tensor

if TYPE_CHECKING:
    from graphprune.network import Network

#: Joules of one multiplication and one addition. Not in the table: bfloat16 and 8-bit floats are priced as float16,
#: float64 by the square of its significand's length (53 / 24 bits) times float32, integers below 8 bits as 8 bits.
MAC_ENERGY = {
    "FLOAT": 3.7e-12 + 0.9e-12,
    "FLOAT16": 1.1e-12 + 0.4e-12,
    "BFLOAT16": 1.1e-12 + 0.4e-12,
    "DOUBLE": (3.7e-12 + 0.9e-12) * (53 / 24) ** 2,
    "INT32": 3.1e-12 + 0.1e-12,
    "INT8": 0.2e-12 + 0.1e-12,  # sums of products of 8 bits are kept in 32
}
#: Joules of a byte read from or written to DRAM: 1.3 nJ for 64 bits, the lower end of the table's range.
DRAM_ENERGY = 1.3e-9 / 8
#: Joules of a byte read from or written to an SRAM of 1 MB: 100 pJ for 64 bits.
SRAM_ENERGY = 100e-12 / 8
#: Bytes of that SRAM.
SRAM_BYTES = 1 << 20


class EnergyCost(PolynomialCost):
    """Joules of one inference at the twin's input sizes (see the module's description).

    Args:
        network: The analysed model.
        widths: Shared among the costs of one network.
        sram_bytes: Activations up to this size stay on the chip.
    """

    unit = "J"

    def __init__(
        self, network: Network, widths: Widths | None = None, *, sram_bytes: int = SRAM_BYTES
    ) -> None:
        widths = widths or Widths(network)
        self.sram_bytes = sram_bytes
        super().__init__(widths, _products(network, widths, sram_bytes))

    def describe(self) -> str:
        """See :class:`CostModel`."""
        return (
            "modelled energy of one inference: multiply-accumulates, weights from DRAM, activations from "
            f"{self.sram_bytes / 2**20:g} MB of SRAM or from DRAM (Horowitz, ISSCC 2014, 45 nm)"
        )


def _products(network: Network, widths: Widths, sram_bytes: int) -> Iterator[Term]:
    analysis = network.analysis
    read: set[Tensor] = set()
    for op in counted_ops(analysis):
        products = mac_terms(op, analysis)
        if not products:
            continue
        yield from (
            Term(_mac_energy(op), tuple(widths.factors(op)[name] for name in names)) for names in products
        )
        for tensor in dict.fromkeys((*op.inputs, *op.outputs)):
            if tensor is None or tensor.shape is None or (tensor.constant and tensor in read):
                continue
            read.add(tensor)
            size = bytes_each(tensor)
            stays = not tensor.constant and size * prod(tensor.shape) <= sram_bytes
            yield Term(size * (SRAM_ENERGY if stays else DRAM_ENERGY), widths.axes(tensor))


def _mac_energy(op: Op) -> float:
    """Joules of one multiply-accumulate, by the narrowest type of the op's matrices."""
    dtypes = [t.dtype for t in op.inputs if t is not None and t.dtype is not None and len(t.shape or ()) > 1]
    if not dtypes:
        return MAC_ENERGY["FLOAT"]
    dtype = min(dtypes, key=lambda d: d.bitwidth)
    if dtype.name in MAC_ENERGY:
        return MAC_ENERGY[dtype.name]
    if dtype.is_floating_point():
        return MAC_ENERGY["FLOAT16"]
    return MAC_ENERGY["INT8" if dtype.bitwidth <= 8 else "INT32"]

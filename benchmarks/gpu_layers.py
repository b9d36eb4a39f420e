"""The products that known networks are made of, as matrices: which sizes gpu.py times.

A layer multiplies a weight [m, k] with activations [k, n]: m outputs, k what each of them sums, n positions (pixels of
the result, or tokens) of the whole batch. A convolution is the product that it is computed as (implicit GEMM).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One product, and how often its network has it.

    Attributes:
        network: Of which network; "square" for none.
        name: Of the layer, or of the first of those that are alike.
        m, k: Of the weight.
        positions: Of one sample; n is this times the batch.
        count: How many layers of the network are alike.
    """

    network: str
    name: str
    m: int
    k: int
    positions: int
    count: int = 1

    @property
    def parameters(self) -> int:
        """Of all layers that are alike."""
        return self.m * self.k * self.count

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers that are alike, for one sample."""
        return self.parameters * self.positions


def resnet50() -> list[Layer]:
    """ResNet-50 at 224 x 224, the stride in the 3 x 3 convolution (torchvision's; "v1.5")."""
    found = [("stem", 64, 3 * 49, 112)]
    channels, size = 64, 56
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        for block in range(blocks):
            after = size // 2 if stage > 1 and block == 0 else size
            name = f"layer{stage}.{block}"
            found.append((f"{name}.conv1", width, channels, size))
            found.append((f"{name}.conv2", width, 9 * width, after))
            found.append((f"{name}.conv3", 4 * width, width, after))
            if block == 0:
                found.append((f"{name}.downsample", 4 * width, channels, after))
            channels, size = 4 * width, after
    layers = [Layer("resnet50", name, m, k, side * side) for name, m, k, side in found]
    return alike([*layers, Layer("resnet50", "fc", 1000, 2048, 1)])


def minilm(tokens: int = 128) -> list[Layer]:
    """MiniLM-L6-H384: six encoder layers, width 384, inner width 1536."""
    layers = []
    for block in range(6):
        for name, m, k in (
            ("query", 384, 384),
            ("key", 384, 384),
            ("value", 384, 384),
            ("attention.output", 384, 384),
            ("intermediate", 1536, 384),
            ("output", 384, 1536),
        ):
            layers.append(Layer("minilm", f"{block}.{name}", m, k, tokens))
    return alike(layers)


def squares() -> list[Layer]:
    """m = k = n from 256 to 8192; the batch does not matter."""
    return [Layer("square", str(size), size, size, size) for size in (256, 512, 1024, 2048, 4096, 8192)]


def alike(layers: list[Layer]) -> list[Layer]:
    """Layers of the same sizes as one, under the first one's name."""
    found: dict[tuple[int, int, int], Layer] = {}
    for layer in layers:
        key = (layer.m, layer.k, layer.positions)
        before = found.get(key)
        count = layer.count + (before.count if before is not None else 0)
        first = before or layer
        found[key] = Layer(first.network, first.name, *key, count)
    return list(found.values())


def products(batches: list[int]) -> list[tuple[Layer, int]]:
    """All layers with the n that each has, squares once."""
    found = [(layer, layer.positions) for layer in squares()]
    for batch in batches:
        found += [(layer, layer.positions * batch) for layer in (*resnet50(), *minilm())]
    return found

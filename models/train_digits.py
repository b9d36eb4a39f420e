"""Trains the two networks of this folder on scikit-learn's handwritten digits and exports them to ONNX.

    pip install torch onnx onnxscript onnxruntime scikit-learn
    python models/train_digits.py

Writes digits.onnx, digits_transformer.onnx, digits_test.npz and digits_calibration.npz beside this file, and prints the
accuracy of each exported file, run by ONNX Runtime, on the held-out images. One thread, fixed seeds: on the same
machine with the same versions the weights come out the same; elsewhere the last digits may differ. About two minutes on
one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT = 360  # the last fifth of the rows, in order: mostly writers that the training rows do not hold
CALIBRATION = 512  # of the images trained on, chosen at random: for statistics and repair
NOTE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository "
    "(doi 10.24432/C50P49), CC BY 4.0; from scikit-learn's copy"
)
OPSET = 18


class SqueezeExcite(nn.Module):
    """Channel attention: x * sigmoid(W2 relu(W1 mean(x))) (Hu et al., 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added again (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(y)))


class InvertedBlock(nn.Module):
    """1x1 expansion, 3x3 depthwise, squeeze-excite, 1x1 projection, shortcut (MBConv, arXiv:1801.04381, 1905.02244)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.attention = SqueezeExcite(hidden, hidden // 4)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.hardswish(self.bn1(self.expand(x)))
        y = functional.hardswish(self.bn2(self.depthwise(y)))
        return self.shortcut(x) + self.bn3(self.project(self.attention(y)))


class DigitsNet(nn.Module):
    """A residual CNN: images (N, 1, 8, 8) in 0..1 -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(24)
        self.block1 = BasicBlock(24)
        self.block2 = InvertedBlock(24, 96, 48, stride=2)
        self.block3 = InvertedBlock(48, 144, 48, stride=1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_bn(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean((2, 3)))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // self.heads), -1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class DigitsTransformer(nn.Module):
    """An encoder over the eight rows of an image, eight pixels each: (N, 1, 8, 8) in 0..1 -> logits (N, 10)."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 9, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads, 2 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.squeeze(1))
        tokens = torch.cat([self.class_token.expand(rows.shape[0], -1, -1), rows], 1) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens[:, 0]))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) float32 in 0..1 and labels (N,) int64: to train on, then held out."""
    bunch = load_digits()
    x = torch.from_numpy((bunch.images / 16).astype(np.float32)[:, None])
    y = torch.from_numpy(bunch.target.astype(np.int64))
    return x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel both ways, with some noise."""
    padded = functional.pad(x, (1, 1, 1, 1))
    dy, dx = torch.randint(0, 3, (2, len(x)), generator=generator)
    rows = (dy[:, None] + torch.arange(8))[:, :, None]
    columns = (dx[:, None] + torch.arange(8))[:, None, :]
    moved = padded[torch.arange(len(x))[:, None, None], 0, rows, columns][:, None]
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def train(network: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, seed: int) -> None:
    """AdamW, one cosine cycle, label smoothing .05, batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x), generator=generator)[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            loss = functional.cross_entropy(
                network(shifted(x[batch], generator)), y[batch], label_smoothing=0.05
            )
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch) / len(x)
        if epoch % 20 == 19:
            print(f"  epoch {epoch + 1:3d}  loss {total:.3f}", flush=True)
    network.eval()


def export_convolutional(network: nn.Module, path: Path) -> None:
    """By the TorchScript exporter, which keeps BatchNormalization and names nodes after modules."""
    torch.onnx.export(
        network,
        (torch.zeros(2, 1, 8, 8),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,  # eval mode as it is, but nothing folded into the convolutions
        dynamo=False,
    )


def export_transformer(network: nn.Module, path: Path) -> None:
    """By the torch.export exporter, which resolves the shape arithmetic."""
    torch.onnx.export(
        network,
        (torch.zeros(2, 1, 8, 8),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        external_data=False,
        dynamo=True,
    )


def tidy(path: Path, doc: str) -> None:
    """Drops the exporter's notes, which hold stack traces of whoever ran it, and checks the file."""
    model = onnx.load(path)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer)
    for item in (*model.graph.node, *values, model.graph, model):
        del item.metadata_props[:]
        item.doc_string = ""
    model.graph.name = path.stem
    model.doc_string = doc
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def accuracy(path: Path, x: Tensor, y: Tensor) -> float:
    """Share of images (0..1) that ONNX Runtime classifies rightly."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": x.numpy()})
    return float((logits.argmax(1) == y.numpy()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    x, y, x_test, y_test = digits()
    np.savez_compressed(
        folder / "digits_test.npz",
        image=(16 * x_test).numpy().astype(np.uint8),
        label=y_test.numpy().astype(np.uint8),
        note=f"{NOTE}; the last 360 rows, unchanged",
    )
    chosen = np.sort(np.random.default_rng(0).permutation(len(x))[:CALIBRATION])
    np.savez_compressed(folder / "digits_calibration.npz", image=x.numpy()[chosen], labels=y.numpy()[chosen])
    recipes = (
        ("digits", DigitsNet, export_convolutional, 60, 0.004),
        ("digits_transformer", DigitsTransformer, export_transformer, 150, 0.003),
    )
    for name, network_class, export, epochs, rate in recipes:
        torch.manual_seed(0)
        network = network_class()
        print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
        train(network, x, y, epochs, rate, seed=0)
        path = folder / f"{name}.onnx"
        export(network, path)
        tidy(path, f"{network_class.__name__}, trained on scikit-learn's digits by models/train_digits.py")
        share = accuracy(path, x_test, y_test)
        print(f"{name}: {share:.4f} of {len(y_test)} held-out images, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

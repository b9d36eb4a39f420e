"""Masked networks made small: `--dead` beside torch-pruning, which is told which channels to cut.

    python benchmarks/dead.py --out benchmarks/results

Needs graphprune, torch, torchvision, timm, onnxscript and torch-pruning 1.6.1 in one environment. Networks have random
weights, biases and BatchNorm statistics; half of the output channels of their inner layers (those outside residual
streams) are masked, and the network is exported by torch.onnx:

weights   `torch.nn.utils.prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)`: filters are zero, but biases
          and BatchNorm stay, so that masked channels hold constants
scales    the same channels, masked by hand at the BatchNorm's scale and bias (Network Slimming); where there is no
          BatchNorm, at weight and bias

The masked export is the reference. graphprune reads that file and nothing else; torch-pruning gets the unmasked torch
network, the layers and the channels. Both results are compared with the reference on the same random inputs in ONNX
Runtime: the largest difference of an output, relative to the greatest output. Writes dead.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch_pruning
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphprune.cost import macs, parameters
from graphprune.passes.remove_dead import DeadReport, remove_dead
from graphprune.pipeline import analyze_ir

AMOUNT = 0.5
#: Inner layers: what follows is a layer that reads them alone.
INNER: dict[str, Callable[[str, Any], bool]] = {
    "resnet18": lambda name, _: name.startswith("layer") and name.endswith("conv1"),
    "mobilenet_v2": lambda name, layer: (
        name.startswith("features") and layer.kernel_size == (1, 1) and layer.out_channels > layer.in_channels
        and name.count(".") == 4
    ),
    "deit_tiny_patch16_224": lambda name, _: name.endswith("mlp.fc1"),
    "resnet50": lambda name, _: name.startswith("layer") and name.endswith(("conv1", "conv2")),
    "vgg16_bn": lambda name, _: name.startswith("features"),
}  # fmt: skip


@dataclass
class Row:
    """One network, masked in one way."""

    network: str
    mask: str
    masked: int
    before: tuple[int, int]
    ours: tuple[int, int, float, float]
    theirs: tuple[int, int, float]
    report: DeadReport

    def cells(self) -> list[str]:
        ours, theirs = self.ours, self.theirs
        stayed = sum(s.count for s in self.report.stayed)
        return [
            self.network,
            self.mask,
            str(self.masked),
            f"{ours[0] / self.before[0]:.3f}",
            f"{theirs[0] / self.before[0]:.3f}",
            f"{ours[1] / self.before[1]:.3f}",
            f"{theirs[1] / self.before[1]:.3f}",
            f"{ours[2]:.1e}",
            f"{theirs[2]:.1e}",
            str(stayed),
            f"{ours[3]:.1f}",
        ]


HEADER = [
    "network", "masked", "channels masked", "parameters left", "torch-pruning", "MACs left", "torch-pruning",
    "worst difference", "torch-pruning", "constants that stay", "seconds",
]  # fmt: skip


def network_of(name: str) -> Any:
    """The network with the random weights of seed 0, in eval mode; nothing is alike, and nothing is zero."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if name.startswith("deit"):
        network = timm.create_model(name, pretrained=False).eval()
    else:
        network = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1)
    return network


def inner_layers(name: str, network: Any) -> Iterator[tuple[str, Any]]:
    for path, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and INNER[name](path, layer):
            yield path, layer


def norm_behind(network: Any, path: str) -> Any:
    """The BatchNorm that reads a layer: the module after it in its parent."""
    modules = dict(network.named_modules())
    parent, _, leaf = path.rpartition(".")
    if leaf.startswith("conv") and leaf[4:].isdigit():
        return modules.get(f"{parent}.bn{leaf[4:]}")
    after = modules.get(f"{parent}.{int(leaf) + 1}") if leaf.isdigit() else None
    return after if isinstance(after, torch.nn.BatchNorm2d) else None


def mask(name: str, network: Any, kind: str) -> dict[str, list[int]]:
    """Mask in place; the channels masked, by layer."""
    gone: dict[str, list[int]] = {}
    for path, layer in list(inner_layers(name, network)):
        prune.ln_structured(layer, "weight", amount=AMOUNT, n=2, dim=0)
        kept = layer.weight_mask.flatten(1)[:, 0].bool()
        gone[path] = torch.nonzero(~kept).flatten().tolist()
        if kind == "weights":
            prune.remove(layer, "weight")
            continue
        norm = norm_behind(network, path)
        holder = layer if norm is None else norm
        if norm is None:
            prune.remove(layer, "weight")
        else:  # the filters stay as they were
            layer.weight_mask.fill_(1)
            prune.remove(layer, "weight")
            prune.custom_from_mask(norm, "weight", kept)
            prune.remove(norm, "weight")
        prune.custom_from_mask(holder, "bias", kept)
        prune.remove(holder, "bias")
    return gone


def export(network: Any, path: Path) -> None:
    torch.onnx.export(network, (torch.randn(1, 3, 224, 224),), path, dynamo=False, opset_version=17)


def cut_by_torch_pruning(network: Any, gone: dict[str, list[int]]) -> Any:
    """The same layers and channels, with all that torch-pruning finds coupled to them."""
    network = copy.deepcopy(network)
    example = torch.randn(1, 3, 224, 224)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example)
    for path, channels in gone.items():
        layer = dict(network.named_modules())[path]
        linear = isinstance(layer, torch.nn.Linear)
        function = (
            torch_pruning.prune_linear_out_channels if linear else torch_pruning.prune_conv_out_channels
        )
        graph.get_pruning_group(layer, function, idxs=channels).prune()
    return network


def cost_of(model: ir.Model) -> tuple[int, int]:
    return parameters(model), macs(analyze_ir(model).analysis)


def outputs(path: Path, feeds: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [np.asarray(session.run(None, {name: each})[0]) for each in feeds]


def worst(expected: list[np.ndarray[Any, Any]], found: list[np.ndarray[Any, Any]]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True))


def trial(name: str, kind: str, folder: Path) -> Row:
    network = network_of(name)
    masked = copy.deepcopy(network)
    gone = mask(name, masked, kind)
    files = {key: folder / f"{key}.onnx" for key in ("masked", "ours", "theirs")}
    export(masked, files["masked"])
    export(cut_by_torch_pruning(network, gone), files["theirs"])
    model = ir.load(files["masked"])
    before = cost_of(ir.load(files["masked"]))
    start = time.perf_counter()
    report = remove_dead(model)
    seconds = time.perf_counter() - start
    ir.save(model, files["ours"])
    generator = np.random.default_rng(0)
    feeds = [generator.standard_normal((1, 3, 224, 224)).astype(np.float32) for _ in range(4)]
    expected = outputs(files["masked"], feeds)
    ours = (*cost_of(ir.load(files["ours"])), worst(expected, outputs(files["ours"], feeds)), seconds)
    theirs = (*cost_of(ir.load(files["theirs"])), worst(expected, outputs(files["theirs"], feeds)))
    return Row(name, kind, sum(map(len, gone.values())), before, ours, theirs, report)


def markdown(rows: list[Row]) -> str:
    lines = [
        "# Masked networks made small",
        "",
        "`python benchmarks/dead.py`. Parameters and MACs left are fractions of the masked network's. The worst"
        " difference is from the masked network, which graphprune must equal; torch-pruning does not claim to where"
        " masked channels hold constants. More than the masked channels goes where bounds prove a ReLU never positive"
        " (ReLU6 bounds what the depthwise convolutions of mobilenet_v2 read).",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
        *("| " + " | ".join(row.cells()) + " |" for row in rows),
        "",
        "What stays and why, for each network the most frequent reasons:",
        "",
    ]
    for row in rows:
        counts: dict[str, int] = {}
        for stayed in row.report.stayed:
            reason = stayed.reason.split("'")[0].strip()
            counts[reason] = counts.get(reason, 0) + stayed.count
        said = "; ".join(
            f"{count} ({reason} ...)" for reason, count in sorted(counts.items(), key=lambda i: -i[1])
        )
        lines.append(f"- {row.network}, {row.mask}: {said or 'nothing'}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(INNER), choices=list(INNER))
    parser.add_argument("--masks", nargs="+", default=["weights", "scales"], choices=["weights", "scales"])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    rows = []
    for name in options.networks:
        for kind in options.masks:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(trial(name, kind, Path(folder)))
            print(" | ".join(rows[-1].cells()), flush=True)
            (options.out / "dead.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

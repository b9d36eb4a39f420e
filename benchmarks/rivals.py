"""What other pruners do with the same networks, one whole process a call; run by speed.py in their own environments.

    python benchmarks/rivals.py export resnet50 resnet50.onnx
    python benchmarks/rivals.py torch-pruning resnet50 out.onnx --ratio 0.3 --round-to 8
    python benchmarks/rivals.py onnxsim in.onnx out.onnx --ratio 0.3

Prints one line of JSON with the seconds of each step, imports included. Nothing of graphprune is imported here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Seconds since the last lap, under the lap's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._start, 3)
        self._start = now


def _network(name: str) -> Any:
    """The torchvision network with the random weights of seed 0, in eval mode.

    Biases and statistics too are random: where they are all alike, as before training, the exporter makes one tensor of
    those of many layers, and a tool that rightly leaves shared tensors alone would prune nothing.
    """
    import torch
    import torchvision

    torch.manual_seed(0)
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


def _export(network: Any, path: Path) -> None:
    import torch

    # The TorchScript exporter: several times faster than the torch.export one, so the kinder choice for a rival.
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, 224, 224),),
        path,
        input_names=["image"],
        output_names=["logits"],
        opset_version=18,
        dynamo=False,
    )


def export(name: str, path: Path) -> Clock:
    """Writes the unpruned network: the file that the ONNX tools are given."""
    clock = Clock()
    _export(_network(name), path)
    clock.lap("export")
    return clock


def torch_pruning(name: str, path: Path, ratio: float, round_to: int) -> Clock:
    """Torch-Pruning's magnitude pruner, L2, the classifier's outputs kept: the recipe of its README."""
    clock = Clock()
    import torch
    import torch_pruning
    import torchvision  # noqa: F401  imported here so that its time counts as import

    clock.lap("import")
    network = _network(name)
    clock.lap("build")
    pruner = torch_pruning.pruner.MagnitudePruner(
        network,
        torch.zeros(1, 3, 224, 224),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=round_to or None,
        ignored_layers=[m for m in network.modules() if getattr(m, "out_features", None) == 1000],
    )
    clock.lap("trace")
    pruner.step()
    clock.lap("prune")
    _export(network, path)
    clock.lap("export")
    return clock


def onnxsim(source: Path, path: Path, ratio: float, *, native: bool) -> Clock:
    """onnxsim's structured pruning, the Python function or its C++ port."""
    clock = Clock()
    import onnx
    import onnxsim

    clock.lap("import")
    prune: Callable[..., Any] = (
        onnxsim.apply_structured_pruning_cpp if native else onnxsim.apply_structured_pruning
    )
    model = onnx.load(source)
    clock.lap("load")
    pruned = prune(model, sparsity=ratio)
    clock.lap("prune")
    onnx.save(pruned, path)
    clock.lap("save")
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=["export", "torch-pruning", "onnxsim", "onnxsim-cpp"])
    parser.add_argument("source", help="a torchvision network's name, or for onnxsim an .onnx file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--round-to", type=int, default=8, help="torch-pruning only; 0 for any width")
    options = parser.parse_args()
    if options.job == "export":
        clock = export(options.source, options.out)
    elif options.job == "torch-pruning":
        clock = torch_pruning(options.source, options.out, options.ratio, options.round_to)
    else:
        native = options.job == "onnxsim-cpp"
        clock = onnxsim(Path(options.source), options.out, options.ratio, native=native)
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()

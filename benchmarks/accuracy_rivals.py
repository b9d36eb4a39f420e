"""Other pruners on the networks of accuracy.py: a process that answers, run in the rivals' own environments.

    python benchmarks/accuracy_rivals.py torch-pruning resnet56.onnx calibration.npz --score taylor
    python benchmarks/accuracy_rivals.py onnxsim resnet56.onnx calibration.npz --score wanda

One line of JSON to begin with, ``{"ready": true}`` or ``{"error": reason}``; then for each line ``{"ratio": 0.3, "out":
"pruned.onnx"}`` that comes in, one line ``{"cpu_seconds": 1.2}`` or ``{"error": reason}`` goes out, and the pruned
network lies in the file. So the caller finds the ratio that reaches a budget without a start of PyTorch for every
trial. Nothing of graphprune is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Prunes at a ratio and writes the result.
Pruner = Callable[[float, Path], None]

#: Largest difference of logits between the network in PyTorch and the ONNX file that its weights are from.
AGREEMENT = 1e-4


def cifar_resnet(weights: dict[str, Any]) -> Any:
    """The CIFAR-10 ResNet of He et al. (2016), section 4.2, in PyTorch: 6n + 2 layers, option A shortcuts.

    Parameters
    ----------
    weights
        Initializers by name (``layer1.0.conv1.weight``); how many blocks there are is read from them.

    Returns
    -------
    torch.nn.Module
        In eval mode; N x 3 x 32 x 32 -> N x 10.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.added = width - inputs

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            if self.added:
                half = self.added // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
            return functional.relu(x + y)

    class ResNet(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            widths = [16] + [width for width in (16, 32, 64) for _ in range(blocks)]
            made = [Block(a, b, b // a) for a, b in itertools.pairwise(widths)]
            self.layer1 = nn.Sequential(*made[:blocks])
            self.layer2 = nn.Sequential(*made[blocks : 2 * blocks])
            self.layer3 = nn.Sequential(*made[2 * blocks :])
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean((2, 3)))

    blocks = 1 + max(int(match[1]) for name in weights if (match := re.match(r"layer1\.(\d+)\.", name)))
    network = ResNet(blocks)
    state = {name: torch.from_numpy(weights[name].copy()) for name in network.state_dict() if name in weights}
    missing = network.load_state_dict(state, strict=False).missing_keys
    if left := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise ValueError(f"the .onnx file holds no {', '.join(left)}")
    return network.eval()


def torch_pruning(source: Path, images: Any, score: str, reach: str) -> Pruner:
    """Torch-Pruning's own recipe, on the convolutions inside the blocks.

    The residual streams are left whole: Torch-Pruning does not see that the padding of option A moves channels, and
    fails with an IndexError where it is let.

    Parameters
    ----------
    source
        A CIFAR ResNet as .onnx, for its weights.
    images
        float32 N x 3 x 32 x 32. For ``taylor`` they give the gradients of the cross-entropy with the network's own
        predictions: nothing here sees labels.
    score
        ``magnitude`` (L2) or ``taylor``.
    reach
        ``uniform`` or ``global`` (one threshold over all layers).

    Raises
    ------
    ValueError
        where PyTorch and ONNX Runtime disagree on the unpruned network.
    """
    import onnx
    import onnxruntime
    import torch
    import torch_pruning as tp

    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    original = cifar_resnet(weights)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: images[:64]})
    with torch.no_grad():
        difference = float(abs(original(torch.from_numpy(images[:64])).numpy() - expected).max())
    if not difference <= AGREEMENT:
        raise ValueError(f"PyTorch and ONNX Runtime differ by {difference:.2g} on the unpruned network")
    # What writes to the streams: pruned together with the shortcuts, if at all.
    streams = [n for n, _ in original.named_modules() if n in ("conv1", "linear") or n.endswith(".conv2")]
    if score == "taylor":
        for start in range(0, len(images), 128):
            batch = torch.from_numpy(images[start : start + 128])
            with torch.no_grad():
                predicted = original(batch).argmax(1)
            torch.nn.functional.cross_entropy(original(batch), predicted, reduction="sum").backward()

    def prune(ratio: float, out: Path) -> None:
        network = copy.deepcopy(original)
        for mine, theirs in zip(network.parameters(), original.parameters(), strict=True):
            mine.grad = theirs.grad  # deepcopy leaves gradients behind
        criteria = {"magnitude": tp.importance.MagnitudeImportance, "taylor": tp.importance.TaylorImportance}
        pruner = tp.pruner.BasePruner(
            network,
            torch.zeros(1, 3, 32, 32),
            importance=criteria[score](),
            global_pruning=reach == "global",
            pruning_ratio=ratio,
            ignored_layers=[m for n, m in network.named_modules() if n in streams],
        )
        pruner.step()
        network.zero_grad()
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, 32, 32),),
            out,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )

    return prune


def onnxsim(source: Path, feeds: dict[str, Any], score: str, reach: str) -> Pruner:
    """onnxsim's structured pruning.

    The model goes through ``onnxsim.simplify`` first: its pruning expects BatchNormalization to be in the convolutions.

    Parameters
    ----------
    source
        The unpruned .onnx file.
    feeds
        Calibration inputs by name, samples along axis 0.
    score
        ``magnitude`` (``apply_structured_pruning``) or ``wanda`` (``apply_structured_wanda_pruning``).
    reach
        ``uniform`` or ``global`` (their ``global_sparsity``).
    """
    import onnx
    import onnxsim as tool

    simplified, _ = tool.simplify(onnx.load(source))
    samples = len(next(iter(feeds.values())))
    batches = [
        {n: array[start : start + 64] for n, array in feeds.items()} for start in range(0, samples, 64)
    ]

    def prune(ratio: float, out: Path) -> None:
        options = {"sparsity": ratio, "global_sparsity": reach == "global"}
        model = copy.deepcopy(simplified)
        if score == "wanda":
            pruned = tool.apply_structured_wanda_pruning(model, calibration_data=batches, **options)
        else:
            pruned = tool.apply_structured_pruning(model, **options)
        onnx.save(pruned, out)

    return prune


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=["torch-pruning", "onnxsim"])
    parser.add_argument("source", type=Path)
    parser.add_argument("calibration", type=Path, help=".npz of inputs by name")
    parser.add_argument("--score", default="magnitude", choices=["magnitude", "taylor", "wanda"])
    parser.add_argument("--reach", default="uniform", choices=["uniform", "global"])
    options = parser.parse_args()
    answers = sys.stdout

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    import numpy as np

    prune: Pruner
    # What the tools print must not come between the answers.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            with np.load(options.calibration) as archive:
                feeds = {name: archive[name] for name in archive.files}
            if options.tool == "onnxsim":
                prune = onnxsim(options.source, feeds, options.score, options.reach)
            else:
                images = next(iter(feeds.values()))
                prune = torch_pruning(options.source, images, options.score, options.reach)
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
            return
        answer(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            start = time.process_time()
            try:
                prune(request["ratio"], Path(request["out"]))
            except Exception as error:
                answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            answer(cpu_seconds=round(time.process_time() - start, 3))


if __name__ == "__main__":
    main()

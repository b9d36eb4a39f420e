"""Export the corpus: several hundred ONNX files of known architectures with random weights.

    python benchmarks/corpus_export.py FOLDER [--only GLOB] [--limit N] [--retry]

Needs torch, torchvision, timm, transformers and onnxscript.  Every export runs in a forked child with a time and a
memory limit; what is there already is skipped, so an interrupted run goes on where it stopped.  Beside each
``name.onnx`` lies ``name.json`` with how it was made (`describe`); ``failures.json`` holds the reasons of what could
not be exported.

Random weights hide nothing: every parameter that its initialisation leaves constant (zero heads, 1e-6 LayerScale, unit
norms, zero biases) is drawn anew, BatchNorm statistics are random, and each linear layer is scaled in one forward run
so that its outputs have unit variance, which keeps the signal alive through any depth (the data-dependent
initialisation of Mishkin and Matas, "All you need is a good init", 2016).
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.corpus_networks import Network, hand_networks, timm_networks, torchvision_networks
from benchmarks.corpus_transformers import transformers_networks

SECONDS = 180
MEMORY = 9 * 2**30
BYTES = 130 * 2**20
#: From this network on only one exporter is taken, each in turn: the first ones suffice to compare the two.
BOTH_UNTIL = 60
OPSETS = {"script": 17, "dynamo": 18}


#: A diverse first part, so that an export that is cut short is still of use.
FIRST = (
    "resnet18",
    "densenet121",
    "bert",
    "deit_tiny_patch16_224",
    "mobilenet_v2",
    "gru",
    "gpt2",
    "shufflenet_v2_x1_0",
    "swin_tiny_patch4_window7_224",
    "llama",
    "convnext_atto",
    "efficientnet_b0",
    "t5_encoder",
    "resnet50",
    "ghostnet_100",
    "res2net50_26w_4s",
    "albert",
    "resnest14d",
    "mobilevit_xxs",
    "levit_128s",
    "regnet_y_400mf",
    "lstm_bidirectional",
    "unet",
    "whisper_encoder",
)


class UnsuitableError(Exception):
    """The file would be of no use: too large, not finite, or its output does not depend on the input."""


def all_networks() -> list[Network]:
    """Every network: those of `FIRST`, then the others taken in turn from the four sources."""
    sources = [timm_networks(), torchvision_networks(), transformers_networks(), hand_networks()]
    by_name = {n.name: n for networks in sources for n in networks}
    ordered = [by_name[name] for name in FIRST]
    rest = [[n for n in networks if n.name not in FIRST] for networks in sources]
    while any(rest):
        for queue in rest:
            ordered.extend(queue[:1])
            del queue[:1]
    return ordered


def jobs(networks: list[Network]) -> list[tuple[str, Network, str, bool]]:
    """(file stem, network, exporter, dynamic) of every file, in the order of export."""
    found = []
    for i, network in enumerate(networks):
        exporters = network.exporters
        if i >= BOTH_UNTIL and len(exporters) > 1:
            exporters = (exporters[i % len(exporters)],)
        for exporter in exporters:
            stem = f"{network.source}-{network.name}-{exporter}"
            found.append((stem, network, exporter, False))
            if network.dynamic:
                found.append((stem + "-dyn", network, exporter, True))
    return found


def randomise(model: Any, seed: int) -> None:
    """Give every constant parameter and every running statistic random values of a sensible scale, in place."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Any, low: float, high: float) -> Any:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) * (high - low) + low

    def normal(like: Any, scale: float) -> Any:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype) * scale

    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.is_floating_point() or value.numel() < 2:
                continue
            leaf = name.rsplit(".", 1)[-1].lower()
            low, high = value.min().item(), value.max().item()
            constant = high - low < 1e-6
            if constant and value.squeeze().ndim >= 2:
                # A weight that starts at zero, or a LayerScale or temperature of shape (1, C, 1, 1), squeezed above.
                value.copy_(normal(value, value[0].numel() ** -0.5))
            elif constant and high > 0.5:
                value.copy_(uniform(value, 0.5, 1.5))
            elif constant and high != 0.0:
                value.copy_(uniform(value, 0.2, 0.6))
            elif constant:
                value.copy_(
                    normal(value, 0.2) if "bias" in leaf or "beta" in leaf else uniform(value, 0.2, 0.6)
                )
        for module in model.modules():
            if getattr(module, "running_mean", None) is None:
                continue
            module.running_mean.copy_(normal(module.running_mean, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
            if module.weight is not None:
                # Even where they were random: gains of .1 under such statistics end the signal after a few layers.
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))


def settle(model: Any, inputs: tuple[Any, ...]) -> None:
    """Scale each convolution and linear layer so that its output has unit standard deviation on `inputs`, in place."""
    import torch
    from torch import nn

    plain = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear}
    seen: set[int] = set()

    def scale(module: Any, _: Any, output: Any) -> Any:
        if (
            id(module.weight) in seen
            or not isinstance(output, torch.Tensor)
            or not output.is_floating_point()
        ):
            return output
        seen.add(id(module.weight))
        deviation = output.std().item()
        if not 1e-8 < deviation < 1e8 or 0.5 < deviation < 1.5:
            return output
        for value in (module.weight, module.bias):
            if value is not None:
                value.div_(deviation)
        return output / deviation

    handles = [m.register_forward_hook(scale) for m in model.modules() if type(m) in plain]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()


def random_inputs(network: Network, seed: int, sizes: dict[str, int] | None = None) -> tuple[Any, ...]:
    """Seeded inputs of `network`, with the open axes at `sizes`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    values = []
    for name, shape, bound in network.inputs:
        axes = {**(network.dynamic.get(name) or {})} if sizes else {}
        shape = tuple(sizes[axes[i]] if sizes and i in axes else n for i, n in enumerate(shape))
        if bound:
            values.append(torch.randint(2, bound, shape, generator=generator))
        else:
            values.append(torch.randn(shape, generator=generator))
    return tuple(values)


def export(network: Network, exporter: str, dynamic: bool, target: Path) -> dict[str, Any]:
    """Build, randomise and export one network to `target`; return its description."""
    import torch

    torch.manual_seed(0)
    # The fused kernels of nn.MultiheadAttention and nn.TransformerEncoder have no ONNX form.
    torch.backends.mha.set_fastpath_enabled(False)
    model = network.build().eval()
    for value in model.parameters():
        value.requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > BYTES:
        raise UnsuitableError(f"{size / 2**20:.0f} MB of weights")
    randomise(model, 1)
    inputs = random_inputs(network, 2)
    settle(model, inputs)
    _assert_alive(model, inputs, random_inputs(network, 3))
    names = [i[0] for i in network.inputs]
    options: dict[str, Any] = {
        "input_names": names,
        "dynamo": exporter == "dynamo",
        "verbose": False,
        "opset_version": OPSETS[exporter],
    }
    if exporter == "dynamo":
        options["external_data"] = False
    if dynamic:
        if exporter == "dynamo":
            axes = [dict.fromkeys(network.dynamic.get(n, {}), torch.export.Dim.DYNAMIC) for n in names]
            variadic = _is_variadic(model)
            options["dynamic_shapes"] = (tuple(axes),) if variadic else tuple(axes)
        else:
            options["dynamic_axes"] = {n: dict(axes) for n, axes in network.dynamic.items()}
    with torch.no_grad():
        torch.onnx.export(model, inputs, str(target), **options)
    return describe(network, exporter, dynamic)


def _is_variadic(model: Any) -> bool:
    from benchmarks.corpus_modules import Applied

    return isinstance(model, Applied)


def _assert_alive(model: Any, inputs: tuple[Any, ...], others: tuple[Any, ...]) -> None:
    """Raise `UnsuitableError` unless every output is finite and moves with the input."""
    import torch

    with torch.no_grad():
        first, second = model(*inputs), model(*others)
    for a, b in zip(_tensors(first), _tensors(second), strict=True):
        if not a.is_floating_point():
            continue
        if not torch.isfinite(a).all():
            raise UnsuitableError("an output is not finite")
        if (a - b).abs().max() < 1e-4 * a.abs().max() or a.abs().max() > 1e4:
            raise UnsuitableError(
                f"an output does not move with the input, or explodes (largest {a.abs().max().item():.3g})"
            )


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []


def describe(network: Network, exporter: str, dynamic: bool) -> dict[str, Any]:
    """How a file was made, as plain values; `sizes` holds the input shapes to check a ``-dyn`` file at."""
    shapes = []
    for sizes in network.sizes if dynamic else ():
        axes = network.dynamic
        shapes.append(
            {
                n: [sizes[axes[n][i]] if i in axes.get(n, {}) else d for i, d in enumerate(shape)]
                for n, shape, _ in network.inputs
            }
        )
    versions = {
        m: importlib.import_module(m).__version__
        for m in ("torch", "torchvision", "timm", "transformers", "onnxscript")
    }
    return {
        "network": network.name,
        "source": network.source,
        "kind": network.kind,
        "exporter": exporter,
        "opset": OPSETS[exporter],
        "dynamic": dynamic,
        "inputs": {n: {"shape": list(shape), "integers_below": bound} for n, shape, bound in network.inputs},
        "sizes": shapes,
        "versions": {**versions, "python": platform.python_version()},
    }


# ------------------------------------------------------------------------------------------------- child processes
def _child(job: tuple[str, Network, str, bool], folder: Path, started: float) -> int:
    stem, network, exporter, dynamic = job
    part, note = folder / f".{stem}.onnx", folder / f".{stem}.json"
    reason = ""
    with (
        Path(os.devnull).open("w") as void,
        contextlib.redirect_stdout(void),
        contextlib.redirect_stderr(void),
    ):
        warnings.simplefilter("ignore")
        try:
            description = export(network, exporter, dynamic, part)
            if part.stat().st_size > BYTES:
                raise UnsuitableError(f"{part.stat().st_size / 2**20:.0f} MB")
            description["seconds"] = round(time.time() - started, 1)
            note.write_text(json.dumps(description, indent=1))
            part.rename(folder / f"{stem}.onnx")
            note.rename(folder / f"{stem}.json")
        except BaseException as error:  # a child reports whatever ended it
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            reason = f"{type(error).__name__}: {lines[0][:200]}"
            (folder / f".{stem}.trace").write_text(traceback.format_exc()[-6000:])
            part.unlink(missing_ok=True)
    if reason:
        (folder / f".{stem}.reason").write_text(reason)
    return 1 if reason else 0


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def run_job(job: tuple[str, Network, str, bool], folder: Path) -> str:
    """Export one file in a forked child; return the reason of failure, or an empty string."""
    started = time.time()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _child(job, folder, started)
        finally:
            os._exit(code)
    stopped = ""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if not stopped:
            stopped = (
                "more than 9 GB"
                if _resident(pid) > MEMORY
                else f"more than {SECONDS} s"
                if time.time() - started > SECONDS
                else ""
            )
            if stopped:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    reason_file = folder / f".{job[0]}.reason"
    if status == 0:
        return ""
    for left in folder.glob(f".{job[0]}.onnx*"):
        left.unlink()
    if reason_file.exists():
        reason = reason_file.read_text()
        reason_file.unlink()
        return reason
    return stopped or f"ended with status {status}"


def main() -> int:
    """Export what is missing; end 0 when the folder holds at least one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", help="glob on file stems")
    parser.add_argument("--limit", type=int, default=10**6, help="stop after so many exports")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "failures.json"
    failures: dict[str, str] = json.loads(ledger.read_text()) if ledger.exists() else {}
    todo = [
        job
        for job in jobs(all_networks())
        if fnmatch.fnmatch(job[0], arguments.only)
        and not (folder / f"{job[0]}.json").exists()
        and (arguments.retry or job[0] not in failures)
    ][: arguments.limit]
    print(f"{len(todo)} files to export", flush=True)
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    for name in ("torchvision", "timm", "transformers", "onnxscript"):
        importlib.import_module(name)
    for i, job in enumerate(todo):
        began = time.time()
        reason = run_job(job, folder)
        failures.pop(job[0], None)
        if reason:
            failures[job[0]] = reason
        ledger.write_text(json.dumps(failures, indent=1, sort_keys=True))
        print(f"{i + 1}/{len(todo)} {job[0]} {time.time() - began:.0f} s {reason or 'ok'}", flush=True)
    made = len(list(folder.glob("*.onnx")))
    print(f"{made} files in {folder}, {len(failures)} failures (failures.json)")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())

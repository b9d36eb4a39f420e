"""Times products with 2:4 weights against dense ones in PyTorch; gpu.py runs this as a process of its own.

    python gpu_products.py QUESTION.json ANSWERS.jsonl

Question: {"products": [{"m", "k", "n", "dtype"}, ...], "graph" (capture the launches), "rounds", "seed"}.
Answers, a line for each product as soon as it is done: {"dense_us", "sparse_us" (of each round), "error", "kernel"} or
{"reason"}. It needs PyTorch with CUDA and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Milliseconds that one timed stretch of launches is to take, so that events are fine enough; and how many at most.
STRETCH, MOST = 2.0, 200


def halve(torch: Any, weight: Any) -> Any:
    """The weight [m, k] with the two smallest of every four along k zero."""
    groups = weight.reshape(weight.shape[0], -1, 4)
    kept = groups.abs().topk(2, dim=-1).indices
    mask = torch.zeros_like(groups).scatter_(-1, kept, 1)
    return (groups * mask).reshape(weight.shape)


def milliseconds(torch: Any, run: Callable[[], None]) -> float:
    """By the device's events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def stretch(torch: Any, call: Callable[[], Any], *, graph: bool) -> tuple[Callable[[], None], int]:
    """Something that makes a number of calls, and that number."""

    def launches(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                call()

        return run

    launches(10)()  # libraries choose and load their kernels
    each = milliseconds(torch, launches(10)) / 10
    count = min(max(int(STRETCH / max(each, 1e-3)), 1), MOST)
    if not graph:
        return launches(count), count
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launches(3)()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        launches(count)()
    return captured.replay, count


def fastest_kernel(torch: Any, sparse: Any, activations: Any) -> str:
    """Let cuSPARSELt look for its fastest kernel, as TensorRT would; what was found."""
    try:
        number = int(torch._cslt_sparse_mm_search(sparse.packed, activations.t()))
        sparse.alg_id_cusparselt = number
    except (AttributeError, RuntimeError, TypeError):
        return "default"
    return f"searched ({number})"


def measure(torch: Any, product: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
    """One product, both ways."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    kind = getattr(torch, product["dtype"])
    generator = torch.Generator("cuda").manual_seed(question["seed"])
    m, k, n = product["m"], product["k"], product["n"]
    if k % 4:
        return {"reason": f"4 does not divide k = {k}"}
    weight = torch.randn(m, k, generator=generator, device="cuda")
    weight = halve(torch, weight / k**0.5).to(kind)
    x = torch.randn(n, k, generator=generator, device="cuda").to(kind)
    linear = torch.nn.functional.linear
    with torch.inference_mode():
        sparse = to_sparse_semi_structured(weight)
        kernel = fastest_kernel(torch, sparse, x)
        expected, found = linear(x, weight), linear(x, sparse)
        error = float((expected.float() - found.float()).abs().max() / expected.float().abs().max())
        del expected, found
        graph = question["graph"]
        dense_run, dense_count = stretch(torch, lambda: linear(x, weight), graph=graph)
        sparse_run, sparse_count = stretch(torch, lambda: linear(x, sparse), graph=graph)
        dense: list[float] = []
        thin: list[float] = []
        for turn in range(question["rounds"] + 1):
            timed = [(dense, dense_run, dense_count), (thin, sparse_run, sparse_count)]
            for times, run, count in timed if turn % 2 else timed[::-1]:
                each = milliseconds(torch, run) / count * 1000
                if turn:  # the first round warms up
                    times.append(each)
    return {"dense_us": dense, "sparse_us": thin, "error": error, "kernel": kernel}


def main(question: str, answers: str) -> None:
    """Answer one product after another."""
    import torch

    asked = json.loads(Path(question).read_text())
    with Path(answers).open("a") as file:
        for product in asked["products"]:
            try:
                result = measure(torch, product, asked)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                result = {"reason": " ".join(str(error).split())[:200] or type(error).__name__}
            file.write(json.dumps(result) + "\n")
            file.flush()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])

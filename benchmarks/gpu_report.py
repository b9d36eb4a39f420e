"""gpu.py's results as Markdown. Only the standard library is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NEVER = (
    "No machine with an NVIDIA GPU could be had so far, so nothing was measured: the tables are empty. Whoever has one"
    " fills them with the command above."
)
PRODUCTS = (
    "layer",
    "count",
    "m x k x n",
    "type",
    "dense µs",
    "2:4 µs",
    "dense / 2:4",
    "",
    "error",
    "timed by",
    "kernel",
)
TOTALS = ("network", "batch", "type", "products", "dense µs", "2:4 µs", "dense / 2:4", "not taken")
NETWORKS = (
    "network",
    "runtime",
    "model",
    "types",
    "median ms",
    "against the original",
    "against the one before",
    "",
)
FOUND = ("what", "state", "version", "why not")


def markdown(document: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = ["# On a GPU: 2:4 against dense", f"    {document['command']}"]
    if not document["products"] and not document["networks"]:
        parts.append(NEVER)
    if document["machine"]:
        parts.append("; ".join(f"{name}: {value}" for name, value in document["machine"].items()))
    if document["versions"]:
        parts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in document["versions"].items()))
    if document["found"]:
        parts += ["## What is there", table(FOUND, found_rows(document["found"]))]
    parts += [
        "## Products",
        "A weight [m, k] that is 2:4 along k, against the same weight kept dense, times activations [k, n], in PyTorch"
        " (cuSPARSELt). Medians of runs in turn, timed by the device's events: of a CUDA graph of many products, or,"
        " where that cannot be captured, of many launches, whose cost on the host then counts. Below 3 % there is no"
        " difference. The error is the largest, as a fraction of the largest result.",
        "### Whole networks: the sums of their products",
        table(TOTALS, total_rows(document["products"])),
    ]
    for network in ("square", "resnet50", "minilm"):
        rows = [row for row in document["products"] if row["network"] == network]
        parts += [f"### {network}", table(PRODUCTS, map(product_row, rows))]
    parts += [
        "## ONNX networks, end to end",
        "The original, the pruned network, and the pruned network with 2:4 weights, all in the same low precision, run"
        " in turn with the same inputs, which lie on the device; medians by the device's events.",
        table(NETWORKS, map(network_row, document["networks"])),
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; one row of dashes where there are none.

    >>> print(table(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows] or [["–"] * len(columns)]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(
        "|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines
    )


def found_rows(found: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What was looked for."""
    return [(entry["name"], entry["state"], entry["version"] or "", entry["reason"] or "") for entry in found]


def product_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One product; why it was not taken where it was not."""
    head = (row["layer"], str(row["count"]), f"{row['m']} x {row['k']} x {row['n']}", row["dtype"])
    if row["reason"] is not None:
        return (*head, "", "", "", row["reason"], "", "", "")
    return (
        *head,
        f"{row['dense_us']:.1f}",
        f"{row['sparse_us']:.1f}",
        f"{row['dense_us'] / row['sparse_us']:.2f}",
        row["said"],
        f"{row['error']:.1e}",
        row["timed_by"],
        row["kernel"],
    )


def total_rows(products: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The sums over a network's products that were timed both ways."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in products:
        if row["network"] != "square":
            groups.setdefault((row["network"], row["batch"], row["dtype"]), []).append(row)
    rows: list[tuple[str, ...]] = []
    for (network, batch, dtype), group in groups.items():
        timed = [row for row in group if row["reason"] is None]
        left = sum(row["count"] for row in group) - sum(row["count"] for row in timed)
        dense = sum(row["count"] * row["dense_us"] for row in timed)
        sparse = sum(row["count"] * row["sparse_us"] for row in timed)
        ratio = f"{dense / sparse:.2f}" if timed else ""
        rows.append(
            (
                network,
                str(batch),
                dtype,
                str(sum(row["count"] for row in timed)),
                f"{dense:.1f}" if timed else "",
                f"{sparse:.1f}" if timed else "",
                ratio,
                str(left),
            )
        )
    return rows


def network_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One model through one runtime."""
    head = (row["network"], row["runtime"], row["model"], ", ".join(row["types"]))
    if row["reason"] is not None:
        return (*head, "", "", "", row["reason"])
    return (
        *head,
        f"{row['milliseconds']:.4f}",
        row["against_first"] or "",
        row["against_previous"] or "",
        row["note"] or "",
    )

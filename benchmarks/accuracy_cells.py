"""Cells of the table of accuracy.py: which there are, the networks they are measured on, and where results are kept."""

from __future__ import annotations

import fnmatch
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphprune
from benchmarks import accuracy_report
from benchmarks.accuracy_data import TASKS, Task
from benchmarks.speed import run
from graphprune.cost import macs, parameters

HERE = Path(__file__).resolve().parent
#: What is measured of one method on one network at one share of the MACs.
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One method on one network at one share of the MACs."""

    network: str
    tool: str
    score: str
    scope: str
    repair: bool
    macs: float

    @property
    def key(self) -> str:
        repair = "repair" if self.repair else "plain"
        return "/".join((self.network, self.tool, self.score, self.scope, repair, f"{self.macs:g}"))


@dataclass
class Settings:
    """Where things are and how much is measured."""

    data: Path
    folder: Path
    out: Path
    zoo_python: str | None
    onnxsim_python: str | None
    ocr_python: str | None
    samples: int | None
    threads: int
    seed: int
    only: str
    resume: bool
    retry: bool


class Tasks:
    """Tasks by name, loaded once; what has to be exported is exported once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: dict[str, Task] = {}
        self._macs: dict[str, int] = {}

    def export(self, job: str, file: str) -> Path:
        """A file of accuracy_export.py, by the interpreter that holds what it needs."""
        settings = self._settings
        path = settings.folder / file
        if not path.exists():
            python = settings.ocr_python if job == "ppocr" else settings.zoo_python
            if python is None:
                option = "--ocr-python" if job == "ppocr" else "--zoo-python"
                raise ValueError(f"{file} is exported with {option}")
            command = [python, str(HERE / "accuracy_export.py"), job, str(settings.folder)]
            run([*command, "--data", str(settings.data.resolve())], settings.folder)
        return path

    def __getitem__(self, name: str) -> Task:
        if name not in self._loaded:
            settings = self._settings
            load, job = TASKS[name]
            if job is not None:
                self.export(job, f"{name}.onnx")
            folder = settings.data if job is None else settings.folder
            self._loaded[name] = load(name, folder, settings.samples, settings.threads, settings.seed)
        return self._loaded[name]

    def macs(self, task: Task, path: Path) -> int:
        """Multiply-accumulates of one sample, by graphprune's count, whoever pruned."""
        return macs(graphprune.analyze(str(path), input_shapes=task.input_shapes).analysis)

    def share(self, task: Task, path: Path) -> float:
        """MACs of a pruned file over those of the task's network."""
        if task.name not in self._macs:
            self._macs[task.name] = self.macs(task, task.source)
        return self.macs(task, path) / self._macs[task.name]


def judged(tasks: Tasks, task: Task, path: Path) -> Result:
    """What is measured of a pruned file: shares of MACs and parameters, and the metric."""
    import onnx_ir as ir

    start = time.perf_counter()
    kept = parameters(ir.load(path)) / parameters(ir.load(task.source))
    found = {"macs_kept": tasks.share(task, path), "parameters_kept": kept, "metric": task.accuracy(path)}
    return found | {"samples": task.samples, "evaluation_seconds": round(time.perf_counter() - start, 1)}


class Ledger:
    """The results, on disk after every cell; two processes may fill one file."""

    def __init__(self, settings: Settings, facts: dict[str, str]) -> None:
        self._path = settings.out / "accuracy.json"
        self._settings = settings
        self._facts = facts
        self._cells = self._read()

    def _read(self) -> dict[str, Result]:
        cells: dict[str, Result] = json.loads(self._path.read_text())["cells"] if self._path.exists() else {}
        return cells

    def wants(self, key: str) -> bool:
        """Whether a cell is asked for and not there yet."""
        return self.asked_for(key) and self.lacks(key)

    def asked_for(self, key: str) -> bool:
        """Whether ``--only`` takes a cell."""
        return fnmatch.fnmatch(key, self._settings.only)

    def lacks(self, key: str) -> bool:
        """Whether a cell is not there yet, or is to be measured anew."""
        cell = self._cells.get(key)
        return not (
            self._settings.resume and cell is not None and not (self._settings.retry and "error" in cell)
        )

    @contextmanager
    def cell(self, key: str) -> Iterator[Result]:
        """Takes what is put into the mapping; an exception becomes the cell's ``error``."""
        found: Result = {}
        start = time.perf_counter()
        try:
            yield found
        except Exception as error:
            found["error"] = (str(error) or type(error).__name__).splitlines()[0]
            if not isinstance(error, RuntimeError | graphprune.GraphPruneError):
                traceback.print_exc()
        metric = f"{found['metric']:.4f}" if "metric" in found else found.get("error", "measured")
        print(f"{key}: {metric} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        self._cells = {**self._read(), key: found}
        self.write()

    def write(self) -> None:
        """The table and the data it is made of; each file is whole at any time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        results = {"facts": self._facts, "cells": self._cells}
        text = json.dumps(results, indent=1) + "\n"
        for path, content in (
            (self._path, text),
            (self._path.with_suffix(".md"), accuracy_report.markdown(results)),
        ):
            part = path.with_name(f".{path.name}")
            part.write_text(content)
            part.replace(path)


def baselines(ledger: Ledger, tasks: Tasks, networks: list[str]) -> None:
    """The unpruned networks."""
    for name in networks:
        key = f"{name}/unpruned"
        if ledger.lacks(key):
            with ledger.cell(key) as found:
                task = tasks[name]
                found |= {"metric": task.accuracy(task.source), "macs": tasks.macs(task, task.source)}
                found |= {"samples": task.samples, "name": task.metric}

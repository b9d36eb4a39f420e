"""Settings for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.command import Cli

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before NumPy is imported: each worker has a core of its own, and threads of several would wait for each other.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the command is run; test files put their own models there."""
    return tmp_path


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in ``folder``, in this process."""
    from graphprune.cli import main
    from tests.command import Result

    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return run

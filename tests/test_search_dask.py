"""Trials of ``--max-drop`` on a Dask cluster: any executor will do, this one is the cluster's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

import graphprune

MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=False,
            dashboard_address=None,
            local_directory=str(tmp_path),
        ) as cluster,
        Client(cluster) as made,
    ):
        yield made


def test_trials_run_on_a_cluster(client: Any) -> None:
    with np.load(MODELS / "digits_calibration.npz") as data:
        calibration = {"image": data["image"][:128], "labels": data["labels"][:128]}
    with client.get_executor() as executor:
        _, spread = graphprune.prune(
            MODELS / "digits.onnx", max_drop=0.2, calibration=calibration, executor=executor, jobs=2
        )
    _, alone = graphprune.prune(MODELS / "digits.onnx", max_drop=0.2, calibration=calibration)
    assert spread.macs_after < 0.9 * spread.macs_before
    # Both find the largest cut within the drop; they try other fractions on the way.
    assert abs(spread.macs_after - alone.macs_after) < 0.15 * alone.macs_before

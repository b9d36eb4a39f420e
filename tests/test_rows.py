"""Rows behave as one array would, however they lie in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.calibration import memory
from graphprune.calibration.rows import ArrayPiece, FilePiece, Rows
from graphprune.errors import OptionError


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    first=st.lists(st.integers(0, 10**6), max_size=12),
    second=st.lists(st.integers(0, 10**6), max_size=12),
    start=st.integers(0, 14),
    stop=st.integers(0, 14),
)
def test_as_one_array(sizes: list[int], first: list[int], second: list[int], start: int, stop: int) -> None:
    """Picking twice and slicing, empty pieces and repetitions included."""
    whole = np.arange(2 * sum(sizes), dtype=np.int32).reshape(-1, 2)
    rows = Rows([ArrayPiece(piece) for piece in np.split(whole, np.cumsum(sizes)[:-1])])
    for choice in (first, second):
        index = np.array(choice, np.intp) % max(1, len(whole))
        if not len(whole):
            index = index[:0]
        rows, whole = rows.pick(index), whole[index]
        assert len(rows) == len(whole)
        assert rows.shape == whole.shape
        np.testing.assert_array_equal(rows[start:stop], whole[start:stop])
        assert rows[start:stop].dtype == np.int32


@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=12), size=st.integers(1, 5))
def test_runs_are_as_long_as_they_can_be(lengths: list[int], size: int) -> None:
    rows = Rows([ArrayPiece(np.full((1, length), k)) for k, length in enumerate(lengths)])
    start = 0
    while start < len(rows):
        stop = rows.run(start, min(start + size, len(rows)))
        block = rows[start:stop]
        assert block[:, 0].tolist() == list(range(start, stop))
        assert stop in (start + size, len(rows)) or lengths[stop] != lengths[start]
        start = stop


def test_files_are_opened_when_they_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 2), np.float32))
    rows = Rows([FilePiece(tmp_path / "a.npy", (3, 2), np.dtype(np.float32), single=False)])
    np.testing.assert_array_equal(rows[1:], np.ones((2, 2)))
    (tmp_path / "a.npy").unlink()
    with pytest.raises(OptionError, match=r"cannot read --calib '.*a\.npy'"):
        rows[:1]


def test_memory_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.available()
    assert free is None or free > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = memory.available()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    assert memory.available() == pytest.approx(machine, rel=0.2)  # no limit: what the machine has
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available() == 500
    memory.require(500, "it", "do less")
    with pytest.raises(OptionError, match="it takes 501 B, only 500 B of memory are free; do less"):
        memory.require(501, "it", "do less")
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("100\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("90\n")
    (tmp_path / "memory" / "memory.stat").write_text("cache 3\n")
    assert memory.available() == 10

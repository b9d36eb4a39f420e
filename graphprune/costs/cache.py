"""What was measured on this machine, kept on disk.

One small JSON file an entry, named by a hash of its key; the key is stored too and compared when the entry is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Names the folder of all of graphprune's caches.
VARIABLE = "GRAPHPRUNE_CACHE"


def default_folder() -> Path:
    """``$GRAPHPRUNE_CACHE``, else ``graphprune`` in the platform's folder for caches."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "graphprune"


class Cache:
    """Entries in a folder; whatever goes wrong with it costs a measurement, never the run.

    Args:
        folder: Made when it is first written to; None: the default one.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    def get(self, key: Mapping[str, Any]) -> Any:
        """The entry of that key, as JSON gives it; None if there is none that can be read."""
        path = self._path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            _warn(f"{path} cannot be read and is measured anew: {error}")
            return None
        try:
            stored = json.loads(text)
            if stored["key"] != _plain(key):
                raise ValueError("it is the entry of another key")
            return stored["value"]
        except (ValueError, KeyError, TypeError) as error:
            _warn(f"{path} is damaged and is measured anew: {error}")
            return None

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Store an entry; readers see all of it or nothing."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"key": _plain(key), "value": value}, file)
                Path(name).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            _warn(
                f"what was measured cannot be kept in {self.folder}: {error}; set {VARIABLE} to another folder"
            )

    def _path(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
        return self.folder / "latency" / f"{digest[:32]}.json"


def _plain(key: Mapping[str, Any]) -> Any:
    """The key as JSON gives it back."""
    return json.loads(json.dumps(key, sort_keys=True))


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@functools.cache
def machine() -> dict[str, str]:
    """What timings depend on beside the op: the processor, the number of cores, ONNX Runtime's version."""
    import onnxruntime

    return {
        "cpu": _processor(),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    """The processor's model, as the system names it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        parts = {name.strip(): value.strip() for name, value in fields.items()}
        found = [
            parts.get(name, "") for name in ("model name", "cpu family", "model", "CPU part", "Hardware")
        ]
        if any(found):
            return " ".join(filter(None, found))
    return platform.processor() or platform.machine()

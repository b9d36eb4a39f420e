"""What of TensorRT is installed here, and what works: found out in subprocesses, never assumed from a version."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphprune.tensorrt.foreign import Answer, ask

#: Seconds. A first import of TensorRT from a cold disk takes some ten; a driver that hangs takes for ever.
LIMIT = 60.0
TENSORRT, RTX, RUNTIME, DEVICE = "tensorrt", "tensorrt_rtx", "onnxruntime", "device"
PROVIDER = "TensorrtExecutionProvider"
RTX_PROVIDER = "NvTensorRTRTXExecutionProvider"
#: The first compute capability with sparse tensor cores (Ampere).
SPARSE_CAPABILITY = (8, 0)


class State(enum.Enum):
    """How the probe of a package ended."""

    WORKS = "works"
    MISSING = "missing"
    BROKEN = "broken"  # an exception
    CRASHES = "crashes"  # a signal, or a status
    HANGS = "hangs"


@dataclass(frozen=True, slots=True)
class Device:
    """One NVIDIA GPU."""

    name: str
    capability: tuple[int, int]

    @property
    def sparse(self) -> bool:
        """It has sparse tensor cores."""
        return self.capability >= SPARSE_CAPABILITY


@dataclass(frozen=True, slots=True)
class Found:
    """One package, or the driver.

    Attributes:
        name: "tensorrt", "tensorrt_rtx", "onnxruntime" or "device".
        state: Whether it works. For TensorRT: a builder could be made; for the driver: there is a device.
        reason: Why it does not, in one sentence.
        version: As the package says; None where it did not get that far.
        builder_flags, network_flags: Flags that this build has.
        attributes: Parts of the API that this build has, as "Builder.build_serialized_network".
        providers: ONNX Runtime's execution providers; that one is listed does not mean that it loads.
        devices: The GPUs.
        seconds: How long the probe took.
    """

    name: str
    state: State
    reason: str | None = None
    version: str | None = None
    builder_flags: tuple[str, ...] = ()
    network_flags: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """It can be used."""
        return self.state is State.WORKS

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "name": self.name,
            "state": self.state.value,
            "reason": self.reason,
            "version": self.version,
            "builder_flags": list(self.builder_flags),
            "network_flags": list(self.network_flags),
            "attributes": list(self.attributes),
            "providers": list(self.providers),
            "devices": [
                {"name": device.name, "capability": list(device.capability)} for device in self.devices
            ],
            "seconds": round(self.seconds, 3),
        }


_SAID = {
    TENSORRT: "TensorRT's Python package 'tensorrt'",
    RTX: "TensorRT-RTX's Python package 'tensorrt_rtx'",
    RUNTIME: "the package 'onnxruntime'",
    DEVICE: "NVIDIA's driver",
}
_STEPS = {"import": "when imported", "look": "when looked at", "create": "when a builder is made"}


def probe(
    name: str,
    limit: float = LIMIT,
    *,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Found:
    """Look for a package (or, as "device", for GPUs) in a subprocess.

    Parameters
    ----------
    name : {"tensorrt", "tensorrt_rtx", "onnxruntime", "device"}
        What to look for.
    limit : float
        Seconds after which the probe is given up.
    environment, python : optional
        See :func:`graphprune.tensorrt.foreign.ask`.

    Returns
    -------
    Found
        Always: whatever the package does, this process lives on.
    """
    answer = ask("probe", {"package": name}, limit, environment=environment, python=python)
    facts = answer.contents or {}
    state, reason = _state(name, answer, facts)
    devices = tuple(
        Device(entry["name"], (entry["capability"][0], entry["capability"][1]))
        for entry in facts.get("devices", ())
    )
    if name == DEVICE and state is State.WORKS and not devices:
        state, reason = State.MISSING, "NVIDIA's driver finds no device"
    return Found(
        name=name,
        state=state,
        reason=reason,
        version=facts.get("version"),
        builder_flags=tuple(facts.get("builder_flags", ())),
        network_flags=tuple(facts.get("network_flags", ())),
        attributes=tuple(facts.get("attributes", ())),
        providers=tuple(facts.get("providers", ())),
        devices=devices,
        seconds=answer.seconds,
    )


def _state(name: str, answer: Answer, facts: Mapping[str, Any]) -> tuple[State, str | None]:
    what = _SAID.get(name, repr(name))
    when = _STEPS.get(str(facts.get("step")), "")
    if answer.ended == "time":
        return State.HANGS, f"{what} {answer.failure} {when}".rstrip()
    if answer.failure is not None:
        return State.CRASHES, f"the process {answer.failure} {when} ({what})"
    if facts.get("missing"):
        return State.MISSING, f"{what} is not installed"
    error = facts.get("error")
    if error is not None:
        if name == DEVICE and str(error).startswith("OSError"):
            return State.MISSING, "there is no NVIDIA driver"
        return State.BROKEN, f"{what} fails {when}: {error}"
    if facts.get("step") != "done":
        return State.CRASHES, f"the process ended of itself {when} ({what})"
    return State.WORKS, None

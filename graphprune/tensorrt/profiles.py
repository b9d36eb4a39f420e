"""Optimisation profiles: which shapes an engine is built for, and the one that it is tuned for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphprune.errors import OptionError

if TYPE_CHECKING:
    import onnx_ir as ir

Shape = tuple[int, ...]
_FORM = "NAME:1x3x224x224,8x3x224x224,16x3x224x224 (smallest, usual, largest)"
_SIZES = re.compile(r"\d+(x\d+)*")


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """One input of the network.

    Attributes:
        name: Its name.
        dtype: Its element type as ONNX names it, such as "FLOAT".
        shape: Its dimensions, one number or name each; None where the dimension has neither. None for an unknown rank.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    @property
    def dynamic(self) -> bool:
        """The engine must be told which sizes it is for."""
        return self.shape is None or not all(isinstance(size, int) for size in self.shape)


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of one input: every dimension lies between two bounds, and kernels are chosen at the usual one."""

    name: str
    smallest: Shape
    usual: Shape
    largest: Shape

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """Smallest, usual, largest."""
        return self.smallest, self.usual, self.largest

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "name": self.name,
            "smallest": list(self.smallest),
            "usual": list(self.usual),
            "largest": list(self.largest),
        }


def shape_text(shape: Sequence[int]) -> str:
    """A shape as trtexec and ONNX Runtime read it.

    >>> shape_text((1, 3, 224, 224))
    '1x3x224x224'
    """
    return "x".join(str(size) for size in shape)


def parse_profile(text: str) -> Profile:
    """Read ``NAME:min,opt,max``, or ``NAME:shape`` for one shape only.

    Raises
    ------
    OptionError
        If it is not of that form, ranks differ, or a size is larger than the one after it.

    Examples
    --------
    >>> parse_profile("image:1x3x224x224,8x3x224x224,16x3x224x224").usual
    (8, 3, 224, 224)
    """
    name, colon, listed = text.rpartition(":")  # names may hold colons
    pieces = [piece.strip() for piece in listed.split(",")]
    if not colon or not name or len(pieces) not in (1, 3) or not all(map(_SIZES.fullmatch, pieces)):
        raise OptionError(f"{text!r} is not of the form {_FORM}")
    shapes = [tuple(int(size) for size in piece.split("x")) for piece in pieces]
    smallest, usual, largest = shapes if len(shapes) == 3 else shapes * 3
    profile = Profile(name, smallest, usual, largest)
    _check_order(profile)
    return profile


def _check_order(profile: Profile) -> None:
    smallest, usual, largest = profile.shapes
    if not len(smallest) == len(usual) == len(largest):
        raise OptionError(f"shapes of input {profile.name!r}: the three have different numbers of dimensions")
    for axis, (low, middle, high) in enumerate(zip(smallest, usual, largest, strict=True)):
        if not low <= middle <= high:
            raise OptionError(
                f"shapes of input {profile.name!r}: dimension {axis} goes {low}, {middle}, {high}; give the smallest,"
                " the usual and the largest in this order"
            )


def check_profiles(inputs: Sequence[NetworkInput], given: Sequence[Profile]) -> tuple[Profile, ...]:
    """The given profiles, in the order of the network's inputs.

    Raises
    ------
    OptionError
        If one names no input, is given twice, has another rank or size than the network's, or is missing.
    """
    known = {item.name: item for item in inputs}
    profiles: dict[str, Profile] = {}
    for profile in given:
        _check_order(profile)
        if profile.name not in known:
            names = ", ".join(repr(name) for name in known)
            raise OptionError(f"shapes of {profile.name!r}: the network has no such input; it has {names}")
        if profile.name in profiles:
            raise OptionError(f"shapes of input {profile.name!r} are given twice")
        _check_fits(known[profile.name], profile)
        profiles[profile.name] = profile
    for item in inputs:
        if item.dynamic and item.name not in profiles:
            shape = "unknown" if item.shape is None else " x ".join(str(size or "?") for size in item.shape)
            raise OptionError(
                f"input {item.name!r} has a dynamic shape ({shape}): an engine is built for given sizes;"
                f" add --shapes {_FORM}"
            )
    return tuple(profiles[item.name] for item in inputs if item.name in profiles)


def _check_fits(item: NetworkInput, profile: Profile) -> None:
    if item.shape is None:
        return
    if len(item.shape) != len(profile.usual):
        raise OptionError(
            f"shapes of input {item.name!r}: {len(profile.usual)} dimensions, and the network's input has"
            f" {len(item.shape)}"
        )
    for axis, size in enumerate(item.shape):
        for shape in profile.shapes:
            if isinstance(size, int) and shape[axis] != size:
                raise OptionError(
                    f"shapes of input {item.name!r}: dimension {axis} is {size} in the network, not {shape[axis]}"
                )


def network_inputs(model: ir.Model) -> tuple[NetworkInput, ...]:
    """The inputs of a network that are not initializers."""
    found = []
    for value in model.graph.inputs:
        if value.name is None or value.name in model.graph.initializers:
            continue
        shape: tuple[int | str | None, ...] | None = None
        if value.shape is not None:
            shape = tuple(size if isinstance(size, int) else size.value for size in value.shape)
        found.append(
            NetworkInput(value.name, "UNDEFINED" if value.dtype is None else value.dtype.name, shape)
        )
    return tuple(found)

"""Saliency: how much each label matters.

A score gives every label a number; labels with small numbers go first. Criteria are registered by name, behind one
interface (:class:`graphprune.scores.evidence.Score`), and imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import cast

from graphprune.errors import OptionError
from graphprune.scores.evidence import Evidence, Score, Scores

__all__ = ["SCORES", "Evidence", "Score", "Scores", "find_score"]

#: Criteria by name: the module of this package that holds each, and the factory in it.
SCORES: dict[str, tuple[str, str]] = {
    "l1": ("weights", "L1"),
    "l2": ("weights", "L2"),
    "linf": ("weights", "LInf"),
    "lamp": ("weights", "Lamp"),
    "fpgm": ("weights", "GeometricMedian"),
    "bn-scale": ("weights", "BatchNormScale"),
    "random": ("weights", "Random"),
    "mean-abs": ("activations", "MeanAbsolute"),
    "variance": ("activations", "Variance"),
    "apoz": ("activations", "APoZ"),
    "wanda": ("activations", "Wanda"),
    "thinet": ("reconstruction", "ThiNet"),
    "lasso": ("reconstruction", "Lasso"),
    "obs": ("reconstruction", "StructuredOBS"),
    "taylor": ("gradients", "Taylor"),
    "fisher": ("gradients", "Fisher"),
    "obd": ("gradients", "OBD"),
}


def find_score(name: str) -> Score:
    """The criterion of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in SCORES:
        raise OptionError(f"unknown score {name!r}; there are {', '.join(SCORES)}")
    module, factory = SCORES[name]
    return cast(Score, getattr(importlib.import_module(f"graphprune.scores.{module}"), factory)())
